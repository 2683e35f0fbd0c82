"""The folder that is published: weights, config, card, options, training table, the metric's picture.

It is built whole in a folder of its own, from a run of train_faim.py or any folder with config.json and
model.safetensors, and opened with timm before anything is uploaded.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models import get_pretrained_cfg
from torch import nn

from timm_faim.documents import one_line, read_json, read_yaml
from timm_faim.head import faim_heads
from timm_faim.hub.card import CARD, Facts, write_card
from timm_faim.hub.public import is_name, public_config, public_options, public_rows, read_evaluation
from timm_faim.models.published import is_hub_id, is_license
from timm_faim.models.saved import check_config
from timm_faim.report.distances import HeadDistances
from timm_faim.report.heads import draw_head
from timm_faim.report.plots import draw_learning_curve
from timm_faim.run.csv_file import write_csv
from timm_faim.run.errors import UserError
from timm_faim.run.summary import read_summary
from timm_faim.run.weights import LAST, TIMM_NAME, save_config, save_weights

CONFIG, ARGS, SUMMARY, EVALUATION = "config.json", "train_args.yaml", "summary.csv", "eval.json"
CURVE, PICTURE = "learning_curve.png", "metric.png"
FILES = (TIMM_NAME, CONFIG, CARD, ARGS, SUMMARY, EVALUATION, CURVE, PICTURE)  # all that is ever published


@dataclass(frozen=True)
class Release:
    """What a person says about a publication.

    Args:
        repo_id: ORG/NAME; what follows the first dot of NAME becomes the checkpoint's tag.
        license: of the weights, an identifier of the Hub such as apache-2.0; None says none.
        datasets: Hub identifiers of the training data.
        dataset_name: its name for people.
        base_model: Hub identifier of the model that training began from; None: from the run's options.
        label_descriptions: class name to description.

    Raises:
        UserError: the licence, or a name of data or of the base model, is none of the Hub's form.
    """

    repo_id: str
    license: str | None = None
    datasets: Sequence[str] = ()
    dataset_name: str = ""
    base_model: str | None = None
    label_descriptions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.license is not None and not is_license(self.license):
            raise UserError(f"{self.license!r} is no licence. Give an identifier of the Hub such as apache-2.0")
        for name in (*self.datasets, *([] if self.base_model is None else [self.base_model])):
            if not is_hub_id(name):
                raise UserError(f"{name!r} is no name of data or of a model on the Hub. Give NAME or ORG/NAME")

    @property
    def tag(self) -> str:
        """Tag of the checkpoint."""
        return self.repo_id.split("/")[-1].partition(".")[2]


def build_package(run: Path, folder: Path, release: Release) -> nn.Module:
    """Write what is to be published into a new folder, whole or not at all, and open it once as anyone would.

    Args:
        run: run folder of train_faim.py, or a folder with config.json and model.safetensors.
        folder: where to write; it must not exist, or be empty.
        release: what to say about it.

    Returns:
        The opened model, in eval mode on the CPU.

    Raises:
        UserError: the run has no usable config or weights, or does not open; or its options, summary or evaluation
            cannot be read.
    """
    run, folder = Path(run), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty. Name a folder that does not exist yet")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        model = _build(run, Path(temporary, "package"), release)
        if folder.exists():
            folder.rmdir()
        Path(temporary, "package").rename(folder)
    return model


def _build(run: Path, folder: Path, release: Release) -> nn.Module:
    config = public_config(read_config(run))
    config["pretrained_cfg"] |= {
        key: value for key, value in (("license", release.license), ("tag", release.tag)) if value
    }
    if release.label_descriptions:
        config["label_descriptions"] = dict(release.label_descriptions)

    args = _options(run)
    rows, evaluation = public_rows(read_summary(run / SUMMARY)), read_evaluation(run / "eval" / EVALUATION)
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _copy_weights(run / TIMM_NAME, folder / TIMM_NAME)
    if args:
        (folder / ARGS).write_text(yaml.safe_dump(public_options(args), sort_keys=False), encoding="utf-8")
    if rows:
        write_csv(folder / SUMMARY, [list(rows[0]), *(list(row.values()) for row in rows)])
        draw_learning_curve(folder / CURVE, rows)
    if evaluation["metrics"]:
        (folder / EVALUATION).write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")

    model = open_folder(folder)
    heads = faim_heads(model)
    _picture(run, folder / PICTURE, heads, rows)
    base_model, base_license = (release.base_model, None) if release.base_model else _base_model(args)
    write_card(
        folder,
        Facts(
            repo_id=release.repo_id,
            license=release.license,
            datasets=list(release.datasets),
            dataset_name=release.dataset_name or _dataset_of(args),
            base_model=base_model,
            base_license=base_license,
            config=config,
            rows=rows,
            metrics=evaluation["metrics"] or _best_metrics(rows),
            head=_head_facts(heads),
            parameters=sum(p.numel() for p in model.parameters()),
            files=sorted(p.name for p in folder.iterdir()),
        ),
    )
    return model


def save_model(model: nn.Module, folder: Path, label_names: Sequence[str] | None = None) -> Path:
    """Write config.json and model.safetensors of a model in memory, as a folder that `build_package` takes.

    Weights in any memory format are stored contiguous, and shared ones once for each name; never a pickle.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data_config = timm.data.resolve_input_data_config(model)
    save_config(model, folder / CONFIG, data_config, list(label_names) if label_names else None, pretrained=False)
    save_weights(model.state_dict(), folder, is_best=True)
    (folder / LAST).unlink()
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = folder / CONFIG
    try:
        config = read_json(path)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}. Name the run folder of a training") from e
    _check(folder, config)
    return config


