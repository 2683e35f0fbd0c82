"""docs/blocks.md says what is there: its options, its commands, its code."""

import re
import shlex
from pathlib import Path

import pytest

from timm_faim import FAIMChart
from timm_faim.models import block_options
from timm_faim.training.args import parse_args

DOCS = (Path(__file__).parents[1] / "docs" / "blocks.md").read_text(encoding="utf-8")
SHELL = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)]


def test_option_table_is_that_of_the_config():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", DOCS, re.MULTILINE)
    assert {name: eval(default) for name, default in rows} == block_options()


def test_examples_run_as_they_stand():
    code = "\n".join(re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL))
    code = code.replace("faim_vit_base_patch16_224", "faim_test_vit").replace("pretrained=True", "pretrained=False")
    scope = {}
    exec(code, scope)
    assert sum(isinstance(module, FAIMChart) for module in scope["model"].modules()) == 2


@pytest.mark.parametrize("command", SHELL)
def test_training_commands_parse(command):
    words = shlex.split(command)
    assert parse_args(words[words.index("train_faim.py") + 1 :]).head.faim_blocks == 2


def test_the_picture_is_there():
    (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", DOCS)
    assert (Path(__file__).parents[1] / "docs" / picture).read_bytes().startswith(b"\x89PNG")
