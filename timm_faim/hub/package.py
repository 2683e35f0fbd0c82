"""The folder that is published: weights, config, card, options, training table, the metric's picture.

It is built whole in a folder of its own, from a run of train_faim.py or any folder with config.json and
model.safetensors, and opened with timm before anything is uploaded.
"""
import json
import re
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
from timm.models import get_pretrained_cfg
from torch import nn

from timm_faim.head import faim_heads
from timm_faim.hub.card import CARD, Facts, write_card
from timm_faim.models.documents import read_json, read_yaml
from timm_faim.models.saved import check_config
from timm_faim.training.checkpoint import LAST, TIMM_NAME, save_config, save_weights
from timm_faim.training.errors import UserError
from timm_faim.training.flags import build_parser
from timm_faim.training.reporting.distances import HeadDistances
from timm_faim.training.reporting.heads import draw_head
from timm_faim.training.summary import read_summary

CONFIG, ARGS, SUMMARY, EVALUATION = "config.json", "train_args.yaml", "summary.csv", "eval.json"
CURVE, PICTURE = "learning_curve.png", "metric.png"
FILES = (TIMM_NAME, CONFIG, CARD, ARGS, SUMMARY, EVALUATION, CURVE, PICTURE)  # all that is ever published

# Options whose values are names of timm's or of ours, never a place on the machine that trained. Numbers, switches and
# options with choices are public too; anything else is not published.
_PUBLIC_WORDS = ("model", "opt", "aa", "gp", "interpolation", "train_interpolation", "input_img_mode", "torchcompile",
                 "eval_metric", "kd_model_name", "train_split", "val_split", "dataset")
_PUBLIC_GROUPS = ("faim_cfg", "opt_kwargs", "model_kwargs", "contrastive", "freeze")
_WORD = re.compile(r"(?:[\w*+:-][\w.*:+-]*)?")  # a name; with a slash it may be a relative path
_EVALUATED = ("metrics", "num_classes", "versions")  # of eval.json
_ELSEWHERE = ("local-dir:", "file:")


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
    """

    repo_id: str
    license: str | None = None
    datasets: Sequence[str] = ()
    dataset_name: str = ""
    base_model: str | None = None
    label_descriptions: Mapping[str, str] = field(default_factory=dict)

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
        UserError: the run has no usable config or weights, or does not open.
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
    config = read_config(run)
    config.setdefault("model_args", {}).pop("num_classes", None)  # transformers' wrapper of timm passes its own
    cfg = config["pretrained_cfg"]
    for key in ("origin_url", "paper_ids", "paper_name", "description", "notes", "hf_hub_id", "file", "source"):
        cfg.pop(key, None)  # of the base model, or of the machine
    cfg["custom_load"] = False
    for key, value in (("license", release.license), ("tag", release.tag)):
        cfg.pop(key, None)  # of the base model
        if value:
            cfg[key] = value
    if release.label_descriptions:
        config["label_descriptions"] = dict(release.label_descriptions)

    weights = _weights(run)
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(weights, folder / TIMM_NAME)
    args = _options(run)
    if args:
        (folder / ARGS).write_text(yaml.safe_dump(public_options(args), sort_keys=False), encoding="utf-8")
    for name in (SUMMARY, CURVE):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    if (run / "eval" / EVALUATION).is_file():
        _copy_without_paths(run / "eval" / EVALUATION, folder / EVALUATION)

    model = open_folder(folder)
    rows = read_summary(folder / SUMMARY)
    heads = faim_heads(model)
    _picture(run, folder / PICTURE, heads, rows)
    base_model, base_license = (release.base_model, None) if release.base_model else _base_model(args)
    write_card(folder, Facts(
        repo_id=release.repo_id, license=release.license, datasets=list(release.datasets),
        dataset_name=release.dataset_name or _dataset_of(args), base_model=base_model, base_license=base_license,
        config=config, rows=rows, metrics=_metrics(folder, rows), head=_head_facts(heads),
        parameters=sum(p.numel() for p in model.parameters()), files=sorted(p.name for p in folder.iterdir())))
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
        raise UserError(f"{folder} does not open with timm: {' '.join(str(e).split())[:500]}") from e
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


def _weights(run: Path) -> Path:
    path = run / TIMM_NAME
    try:
        with safe_open(path, framework="pt") as weights:
            weights.keys()
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot read the weights {path}: {e}. Only safetensors are published") from e
    return path


def _options(run: Path) -> dict[str, Any]:
    for path in (run / "args.yaml", run / ARGS):
        if path.is_file():
            try:
                found = read_yaml(path)
            except (OSError, ValueError) as e:
                raise UserError(f"cannot read {path}: {e}. Mend it, or remove it to publish without options") from e
            return found if isinstance(found, dict) else {}
    return {}


def public_options(args: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are known to say nothing of the machine that trained.

    Numbers and switches, words that one of a few choices is, and names in the options that hold names; of groups of
    options the same within.
    """
    choices = {a.dest: a.choices for a in build_parser()._actions if a.choices}
    public = {}
    for key, value in args.items():
        if key in _PUBLIC_GROUPS:
            if (kept := _public_part(value)) is not None:
                public[key] = kept
        elif isinstance(value, str):
            if value in choices.get(key, ()) or key in _PUBLIC_WORDS and _is_name(value):
                public[key] = value
        elif _is_number(value) or isinstance(value, list) and all(map(_is_number, value)):
            public[key] = value
    return public


