"""Entries of hub_configs/: made from a run, verified against the Hub, filled in once published."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from torch import nn

from timm_faim.documents import one_line
from timm_faim.hub.package import CONFIG, EVALUATION, Release, build_package, open_folder, read_config
from timm_faim.hub.public import public_config, read_evaluation
from timm_faim.hub.upload import push
from timm_faim.models.checkpoint import sha256
from timm_faim.models.config import nearest
from timm_faim.models.published import INPUT_KEYS, Entry, EntryError, read_entry
from timm_faim.models.saved import check_config
from timm_faim.run.errors import UserError
from timm_faim.run.files import atomic_write
from timm_faim.run.weights import TIMM_NAME

PROBED = 8  # logits of the probe that an entry records
TOLERANCE = 1e-3  # relative to their range, between machines


def probe_logits(model: nn.Module) -> list[float]:
    """The first logits of a model for one fixed image, a wave of all input sizes; computed on the CPU in float32."""
    size = timm.data.resolve_input_data_config(model)["input_size"]
    image = torch.linspace(0, 100, steps=size[0] * size[1] * size[2]).sin().reshape(1, *size)
    with torch.inference_mode():
        logits = model.float().cpu().eval()(image)[0]
    return [round(value, 6) for value in logits[:PROBED].tolist()]


def write_entry(run: Path, folder: Path, tag: str, *, license: str, dataset: dict[str, str], recipe: str = "") -> Path:
    """Write the entry of a run, not yet published, and its list of labels.

    Returns:
        The file `<architecture>.<tag>.yaml`.

    Raises:
        UserError: the run does not open, there is such an entry or list, or it would not be valid; nothing is written.
    """
    config = public_config(read_config(run))
    name = f"{config['architecture']}.{tag}"
    path, label_path = folder / f"{name}.yaml", folder / f"{name}.labels.txt"
    for there in (path, label_path):
        if there.exists():
            raise UserError(f"{there} exists. Choose another --tag, or edit it")
    if not folder.is_dir():
        raise UserError(f"--folder {folder} is no folder. Make it, or name the folder of the entries")
    labels, cfg = config.get("label_names"), config["pretrained_cfg"]
    metrics = read_evaluation(run / "eval" / EVALUATION)["metrics"]
    content = {
        "architecture": config["architecture"],
        "tag": tag,
        "repo_id": None,
        "revision": None,
        "sha256": None,
        "num_classes": config["num_classes"],
        "license": license,
        "dataset": dataset,
        "recipe": recipe or None,
        "metrics": {key: round(metrics[key], 4) for key in ("top1", "top5") if key in metrics},
        "model_args": config["model_args"],
        "pretrained_cfg": {key: cfg[key] for key in INPUT_KEYS if key in cfg},
        "label_file": label_path.name if labels else None,
        "probe_logits": probe_logits(open_folder(run)),
    }
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as work:
        if labels:
            names = labels.values() if isinstance(labels, dict) else labels
            Path(work, label_path.name).write_text("\n".join(map(str, names)) + "\n", encoding="utf-8")
        Path(work, path.name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        try:
            read_entry(Path(work, path.name))
        except EntryError as e:
            raise UserError(str(e).replace(work, str(folder))) from e
        for there in (label_path, path) if labels else (path,):
            Path(work, there.name).rename(there)
    return path


@dataclass(frozen=True)
class Verdict:
    """What a check found: `problem` is empty where all is well, `state` says what was checked."""

    name: str
    state: str
    problem: str = ""


def check_entry(path: Path, offline: bool = False) -> Verdict:
    """Check one entry: its form, its architecture and options and, once published, its weights on the Hub.

    Args:
        path: the file.
        offline: look at the file alone.
    """
    try:
        entry = read_entry(path)
    except EntryError as e:
        return Verdict(path.stem, "form", str(e))
    if not timm.is_model(entry.architecture):
        near = nearest(entry.architecture, timm.list_models("faim_*"))
        return Verdict(entry.name, "form", f"timm_faim has no {entry.architecture}" + (f"; {near}?" if near else ""))
    try:
        check_config(
            {
                "architecture": entry.architecture,
                "num_classes": entry.num_classes,
                "model_args": entry.model_args,
                "pretrained_cfg": {**entry.pretrained_cfg, "num_classes": entry.num_classes},
            }
        )
    except (ValueError, TypeError) as e:
        return Verdict(entry.name, "form", str(e).replace("config.json", path.name))
    try:
        with torch.device("meta"):  # neither memory nor time
            timm.create_model(
                entry.architecture, pretrained_cfg=entry.cfg(), num_classes=entry.num_classes, **entry.model_args
            )
    except Exception as e:  # a wrong argument fails in as many ways as there are models
        return Verdict(entry.name, "form", f"model_args do not build {entry.architecture}: {one_line(e)}")
    if not entry.revision:
        return Verdict(entry.name, "form; not published")
    if offline:
        return Verdict(entry.name, "form; not downloaded")
    try:
        model = timm.create_model(entry.name, pretrained=True).eval()  # verifies the hash
        found = probe_logits(model)
    except Exception as e:  # a download fails in as many ways as there are libraries below
        return Verdict(entry.name, "download", one_line(e))
    if problem := _other_logits(found, entry):
        return Verdict(entry.name, "logits", problem)
    return Verdict(entry.name, "form, hash and logits")


def _other_logits(found: list[float], entry: Entry) -> str:
    """How a model's probe differs from an entry's by more than machines differ; empty where it does not."""
    recorded = entry.probe_logits
    if not recorded:
        return ""
    if len(found) != len(recorded):
        return f"the probe has {len(found)} logits, recorded are {len(recorded)}"
    off = max(abs(a - b) for a, b in zip(found, recorded, strict=True)) / max(1.0, *map(abs, recorded))
    return (
        ""
        if off <= TOLERANCE
        else (f"the probe's logits differ by {off:.2g} of their size: {found}, recorded {recorded}")
    )


def publish_entry(entry: Entry, run: Path, work: Path, *, private: bool | None = None) -> Entry:
    """Push the run of an entry and fill in its revision and sha256; returns the entry as it is then.

    Args:
        entry: not yet published.
        run: its run folder.
        work: folder to build in.
        private: of a repository that is made.
    """
    path, config = entry.path, read_config(run)
    if config["architecture"] != entry.architecture or config["num_classes"] != entry.num_classes:
        raise UserError(
            f"{run / CONFIG} is a {config['architecture']} of {config['num_classes']} classes, {path} says "
            f"{entry.architecture} of {entry.num_classes}"
        )
    model = build_package(
        run,
        work,
        Release(
            entry.repo_id,
            entry.license,
            datasets=[entry.dataset["id"]] if entry.dataset.get("id") else [],
            dataset_name=entry.dataset.get("name", ""),
        ),
    )
    if problem := _other_logits(probe_logits(model), entry):
        raise UserError(
            f"the weights in {run} are not those that {path} was written from: {problem}. Write the entry anew"
        )
    _, commit = push(work, entry.repo_id, private=private)
    _fill_in(path, {"revision": commit, "sha256": sha256(work / TIMM_NAME)})
    return read_entry(path)


def _fill_in(path: Path, values: dict[str, Any]) -> None:
    """Set top-level keys in a YAML file without touching its other lines."""
    text = path.read_text(encoding="utf-8")
    for key, value in values.items():
        text, count = re.subn(rf"(?m)^{key}:.*$", f"{key}: {value}", text)
        if not count:
            text += f"{key}: {value}\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