def open_folder(folder: Path) -> nn.Module:
    """The model of a folder, opened with timm on the CPU and tried on an empty image.

    Raises:
        UserError: it does not open, or gives no finite logits.
    """
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.inference_mode():
            logits = model(torch.zeros(1, *timm.data.resolve_input_data_config(model)["input_size"]))
    except Exception as e:  # a wrong folder fails in as many ways as there are models
        raise UserError(f"{folder} does not open with timm: {one_line(e)}") from e
    if not torch.isfinite(logits).all():
        raise UserError(f"the model in {folder} gives logits that are not finite. Publish an earlier epoch")
    return model


def _check(folder: Path, config: Any) -> None:
    try:
        check_config(config)
    except (ValueError, TypeError) as e:
        raise UserError(f"{folder}: {e}") from e


def _picture(run: Path, path: Path, heads: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> None:
    """The metric of the first head: the run's report has seen images, a picture drawn here shows the parameters."""
    drawn = next((p for p in (run / "report" / "head.png", run / "report" / "head0.png") if p.is_file()), None)
    if heads and drawn is not None:
        shutil.copyfile(drawn, path)
    elif heads:
        name, head = next(iter(heads.items()))
        suffix = f"_{name}" if len(heads) > 1 and name else ""
        draw_head(path, HeadDistances(head).geometry(), rows, suffix, None)


def _copy_weights(path: Path, to: Path) -> None:
    """The tensors; a file that says more of itself than that they are torch's is written anew."""
    try:
        with safe_open(path, framework="pt") as weights:
            said = weights.metadata() or {}
        if said in ({}, {"format": "pt"}):
            shutil.copyfile(path, to)
        else:
            save_file(load_file(path), to, metadata={"format": "pt"})
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot read the weights {path}: {e}. Only safetensors are published") from e


def _options(run: Path) -> dict[str, Any]:
    for path in (run / "args.yaml", run / ARGS):
        if path.is_file():
            try:
                found = read_yaml(path)
            except (OSError, ValueError) as e:
                raise UserError(f"cannot read {path}: {e}. Mend it, or remove it to publish without options") from e
            return found if isinstance(found, dict) else {}
    return {}


def _dataset_of(args: Mapping[str, Any]) -> str:
    """A name for the card: of --dataset what is no path, else the last part of the data folder's name."""
    name = str(args.get("dataset") or "")
    kind, _, rest = name.partition("/")
    if name and is_name(name) and not rest.startswith("/"):
        return name
    place = rest if name else str(args.get("data_dir") or "")
    last = Path(place.rstrip("/\\").replace("\\", "/")).name
    return next((word for word in (last, kind) if word and is_name(word)), "image folder")


def _base_model(args: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Hub identifier and licence of the weights that the run began from."""
    if not args.get("pretrained") or ":" in str(args.get("model")):
        return None, None
    try:
        cfg = get_pretrained_cfg(str(args.get("model")), allow_unregistered=True)
    except RuntimeError:  # a tag that timm does not have
        return None, None
    return (cfg.hf_hub_id.partition("@")[0], cfg.license) if cfg is not None and cfg.hf_hub_id else (None, None)


def _best_metrics(rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Of the best epoch; per cent."""
    key = "eval_map" if any(row.get("eval_map") for row in rows) else "eval_top1"  # several labels an image, or one
    best = max((row for row in rows if row.get(key)), key=lambda row: float(row[key]), default={})
    return {key.removeprefix("eval_"): float(value) for key, value in best.items() if key.startswith("eval_") and value}


def _head_facts(heads: Mapping[str, Any]) -> dict[str, str]:
    """λ, γ and the form of Σ of each head."""
    facts = {}
    for name, head in heads.items():
        facts[name] = (
            f"{head.num_classes} prototypes of {head.in_features} features, {head.kind}, "
            f"λ = {float(head.metric.lmbda.detach().abs()):.4g}, γ = {float(head.gamma().detach()):.4g}"
        )
    return facts
