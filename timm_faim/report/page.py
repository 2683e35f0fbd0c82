"""The report of a run: one HTML page that needs nothing beside it, and its pictures as files."""

import base64
import html
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from timm_faim import FAIMHead, faim_heads
from timm_faim.documents import read_yaml
from timm_faim.images.pictures import Pictures, head_features
from timm_faim.models.moments import branch_of
from timm_faim.report import examples as examples_of
from timm_faim.report import heads as head_pictures
from timm_faim.report import page_style, plots
from timm_faim.report.distances import Geometry, HeadDistances
from timm_faim.report.evaluation import Evaluation
from timm_faim.report.names import class_name
from timm_faim.run.files import atomic_write

SHARE_SAMPLE = 256  # validation images on which the share of the 1-form is measured
FOLDER, PAGE = "report", "report.html"


def write_report(
    run_folder: Path,
    model: nn.Module,
    history: Sequence[Mapping[str, Any]],
    *,
    label_names: Sequence[str] | None = None,
    evaluation: Evaluation | None = None,
    train_images: Any = None,
    val_images: Any = None,
    options: Path | None = None,
) -> Path | None:
    """Write report.html and report/*.png into the run folder; for the main process alone.

    Args:
        run_folder: of the run.
        model: the bare model (not prepared, not compiled), any timm model; without FAIM heads their sections are
            left out. It runs on its device and is left in its mode.
        history: one mapping an epoch, as in summary.csv, see `draw_learning_curve`; may be empty.
        label_names: class names in the order of their indices.
        evaluation: of `collect`, from this model on the images of `val_images`.
        train_images, val_images: timm's evaluation loaders without augmentation (`build_fit_loader` and the
            validation loader). They are read by index, whatever their sharding; for iterable data, or without them,
            the sections with pictures of images are left out.
        options: the run's args.yaml.

    Returns:
        The page; None where matplotlib is missing.
    """
    if not plots.has_matplotlib():
        return None
    folder = run_folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(folder)
    train, val = Pictures.of(train_images), Pictures.of(val_images)
    started = time.perf_counter()

    if evaluation is not None:
        page.add_cards(evaluation)
    curve = run_folder / "learning_curve.png"
    if curve.is_file() or plots.draw_learning_curve(curve, history):
        page.add_section("Learning curves")
        page.add_picture(
            curve,
            f"Loss, top-1 accuracy and, where recorded, learning rates over the epochs. {_last_epoch(history)}",
            "The training numbers are measured during the epoch, on augmented images.",
        )
    if evaluation is not None and len(evaluation.index):
        _add_evaluation(page, evaluation, label_names, run_folder / "eval")
        pairs = folder / "confused_pairs.png"
        if val is not None and examples_of.draw_pairs(pairs, evaluation, val, label_names):
            page.add_section("Most confused pairs")
            page.add_picture(
                pairs,
                "Pairs of images of the classes that are confused most often.",
                "A red frame marks an image that was taken for the other class of its pair.",
            )
    heads = faim_heads(model)
    if heads:
        _add_heads(page, model, heads, history, evaluation, train, val, label_names)
    if options is not None:
        page.add_section("Options")
        page.add_options(options)

    path = run_folder / PAGE
    with atomic_write(path) as temporary:
        temporary.write_text(page.render(run_folder.resolve().name, time.perf_counter() - started), encoding="utf-8")
    return path


def _last_epoch(history: Sequence[Mapping[str, Any]]) -> str:
    words = [f"{key} {history[-1][key]}" for key in ("train_loss", "eval_loss", "eval_top1") if history[-1].get(key)]
    return f"In the last epoch: {', '.join(words)}." if words else ""


def _add_evaluation(page: "Page", evaluation: Evaluation, label_names: Sequence[str] | None, drawn: Path) -> None:
    """The folder `drawn` is that of `write_evaluation`, which may hold the pictures already."""
    page.add_section("Confusion and calibration")
    drawn = drawn if (drawn / "confusion.png").is_file() else page.folder
    if drawn == page.folder:
        plots.draw_confusion(drawn / "confusion.png", evaluation, label_names)
        plots.draw_calibration(drawn / "calibration.png", evaluation)
    shown = len(plots.shown_classes(evaluation))
    page.add_picture(
        drawn / "confusion.png",
        f"Confusion matrix of {shown} of {evaluation.num_classes} classes; "
        f"{evaluation.metrics()['top1']:.2f} % of all images lie on the diagonal.",
        "Rows are true classes, columns predictions; the colours follow the square root so that rare confusions show.",
    )
    page.add_picture(
        drawn / "calibration.png",
        f"Reliability diagram; expected calibration error {evaluation.ece():.2f} % over 15 bins.",
        "Bars below the diagonal: surer than right. Bars above it: righter than sure.",
    )
    weakest = evaluation.weakest_classes(10)
    page.add_table(
        "Weakest classes",
        ["class", "images", "right", "accuracy"],
        [
            [
                class_name(label_names, k),
                evaluation.samples_per_class[k],
                evaluation.correct_per_class[k],
                f"{100 * evaluation.correct_per_class[k] / evaluation.samples_per_class[k]:.1f} %",
            ]
            for k in weakest
        ],
    )
    page.add_table(
        "Most confused pairs",
        ["a", "b", "a taken for b", "b taken for a"],
        [
            [
                class_name(label_names, c.a),
                class_name(label_names, c.b),
                f"{c.a_as_b} of {evaluation.samples_per_class[c.a]}",
                f"{c.b_as_a} of {evaluation.samples_per_class[c.b]}",
            ]
            for c in evaluation.most_confused(10)
        ],
    )


