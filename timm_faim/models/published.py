"""Which FAIM checkpoints exist: the entries of ``hub_configs/``, one YAML file each, as FAIM tags of timm's registry.

An entry says where a checkpoint is (repository, revision, sha256 of the weights), how its model is made and what its
images look like. The repositories belong to one organisation, ``TIMM_FAIM_HUB_ORG`` in the environment or "timm-faim";
``TIMM_FAIM_HUB_CONFIGS`` names a further folder of entries.
"""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from timm.models import PretrainedCfg

from timm_faim.documents import one_line, read_yaml

from .config import PREFIX, nearest
from .saved import check_inputs, is_number

ORGANISATION, FOLDERS = "TIMM_FAIM_HUB_ORG", "TIMM_FAIM_HUB_CONFIGS"
_PACKAGE = Path(__file__).parents[1]
INPUT_KEYS = (
    "input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "pool_size",
    "first_conv",
    "classifier",
)  # what an entry's pretrained_cfg may say
_NAME = re.compile(r"[a-z0-9_]+")
_TAG = re.compile(r"[A-Za-z0-9_-]+")
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,99}")

_logger = logging.getLogger(__name__)


class EntryError(ValueError):
    """An entry of hub_configs/ that cannot be used; one line that names the file, the key and the mend."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def is_hub_id(name: Any) -> bool:
    """Whether a value has the form of a name on the Hub: NAME or ORG/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str) and name.isascii() and not name.endswith("\n")


def is_license(name: Any) -> bool:
    """Whether a value has the form of the Hub's identifiers of licences, such as apache-2.0."""
    return isinstance(name, str) and _LICENSE.fullmatch(name) is not None


@dataclass(frozen=True)
class Entry:
    """One checkpoint. The fields are the keys of its file; `path` is the file itself."""

    path: Path
    architecture: str
    tag: str
    num_classes: int
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    dataset: dict[str, str]
    license: str
    repo_id: str = ""  # the default follows from organisation, architecture and tag
    revision: str | None = None  # commit of the repository; None before the first publication
    sha256: str | None = None  # of model.safetensors
    recipe: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    label_file: str | None = None  # beside the entry, one name a line
    probe_logits: list[float] = field(default_factory=list)  # see `timm_faim.hub.entries`

    def __post_init__(self) -> None:
        self._check()
        if not self.repo_id:
            organisation = os.environ.get(ORGANISATION, "timm-faim")
            object.__setattr__(self, "repo_id", f"{organisation}/{self.architecture}.{self.tag}")

    @property
    def name(self) -> str:
        """`<architecture>.<tag>`, the name for `timm.create_model`."""
        return f"{self.architecture}.{self.tag}"

    @property
    def hub_id(self) -> str:
        """Repository with its pinned revision, as timm writes it."""
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    def cfg(self) -> PretrainedCfg:
        """The entry in timm's form; without weights as long as nothing is published."""
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in self.pretrained_cfg.items()}
        return PretrainedCfg(
            **given,
            architecture=self.architecture,
            tag=self.tag,
            num_classes=self.num_classes,
            license=self.license,
            hf_hub_id=self.hub_id if self.revision else None,
        )

    def label_names(self) -> list[str] | None:
        """Class names in the order of their indices."""
        if self.label_file is None:
            return None
        return (self.path.parent / self.label_file).read_text(encoding="utf-8").splitlines()

    def _check(self) -> None:
        for key, kind in _TYPES.items():
            value = getattr(self, key)
            if not isinstance(value, kind) or isinstance(value, bool):
                self._refuse(key, f"must be {kind.__name__}, got {value!r}")
        for key, pattern, form in (
            ("architecture", _NAME, "faim_ and an architecture of timm"),
            ("tag", _TAG, "letters, digits, - and _"),
            ("revision", re.compile(r"[0-9a-f]{40}"), "a commit of 40 hex digits"),
            ("sha256", re.compile(r"[0-9a-f]{64}"), "64 hex digits"),
        ):
            value = getattr(self, key)
            if value and not (isinstance(value, str) and pattern.fullmatch(value)):
                self._refuse(key, f"must be {form}, got {value!r}")
        for key, values in (("probe_logits", self.probe_logits), ("metrics", self.metrics.values())):
            if not all(map(is_number, values)):
                self._refuse(key, f"must hold numbers, got {list(values)}")
        if self.repo_id and not ("/" in self.repo_id and is_hub_id(self.repo_id)):
            self._refuse("repo_id", f"must be ORG/NAME, got {self.repo_id!r}")
        if not is_license(self.license):
            self._refuse("license", f"must be an identifier of the Hub such as apache-2.0, got {self.license!r}")
        for key, value in self.dataset.items():
            if key not in ("name", "id") or not isinstance(value, (str, type(None))):
                self._refuse("dataset", f"must hold a name and an id, got {key!r}: {value!r}")
        if self.dataset.get("id") and not is_hub_id(self.dataset["id"]):
            self._refuse("dataset.id", f"must be a name on the Hub, NAME or ORG/NAME, got {self.dataset['id']!r}")
        if not self.architecture.startswith(PREFIX):
            self._refuse("architecture", f"must begin with {PREFIX}, got {self.architecture!r}")
        if bool(self.revision) != bool(self.sha256):
            self._refuse("revision", "and sha256 belong together: give both, or none before the first publication")
        if self.num_classes < 1:
            self._refuse("num_classes", f"must be at least 1, got {self.num_classes}")
        for key in self.pretrained_cfg:
            if key not in INPUT_KEYS:
                self._refuse(
                    f"pretrained_cfg.{key}",
                    f"is not known.{_near(str(key), INPUT_KEYS)} Known: {', '.join(INPUT_KEYS)}",
                )
        try:
            check_inputs("pretrained_cfg", self.pretrained_cfg)
        except ValueError as e:
            raise EntryError(f"{self.path}: {e}") from e
        if self.label_file is not None:
            if (
                not isinstance(self.label_file, str)
                or Path(self.label_file).name != self.label_file
                or self.label_file.startswith(".")
                or len(self.label_file) > 200
            ):
                self._refuse("label_file", f"must be the name of a file beside the entry, got {self.label_file!r}")
            try:
                count = len(self.label_names())
            except OSError as e:
                self._refuse("label_file", f"{self.label_file} cannot be read: {e.strerror}")
            if count != self.num_classes:
                self._refuse("label_file", f"{self.label_file} has {count} names, num_classes is {self.num_classes}")

    def _refuse(self, key: str, problem: str) -> None:
        raise EntryError(f"{self.path}: {key} {problem}")


