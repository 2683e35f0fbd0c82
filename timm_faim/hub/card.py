"""The model card: what a visitor of the repository reads, and the metadata that the Hub reads."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import PretrainedCfg

from timm_faim.run.record import record_of
from timm_faim.version import __version__

CARD = "README.md"
_SHOWN_ROWS = 12  # of the training table
# Metric of summary.csv and eval.json: name for people, per cent.
_METRICS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_class_top1": "mean per-class accuracy",
    "ece": "expected calibration error",
    "map": "mean average precision",
}
_ACCURACIES = ("top1", "top5")


@dataclass(frozen=True)
class Facts:
    """What the card tells; `metrics` in per cent, `rows` of `public_rows`, `head` by head name."""

    repo_id: str
    license: str | None
    datasets: list[str]
    dataset_name: str
    base_model: str | None
    base_license: str | None
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, str]]
    metrics: Mapping[str, float]
    head: Mapping[str, str]
    parameters: int
    files: Sequence[str]


def write_card(folder: Path, facts: Facts) -> None:
    """Write README.md."""
    card = ModelCard(f"---\n{_data(facts).to_yaml()}\n---\n\n{_text(facts)}")
    card.save(folder / CARD)


def _data(facts: Facts) -> ModelCardData:
    name = facts.repo_id.split("/")[-1]
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=facts.datasets[0] if facts.datasets else "imagefolder",
            dataset_name=facts.dataset_name,
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=_METRICS[key],
            metric_value=round(facts.metrics[key] / 100, 6),
        )
        for key in _ACCURACIES
        if key in facts.metrics
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=facts.license,
        tags=["image-classification", "timm", "faim", "timm_faim", "transformers"],
        base_model=facts.base_model,
        datasets=facts.datasets or None,
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _plain(text: str) -> str:
    """A person's words as such: one line, none of it Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#~!])", r"\\\1", " ".join(text.split()))


def _text(facts: Facts) -> str:
    architecture = facts.config["architecture"]
    cfg = facts.config["pretrained_cfg"]
    size = " × ".join(map(str, cfg.get("input_size", PretrainedCfg.input_size)))
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else ""
    base += f", licence {facts.base_license}" if facts.base_license else ""
    dataset = _plain(facts.dataset_name)
    sections = [
        f"# {facts.repo_id.split('/')[-1]}",
        f"A [timm](https://github.com/huggingface/pytorch-image-models) model, `{architecture}`, with a FAIM head: one "
        f"prototype per class, logits = −γ times the Finsler distance to it. Trained on: {dataset} "
        f"({facts.config['num_classes']} classes).",
        _table(
            ["", ""],
            [
                ["parameters", f"{facts.parameters / 1e6:.2f} M"],
                ["input", size],
                *[
                    ["FAIM head" + (f" `{name}`" if len(facts.head) > 1 else ""), text]
                    for name, text in facts.head.items()
                ],
                *([["began from", base]] if base else []),
                ["licence of the weights", facts.license or "none given"],
                ["made with", f"timm_faim {__version__}"],
            ],
        ),
        "## Classify images",
        f"```bash\npip install timm-faim\ntimm-faim predict photos/ --model hf-hub:{facts.repo_id}\n```",
        f'```python\nimport timm_faim\n\nclassifier = timm_faim.load("hf-hub:{facts.repo_id}")\n'
        'prediction = classifier("photo.jpg")  # or a list of paths, PIL images, arrays\n'
        "print(prediction.name, prediction.confidence)\n```",
        *_calibrated(facts.config),
        "## Load it",
        "The `faim_` architectures come with timm_faim (`pip install timm-faim`), which must be imported first.",
        f"```python\nimport timm\nimport timm_faim  # registers the faim_ architectures\n\n"
        f'model = timm.create_model("hf-hub:{facts.repo_id}", pretrained=True).eval()\n'
        f"config = timm.data.resolve_model_data_config(model)\n"
        f"transform = timm.data.create_transform(**config, is_training=False)\n"
        f"logits = model(transform(image).unsqueeze(0))  # a PIL image\n"
        f'print(model.pretrained_cfg["label_names"][logits.argmax()])\n```',
        "With `num_classes=N` the backbone is loaded and the head starts fresh.",
    ]
    results = [[text, f"{facts.metrics[key]:.2f} %"] for key, text in _METRICS.items() if key in facts.metrics]
    if results:
        count = f" on {int(facts.metrics['samples'])} images" if "samples" in facts.metrics else ""
        sections += ["## Results", f"Validation of {dataset}{count}.", _table(["metric", "value"], results)]
    if "metric.png" in facts.files:
        sections += ["## The metric", "![λ and γ over the epochs, the spectrum of Σ, the size of β](metric.png)"]
    if facts.rows:
        sections += ["## Training"]
        if "learning_curve.png" in facts.files:
            sections.append("![Loss, accuracy and learning rate over the epochs](learning_curve.png)")
        sections.append(_training_table(facts.rows))
        if "train_args.yaml" in facts.files:
            sections.append(
                "All options are in [train_args.yaml](train_args.yaml), every epoch in [summary.csv](summary.csv)."
            )
    return "\n\n".join(sections) + "\n"


def _calibrated(config: Mapping[str, Any]) -> list[str]:
    """What the probabilities were made on; nothing of a model that was never calibrated."""
    found = record_of(config).get("calibration")
    if not found:
        return []
    return [
        f"Probabilities are calibrated on {found['images']} {found['source']}"
        + (" images" if found["source"] == "validation" else "")
        + "; an image that is like none of the classes is called unknown, at the cost of 5 % of the others "
        "(`--unknown RATE`)."
    ]


def _training_table(rows: Sequence[Mapping[str, str]]) -> str:
    columns = [
        key
        for key in ("train_loss", "train_top1", "eval_loss", "eval_top1", "eval_top5", "train_lambda", "train_gamma")
        if any(row.get(key) for row in rows)
    ]
    step = max(1, -(-len(rows) // _SHOWN_ROWS))
    shown = [row for n, row in enumerate(rows) if (len(rows) - 1 - n) % step == 0]
    titles = ["epoch", *(key.replace("_", " ") for key in columns)]
    return _table(titles, [[str(int(row["epoch"])), *(_short(row.get(key)) for key in columns)] for row in shown])


def _short(value: str | None) -> str:
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return value or ""


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)
