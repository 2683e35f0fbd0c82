"""The optional packages behind ONNX files, and which format a file has."""

from importlib.util import find_spec
from pathlib import Path

from timm_faim.run.errors import UserError

KEY = "timm_faim"  # of the description in a file's metadata
SUFFIXES = {".onnx": "onnx", ".pt2": "pt2", ".ts": "torchscript", ".torchscript": "torchscript"}


def format_of(path: str | Path) -> str:
    """The format of a file by its suffix.

    Raises:
        UserError: an unknown one.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"the name {path} ends in none of {', '.join(SUFFIXES)}. Name the file after its format")
    return SUFFIXES[suffix]


def need(*packages: str) -> None:
    """Check that packages are installed.

    Raises:
        UserError: with the line that installs them.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX files need {', '.join(missing)}: pip install 'timm-faim[export]'")