def _public_part(value: Any) -> Any:
    """Of a nested value what is public; None for nothing."""
    if isinstance(value, dict):
        parts = {key: _public_part(item) for key, item in value.items() if isinstance(key, str) and _is_name(key)}
        return {key: part for key, part in parts.items() if part is not None}
    if isinstance(value, list):
        return [part for part in map(_public_part, value) if part is not None]
    return value if _is_number(value) or isinstance(value, str) and _is_name(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _is_name(value: str) -> bool:
    return _WORD.fullmatch(value) is not None and not value.startswith((".", *_ELSEWHERE)) and len(value) <= 100


def _copy_without_paths(source: Path, path: Path) -> None:
    try:
        facts = read_json(source)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {source}: {e}. Evaluate the run again with --eval-only") from e
    facts = facts if isinstance(facts, dict) else {}
    kept = {key: value for key, value in facts.items() if key in _EVALUATED}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _dataset_of(args: Mapping[str, Any]) -> str:
    """A name for the card: of --dataset what is no path, else the last part of the data folder's name."""
    name = str(args.get("dataset") or "")
    kind, _, rest = name.partition("/")
    if name and _is_name(name) and not rest.startswith("/"):
        return name
    place = rest if name else str(args.get("data_dir") or "")
    return Path(place.rstrip("/\\").replace("\\", "/")).name or kind or "image folder"


def _base_model(args: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Hub identifier and licence of the weights that the run began from."""
    if not args.get("pretrained") or ":" in str(args.get("model")):
        return None, None
    cfg = get_pretrained_cfg(str(args.get("model")), allow_unregistered=True)
    return (cfg.hf_hub_id.partition("@")[0], cfg.license) if cfg is not None and cfg.hf_hub_id else (None, None)


def _metrics(folder: Path, rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Of the evaluation at the run's end, else of the best epoch; per cent."""
    path = folder / EVALUATION
    if path.exists():
        metrics = json.loads(path.read_text(encoding="utf-8")).get("metrics", {})
        return {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
    key = "eval_map" if any(row.get("eval_map") for row in rows) else "eval_top1"  # several labels an image, or one
    scored = [row for row in rows if row.get(key)]
    if not scored:
        return {}
    best = max(scored, key=lambda row: float(row[key]))
    return {key.removeprefix("eval_"): float(value) for key, value in best.items() if key.startswith("eval_") and value}


def _head_facts(heads: Mapping[str, Any]) -> dict[str, str]:
    """λ, γ and the form of Σ of each head."""
    facts = {}
    for name, head in heads.items():
        words = [f"{head.num_classes} prototypes of {head.in_features} features",
                 f"{'full' if head.full_sigma else 'diagonal'} Σ",
                 f"λ = {float(head.metric.lmbda.detach().abs()):.4g}", f"γ = {float(head.gamma().detach()):.4g}"]
        words += [f"on the {head.space}"] * (not head.is_flat) + ["class prior"] * (head.prior is not None)
        facts[name] = ", ".join(words)
    return facts
