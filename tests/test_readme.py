"""The README says what is there: its options, its commands, its code."""

import re
import shlex
from pathlib import Path

import pytest
import timm

import timm_faim
from timm_faim.models import head_options
from timm_faim.training.args import parse_args

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)]


def test_option_table_is_the_signature():
    text = (ROOT / "docs" / "head.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", text, re.MULTILINE)
    assert {name: eval(default.strip("`")) for name, default in rows} == head_options()


def test_ci_runs_the_test_command():
    (command,) = [block.strip() for block in SHELL if "pytest" in block]
    assert (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1] == command


@pytest.mark.parametrize("command", [b for b in SHELL if "train_faim.py" in b])
def test_training_commands_parse(command):
    words = shlex.split(command)
    parse_args(words[words.index("train_faim.py") + 1 :])


def test_first_example_runs_as_it_stands():
    code = re.search(r"```python\n(import timm, timm_faim.*?)```", README, re.DOTALL).group(1)
    code = code.replace("faim_vit_base_patch16_224", "faim_test_vit").replace("pretrained=True", "pretrained=False")
    scope = {"timm": timm, "timm_faim": timm_faim}
    exec(code, scope)
    assert scope["model"].head.num_classes == 200 and scope["model"].faim_cfg["preset"] == "indicatrix"
