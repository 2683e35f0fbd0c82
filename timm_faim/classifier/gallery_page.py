"""Predictions as a page of small pictures, the surest first, that needs nothing beside it."""

import base64
import html
import io
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from timm_faim.classifier.rows import Row
from timm_faim.images.pixels import read_image
from timm_faim.report.page_style import PAGE, STYLE
from timm_faim.run.files import atomic_write

SIDE = 176  # pixels of a picture

_STYLE = """
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .8rem; }
main > p { grid-column: 1 / -1; margin: 0; color: var(--soft); }
article { background: var(--card); border-radius: 8px; padding: .5rem; font-size: .85rem; overflow-wrap: anywhere; }
article img { width: 100%; aspect-ratio: 1; object-fit: contain; }
article b { display: block; margin-top: .3rem; } article.no b { color: #c0392b; }
article span { color: var(--soft); display: block; }
"""


def write_gallery(path: Path, rows: Sequence[Row], title: str, most: int) -> int:
    """Write the page, whole or not at all.

    Args:
        path: the HTML file.
        rows: of images that could be read, and others, which are left out.
        title: of the page.
        most: images on it; of more the surest and the least sure ones, half each.

    Returns:
        The number of images on it.
    """
    started = time.perf_counter()
    ranked = sorted((row for row in rows if "top" in row), key=lambda row: (-row["top"][0]["probability"], row["file"]))
    shown = ranked if len(ranked) <= most else [*ranked[: most // 2], *ranked[len(ranked) - (most - most // 2) :]]
    left = f" {len(ranked) - len(shown)} in the middle are left out." if len(shown) < len(ranked) else ""
    body = [f"<p>{len(ranked)} images, the surest first.{left}</p>", *map(_tile, shown)]
    page = PAGE.format(
        title=html.escape(title),
        style=STYLE + _STYLE,
        body="\n".join(body),
        date=time.strftime("%Y-%m-%d %H:%M"),
        seconds=f"{time.perf_counter() - started:.1f}",
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    return len(shown)


def _tile(row: Row) -> str:
    first, *others = row["top"]
    name = f"{row['prediction']} (nearest: {first['class']})" if row["known"] is False else first["class"]
    lines = [
        f"{100 * first['probability']:.1f} %",
        *(f"{o['class']} {100 * o['probability']:.1f} %" for o in others[:2]),
    ]
    text = "".join(f"<span>{html.escape(line)}</span>" for line in [*lines, row["file"]])
    kind = ' class="no"' if row["known"] is False else ""
    return f'<article{kind}><img src="{_picture(row["file"])}" alt=""><b>{html.escape(name)}</b>{text}</article>'


def _picture(file: str) -> str:
    """A small JPEG as an address of its own; empty where the file is gone."""
    try:
        with Path(file).open("rb") as stream:
            image = ImageOps.contain(read_image(stream, "RGB"), (SIDE, SIDE), Image.Resampling.BILINEAR)
    except Exception:  # it was readable a moment ago
        return ""
    kept = io.BytesIO()
    image.save(kept, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(kept.getvalue()).decode("ascii")
