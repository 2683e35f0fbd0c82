"""The house: one dialect of Python, and arrows that point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = [name for name in ("timm_faim", "tests", "benchmarks", "examples", "train_faim.py") if (ROOT / name).exists()]

# From the ground up; a room imports from lower floors, and from itself. The package's own names stand above models.
FLOORS = [
    {"metric", "data", "documents", "version"},
    {"moments"},
    {"head", "block"},
    {"losses", "models", "calibration"},
    {"adapt", "recipe"},
    {"estimator"},
    {""},
    {"run"},
    {"images"},
    {"report"},
    {"training"},
    {"hub", "retrieval", "export"},
    {"classifier", "classes"},
    {"train", "fitting"},
    {"commands"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_one_dialect(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, *PLACES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def imports(path: Path):
    """Rooms of the package that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "timm_faim":
            yield (node.module + ".").split(".")[1]
        elif isinstance(node, ast.Import):
            yield from ((a.name + ".").split(".")[1] for a in node.names if a.name.split(".")[0] == "timm_faim")


@pytest.mark.parametrize("path", sorted((ROOT / "timm_faim").rglob("*.py")), ids=lambda path: path.stem)
def test_imports_point_down(path):
    room = path.relative_to(ROOT / "timm_faim").parts[0].removesuffix(".py")
    if room == "__init__":
        return  # the face of the package
    assert room in LEVEL, f"give {room} a floor"
    wrong = [other for other in imports(path) if other != room and not LEVEL[other] < LEVEL[room]]
    assert not wrong, f"{room} imports from {wrong}, which stand no lower"


def test_no_file_is_two():
    longest = sorted((ROOT / "timm_faim").rglob("*.py"), key=lambda path: -len(path.read_text().splitlines()))
    assert len(longest[0].read_text().splitlines()) <= 410, longest[0]