@dataclass(frozen=True)
class _Seen:
    """What the heads got for some images of the validation data."""

    positions: np.ndarray  # in the evaluation [N]
    spread: np.ndarray  # those among them that were not chosen by what was predicted [N]
    features: dict[str, torch.Tensor]  # by head, [N, D]


def _add_heads(
    page: "Page",
    model: nn.Module,
    heads: Mapping[str, FAIMHead],
    history: Sequence[Mapping[str, Any]],
    evaluation: Evaluation | None,
    train: Pictures | None,
    val: Pictures | None,
    label_names: Sequence[str] | None,
) -> None:
    examples = np.empty(0, dtype=np.int64)
    seen = _Seen(examples, examples, {})
    if evaluation is not None and len(evaluation.index) and val is not None:
        examples = examples_of.choose_examples(evaluation)
        N = len(evaluation.index)
        spread = np.linspace(0, N - 1, min(N, SHARE_SAMPLE)).round().astype(np.int64)
        positions = np.unique(np.concatenate([examples, spread]))
        seen = _Seen(positions, np.isin(positions, spread), head_features(model, val, evaluation.index[positions])[0])

    page.add_section("FAIM heads" if len(heads) > 1 else "FAIM head")
    rows = []
    for number, (name, head) in enumerate(heads.items()):
        distances = HeadDistances(head)
        geometry, shares = distances.geometry(), None
        if name in seen.features:
            riemannian, form = distances.parts(
                seen.features[name], torch.from_numpy(evaluation.prediction[seen.positions])
            )
            shares = (100 * form / (riemannian + form)).numpy()
        rows.append(_head_row(name, head, geometry, shares))
        suffix = f"_{name}" if len(heads) > 1 else ""
        file = page.folder / f"head{number if len(heads) > 1 else ''}.png"
        if head_pictures.draw_head(file, geometry, history, suffix, shares):
            share = (
                ""
                if shares is None or not geometry.has_one_form
                else (f"; share of the 1-form in the distance {shares.mean():.2f} % on average")
            )
            page.add_picture(
                file,
                f"Head {name}: λ = {geometry.lmbda:.4g}, γ = {geometry.gamma:.4g}{share}.",
                f"Head <code>{html.escape(name)}</code>.",
            )
    columns = ["head", "features", "classes", "metric", "γ", "condition of Σ"]
    if any(row[6] != "0" for row in rows):
        columns += ["λ", "λ √(βᵀΣ⁻¹β)", "1-form's share of the distance"]
    page.add_table("Heads", columns, [row[: len(columns)] for row in rows])
    for name, head in heads.items():
        if len(head.parts) > 1 and name in seen.features:
            _add_parts(page, model, name, head, seen, evaluation.target[seen.positions])

    reached = [name for name in heads if name in seen.features]
    if train is None or not reached:
        return
    # of several heads the first: they share what the images look like
    name = reached[0]
    distances = HeadDistances(heads[name])
    shown = examples_of.Examples.of(
        examples, seen.features[name][np.searchsorted(seen.positions, examples)], distances, evaluation
    )
    classes = sorted({*evaluation.prediction[examples].tolist(), *shown.rivals.tolist()})
    pool = examples_of.choose_pool(train.targets(), len(train), classes)
    features, labels = head_features(model, train, pool)
    typical = examples_of.typical_images(distances, features.get(name), pool, labels, classes)
    picture = page.folder / "prototypes.png"
    if examples_of.draw_examples(picture, shown, evaluation, distances, typical, train, val, label_names):
        wrong = int((~evaluation.correct[examples]).sum())
        page.add_section("Predictions and their prototypes")
        page.add_picture(
            picture,
            f"{len(examples)} validation images, {wrong} of them predicted wrongly, beside typical "
            "training images of the classes and the distances to their prototypes.",
            f"Left the validation image under its true class. Then, of {len(pool)} training images, those of the "
            "predicted class that lie nearest to its prototype, and those of the true class where the prediction is "
            "wrong, else of the next best class; below each its distance. Right the image's own distance to both "
            "prototypes"
            + " in its two parts" * distances.geometry().has_one_form
            + (f", in head <code>{html.escape(name)}</code>." if len(heads) > 1 else "."),
        )


