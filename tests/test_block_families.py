"""Where charts can go: one small member of every model file of timm against the table of docs/blocks.md.

``python tests/test_block_families.py`` prints the table anew.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import timm
from test_architectures import ALL, SMALL, SMALL_BUT_SLOW
from timm.models import model_entrypoint

from timm_faim.models.blocks import block_places

DOCS = Path(__file__).parents[1] / "docs" / "blocks.md"
LAYOUT = {False: "[B, …, D]", True: "[B, D, H, W]"}  # names of the table's rows, by Place.channels_first

# where the cheapest member is a toy with one block a stage, or has no blocks of its family's usual kind
TYPICAL = """
coatnet_0_rw_224 convnext_atto dm_nfnet_f0 efficientnet_b0 ese_vovnet39b gernet_s hgnetv2_b4 mambaout_femto resnest26d
mobilenetv3_small_050 resnet18 vit_relpos_small_patch16_224 vit_tiny_patch16_224
""".split()


def file_of(arch):
    return model_entrypoint(arch).__module__.rpartition(".")[2]


@cache
def members():
    """One architecture of each model file, by the file's name."""
    found = {}
    for arch in TYPICAL + SMALL + SMALL_BUT_SLOW:
        if timm.is_model(arch):
            found.setdefault(file_of(arch), arch)
    return dict(sorted(found.items()))


@cache
def places_of(arch):
    return block_places(arch, {})


def found(family):
    """Member of a family, its number of blocks, and whether its last block has features [B, D, H, W]."""
    arch = members()[family]
    places = places_of(arch)
    return arch, len(places), places[-1].channels_first if places else None


def documented():
    """The same by family, of the table and the list of families without blocks."""
    listed = {}
    (without,) = re.findall(r"<!-- without blocks -->\n(.*?)(?:\n\n|\Z)", DOCS.read_text("utf-8"), re.DOTALL)
    for layout, families in [*rows(), (None, without)]:
        for family, arch, count in re.findall(r"(\w+)\s+\(`(\w+)`\)(?: (\d+))?", families):
            assert family not in listed, f"{family} is listed twice"
            listed[family] = (arch, int(count or 0), layout)
    return listed


def rows():
    return [(first, re.search(rf"^\| {re.escape(layout)} \| (.*) \|$", DOCS.read_text("utf-8"), re.MULTILINE)[1])
            for first, layout in LAYOUT.items()]  # fmt: skip


def table():
    """The rows for docs/blocks.md, and the families without blocks."""
    cells = {layout: [] for layout in (*LAYOUT, None)}
    for family in members():
        arch, count, layout = found(family)
        cells[layout].append(f"{family} (`{arch}`)" + (f" {count}" if count else ""))
    lines = [f"| {name} | {', '.join(cells[first])} |" for first, name in LAYOUT.items()]
    return "\n".join([*lines, "", f"Without: {', '.join(cells[None])}"])


def test_every_model_file_is_listed():
    assert {file_of(arch) for arch in ALL} == documented().keys()


@pytest.mark.parametrize("family", members())
def test_documented_blocks(family):
    assert documented().get(family) == found(family), "print the table anew: python tests/test_block_families.py"


# layouts read off timm's code: (width, channels first) of the first and the last block
LAYOUTS = {
    "vit_tiny_patch16_224": ((192, False), (192, False)), "mixer_s32_224": ((512, False), (512, False)),
    "gmlp_ti16_224": ((128, False), (128, False)), "levit_128s": ((128, False), (384, False)),
    "levit_conv_128s": ((128, True), (384, True)), "hiera_tiny_224": ((96, False), (768, False)),
    "hieradet_small": ((96, False), (768, False)), "nest_tiny": ((96, False), (384, False)),
    "volo_d1_224": ((192, False), (384, False)), "swin_tiny_patch4_window7_224": ((96, False), (768, False)),
    "swinv2_cr_tiny_224": ((96, False), (768, False)), "mambaout_femto": ((48, False), (288, False)),
    "focalnet_tiny_srf": ((96, True), (768, True)), "tiny_vit_5m_224": ((64, True), (320, False)),
    "convnext_atto": ((40, True), (320, True)), "edgenext_xx_small": ((24, True), (168, True)),
    "mobilevit_xxs": ((16, True), (80, True)), "nextvit_small": ((96, True), (768, True)),
    "resnet18": ((64, True), (512, True)), "mobileone_s0": ((48, True), (256, True)),
}  # fmt: skip
# a height or width that is a width of the block too
AMBIGUOUS = [
    pytest.param("swin_tiny_patch4_window7_224", {"img_size": 384}, ((96, False), (768, False)), id="swin-384"),
    pytest.param("repghostnet_150", {}, ((24, True), (240, True)), id="repghost-150"),
]


@pytest.mark.parametrize(
    "arch, arguments, ends", [pytest.param(arch, {}, ends, id=arch) for arch, ends in LAYOUTS.items()] + AMBIGUOUS
)
def test_layout(arch, arguments, ends):
    places = block_places(arch, arguments) if arguments else places_of(arch)
    assert tuple((place.dim, place.channels_first) for place in (places[0], places[-1])) == ends
    assert len({place.channels_first for place in places}) == 1 or arch.startswith("tiny_vit")


if __name__ == "__main__":
    print(table())
