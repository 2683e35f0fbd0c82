"""A contact sheet: queries with their nearest gallery images, right ones in a green frame, wrong ones in a red one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from timm_faim.report.plots import GREEN, GREY, RED
from timm_faim.run.files import atomic_write

TILE = 96  # pixels of an image's longer side
FRAME = 4
LINE = 13  # of a caption, which has two
GAP = 10  # between images
CELL_WIDTH = TILE + 2 * FRAME + GAP
CELL_HEIGHT = TILE + 2 * FRAME + 2 * LINE + GAP
HEADING = 24


@dataclass(frozen=True)
class Tile:
    """A picture [H, W] or [H, W, 3] of bytes with its caption; ``right`` is None for a query."""

    picture: np.ndarray
    caption: str
    right: bool | None = None


def choose_rows(has_positives_Q: np.ndarray, first_right_Q: np.ndarray, count: int, seed: int) -> tuple[list, list]:
    """Queries to show: half at random, half among those whose first neighbour is wrong; without repetition.

    Args:
        has_positives_Q: queries to choose from.
        first_right_Q: whether the first neighbour is of the query's class.
        count: rows in all; where wrong ones run out there are more random ones.
        seed: of the choice.

    Returns:
        Numbers of the random queries and of the wrong ones, each in ascending order.
    """
    order = np.random.default_rng(seed).permutation(np.flatnonzero(has_positives_Q))
    is_wrong = ~first_right_Q[order]
    wanted_wrong = min(count // 2, int(is_wrong.sum()))
    random = order[: count - wanted_wrong]
    wrong = order[is_wrong & ~np.isin(order, random)][:wanted_wrong]
    return sorted(random.tolist()), sorted(wrong.tolist())


def sheet_size(sections: Sequence[int], neighbours: int) -> tuple[int, int]:
    """Width and height in pixels of a sheet with so many rows in each section; empty sections take no room."""
    shown = [rows for rows in sections if rows]
    # a second gap sets the query apart
    return (neighbours + 1) * CELL_WIDTH + 2 * GAP, sum(shown) * CELL_HEIGHT + len(shown) * HEADING + GAP


def draw_sheet(path: Path, sections: Sequence[tuple[str, Sequence[Sequence[Tile]]]], neighbours: int) -> None:
    """Write a PNG.

    Args:
        path: the file, written whole or not at all.
        sections: headings with their rows; a row is the query followed by its neighbours.
        neighbours: of each row.
    """
    sheet = Image.new("RGB", sheet_size([len(rows) for _, rows in sections], neighbours), "white")
    draw = ImageDraw.Draw(sheet)
    font, bold = ImageFont.load_default(11), ImageFont.load_default(14)
    top = GAP // 2
    for heading, rows in sections:
        if not rows:
            continue
        draw.text((GAP, top), _fit(heading, sheet.width - 2 * GAP, bold), "black", bold)
        top += HEADING
        for row in rows:
            for column, tile in enumerate(row):
                left = GAP + column * CELL_WIDTH + (GAP if column else 0)
                _place(sheet, draw, font, tile, left, top)
            top += CELL_HEIGHT
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")


def _place(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, tile: Tile, left: int, top: int
) -> None:
    picture = Image.fromarray(tile.picture).convert("RGB")
    scale = TILE / max(picture.size)
    picture = picture.resize([max(1, round(scale * side)) for side in picture.size], Image.Resampling.BICUBIC)
    color = GREY if tile.right is None else GREEN if tile.right else RED
    side = TILE + 2 * FRAME
    draw.rectangle((left, top, left + side - 1, top + side - 1), "white", color, 1 if tile.right is None else FRAME)
    sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
    ink = "black" if tile.right is None else color
    for number, line in enumerate(_two_lines(tile.caption, side, font)):
        draw.text((left, top + side + 1 + number * LINE), line, ink, font)


def _two_lines(text: str, width: int, font: ImageFont.FreeTypeFont) -> tuple[str, str]:
    """The text in two lines of a width in pixels, broken behind a space or a sign where there is one."""
    fitting = max((n for n in range(1, len(text) + 1) if font.getlength(text[:n]) <= width), default=0)
    if fitting == len(text):
        return text, ""
    sign = max((n for n in range(fitting // 2, fitting + 1) if n and not text[n - 1].isalnum()), default=fitting)
    return text[:sign], _fit(text[sign:].lstrip(), width, font)


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The text, shortened in the middle to a width in pixels: the ends of names differ more often than their starts."""
    kept = len(text)
    shown = text
    while font.getlength(shown) > width and kept > 2:
        kept -= 1
        tail = (kept + 1) // 2
        shown = f"{text[: kept - tail]}…{text[-tail:]}"
    return shown
