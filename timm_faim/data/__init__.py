"""Bundled data: 242 Omniglot characters of 8 alphabets, 10 training and 10 validation drawings each."""

import os
import shutil
import tarfile
import tempfile
from importlib import resources
from pathlib import Path

OMNIGLOT242 = "omniglot242"


def cache_dir() -> Path:
    """$TIMM_FAIM_CACHE, else timm_faim in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("TIMM_FAIM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timm_faim"


def omniglot242_root() -> Path:
    """Folder with train/ and val/ of the bundled characters, unpacked into the cache at the first call.

    Any number of processes may call this at once: each unpacks to a name of its own, one rename wins.

    Raises:
        OSError: the cache folder cannot be written.
    """
    root = cache_dir() / OMNIGLOT242
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    unpacked = Path(tempfile.mkdtemp(prefix=f".{OMNIGLOT242}-", dir=root.parent))
    try:
        archive = resources.files(__package__) / f"{OMNIGLOT242}.tar.gz"
        with archive.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:gz") as tar:
            tar.extractall(unpacked, filter="data")
        unpacked.chmod(0o755)  # mkdtemp's 0700 would lock other users out of a shared cache
        try:
            unpacked.rename(root)
        except OSError:
            if not root.is_dir():  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return root