_TYPES = {
    "architecture": str,
    "tag": str,
    "num_classes": int,
    "model_args": dict,
    "pretrained_cfg": dict,
    "dataset": dict,
    "license": str,
    "repo_id": str,
    "recipe": str,
    "metrics": dict,
    "probe_logits": list,
}


def read_entry(path: Path) -> Entry:
    """Read and check one file.

    Raises:
        EntryError: what is wrong in it, by key.
    """
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as e:
        raise EntryError(f"{path} cannot be read: {e}") from e
    if not isinstance(content, dict):
        raise EntryError(f"{path} must hold `key: value` lines")
    known = {f.name: f for f in fields(Entry) if f.name != "path"}
    for key in content:
        if key not in known:
            raise EntryError(f"{path}: unknown key {key!r}.{_near(str(key), known)}")
    for key, f in known.items():
        if content.get(key) is None and f.default is MISSING and f.default_factory is MISSING:
            raise EntryError(f"{path}: {key} is missing")
    entry = Entry(path=path, **{key: value for key, value in content.items() if value is not None})
    if path.stem != entry.name:
        raise EntryError(f"{path}: the file of {entry.name} must be called {entry.name}.yaml")
    return entry


def entry_files() -> Iterator[Path]:
    """Every file of an entry: those that come with the package, then those of the further folder."""
    inside = _PACKAGE / "hub_configs"  # of an installed package; in a checkout the folder is beside it
    folders = [inside if inside.is_dir() else _PACKAGE.parent / "hub_configs"]
    if further := os.environ.get(FOLDERS):
        folders.append(Path(further))
    for folder in folders:
        yield from sorted(path for path in folder.glob("faim_*.yaml"))


@cache
def published() -> dict[str, dict[str, Entry]]:
    """The usable entries by architecture and tag, read once."""
    found: dict[str, dict[str, Entry]] = {}
    for path in entry_files():
        try:
            entry = read_entry(path)
        except EntryError as e:  # one wrong file must not keep the package from being imported
            _logger.warning(f"left out: {e}")
            continue
        found.setdefault(entry.architecture, {})[entry.tag] = entry
    return found


def _near(key: str, known: Any) -> str:
    near = nearest(key, known)
    return f" Did you mean {near!r}?" if near else ""