def _add_parts(page: "Page", model: nn.Module, name: str, head: FAIMHead, seen: _Seen, target: np.ndarray) -> None:
    """What the parts of a head's features do by themselves."""
    x, classes = (t[torch.from_numpy(seen.spread)] for t in (seen.features[name], torch.from_numpy(target)))
    branch = branch_of(model)
    names = ["pooled features", *(f"moments of {stage.name}" for stage in (branch.stages if branch else ()))]
    names += [f"part {i + 1}" for i in range(len(names), len(head.parts))]
    right = HeadDistances(head).parts_right(x, classes)
    rows = zip(
        [*names, "together"], [*head.parts, head.in_features], [*head.part_weights.tolist(), 1.0], right, strict=True
    )
    page.add_table(
        f"What each part of the features says alone, head {name}: {len(x)} validation images",
        ["part", "features", "weight", "right"],
        [[part, width, f"{weight:.2f}", f"{share:.1f} %"] for part, width, weight, share in rows],
    )


def _head_row(name: str, head: FAIMHead, geometry: Geometry, shares: np.ndarray | None) -> list[str]:
    return [
        name or "(model)",
        str(head.in_features),
        str(head.num_classes),
        head.kind,
        f"{geometry.gamma:.4g}",
        f"{geometry.condition:.3g}",
        f"{geometry.lmbda:.4g}",
        f"{geometry.strongest:.3g}",
        "–" if shares is None else f"{shares.mean():.2f} %",
    ]


class Page:
    """Collects the sections of the page. Captions are HTML, everything else is escaped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.body: list[str] = []

    def add_section(self, title: str) -> None:
        """A heading."""
        self.body.append(f"<h2>{html.escape(title)}</h2>")

    def add_cards(self, evaluation: Evaluation) -> None:
        """The final numbers in large."""
        metrics = evaluation.metrics()
        rate = metrics["images_per_s"]
        cards = [
            (f"{metrics['top1']:.2f} %", "top-1"),
            (f"{metrics['top5']:.2f} %", "top-5"),
            (f"{metrics['mean_class_top1']:.2f} %", "mean over classes"),
            (f"{metrics['loss']:.4f}", "loss"),
            (f"{metrics['ece']:.2f} %", "calibration error"),
            (f"{metrics['samples']}", "validation images"),
            *([(f"{rate:.0f}", "images/s")] if rate else []),
        ]
        self.body.append(
            '<div class="cards">'
            + "".join(
                f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for value, name in cards
            )
            + "</div>"
        )

    def add_picture(self, path: Path, alt: str, caption: str = "") -> None:
        """A PNG, embedded."""
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        caption = f"<figcaption>{caption}</figcaption>" if caption else ""
        self.body.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(alt.strip())}">{caption}</figure>'
        )

    def add_table(self, title: str, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table, where it has rows."""
        if not rows:
            return
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
        self.body.append(
            f'<div class="scroll"><table><caption>{html.escape(title)}</caption><thead><tr>{head}</tr>'
            f"</thead><tbody>{body}</tbody></table></div>"
        )

    def add_options(self, path: Path) -> None:
        """A file of `key: value` lines as a table; of any other, what is wrong with it."""
        try:
            options = read_yaml(path)
        except (OSError, ValueError) as e:
            options = f"{path.name} cannot be read: {e}"
        if not isinstance(options, dict):
            self.body.append(f"<pre>{html.escape(str(options))}</pre>")
            return
        pairs = "".join(
            f"<div><dt>{html.escape(str(key))}</dt><dd>{html.escape(_option(value))}</dd></div>"
            for key, value in options.items()
        )
        self.body.append(f"<details open><summary>{len(options)} options</summary><dl>{pairs}</dl></details>")

    def render(self, title: str, seconds: float) -> str:
        """The whole page."""
        return page_style.PAGE.format(
            title=html.escape(title),
            style=page_style.STYLE,
            body="\n".join(self.body),
            date=time.strftime("%Y-%m-%d %H:%M"),
            seconds=f"{seconds:.1f}",
        )


def _option(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items()) or "–"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "–"
    return "–" if value in ("", None) else str(value).lower() if isinstance(value, bool) else str(value)
