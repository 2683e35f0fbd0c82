"""`timm-faim retrieve`: Recall@K, mAP@R and NMI of a model's distance, beside Euclidean and cosine."""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_input_data_config

from timm_faim import FAIMHead
from timm_faim.report.tables import versions
from timm_faim.retrieval import Ranking, clustering_nmi, distances_of, rank
from timm_faim.retrieval.images import Images, open_folder, open_model, read_images
from timm_faim.retrieval.sheet import Tile, choose_rows, draw_sheet
from timm_faim.run.errors import UserError, few
from timm_faim.run.files import atomic_write, check_writable
from timm_faim.run.opening import choose_device

RESULT, SHEET = "retrieval.json", "neighbours.png"
NEIGHBOURS = 8  # of a row of the sheet
RESTARTS = 3  # of the clustering
DIRECTION = "d_F(query, gallery) = F(query - gallery)"


@dataclass(frozen=True)
class Task:
    """Queries and gallery, the same images where one is left out, with labels of one numbering of the classes."""

    query: Images
    gallery: Images
    classes: list[str]

    @property
    def leaves_one_out(self) -> bool:
        """Whether the queries are the gallery."""
        return self.query is self.gallery

    @property
    def others(self) -> int:
        """Gallery images that a query is compared with."""
        return len(self.gallery) - self.leaves_one_out

    @property
    def neighbours(self) -> int:
        """Neighbours of a row of the sheet."""
        return min(NEIGHBOURS, self.others)


def retrieve(args: argparse.Namespace) -> dict[str, Any]:
    """One retrieval, from the options to the files; what retrieval.json says.

    Raises:
        UserError: wrong input.
    """
    _check(args)
    device = choose_device(args.device)
    folder = _output_folder(args)
    model, head = open_model(args.checkpoint)
    task = _read(args, model.to(device), head, device)
    without = _say_what_is_compared(task)
    if not head.metric.symmetric:
        print(f"the metric is directed (Randers): {DIRECTION}")

    results, faim = _compare(args, task, head, device)
    facts = {
        "checkpoint": args.checkpoint,
        "architecture": (model.pretrained_cfg or {}).get("architecture"),
        "gallery": args.gallery,
        "queries": args.queries,
        "leave_one_out": task.leaves_one_out,
        "gallery_images": len(task.gallery),
        "query_images": len(task.query),
        "gallery_classes": len(set(task.gallery.class_names)),
        "query_classes": len(set(task.query.class_names)),
        "queries_without_positives": without,
        "features": head.in_features,
        "symmetric": head.metric.symmetric,
        "direction": DIRECTION,
        "amp": args.amp,
        "nmi": {"clusters": len(set(task.query.class_names)), "restarts": RESTARTS, "seed": args.seed},
        "unit": "per cent",
        "results": results,
        "versions": versions(),
    }
    with atomic_write(folder / RESULT) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table_lines(results)))
    written = [folder / RESULT]
    if not args.no_sheet:
        written.append(folder / SHEET)
        _draw(written[-1], task, faim, args)
    print(f"written: {', '.join(map(str, written))}")
    return facts


def table_lines(results: dict[str, dict[str, float]]) -> list[str]:
    """Results in per cent by distance and metric, as lines of a table."""
    columns = list(next(iter(results.values())))
    lines = [" ".join([f"{'in %':<10}", *(f"{name:>9}" for name in columns)])]
    return lines + [
        " ".join([f"{name:<10}", *(f"{row[key]:>9.2f}" for key in columns)]) for name, row in results.items()
    ]


def _compare(
    args: argparse.Namespace, task: Task, head: FAIMHead, device: torch.device
) -> tuple[dict[str, dict[str, float]], Ranking]:
    """Metrics in per cent by distance, and the ranking under FAIM."""
    device = device if device.type == "cuda" else torch.device("cpu")  # float64, which other devices may lack
    labels = [images.labels(task.classes).to(device) for images in (task.query, task.gallery)]
    features = [images.features_ND.to(device, torch.float64) for images in (task.query, task.gallery)]
    results, rankings = {}, {}
    for distance in distances_of(head, device):
        query_QD, gallery_ND = (distance.embed(x) for x in features)
        found = rank(
            query_QD,
            labels[0],
            gallery_ND,
            labels[1],
            distance.between,
            args.recall_at,
            task.neighbours,
            task.leaves_one_out,
        )
        nmi = clustering_nmi(query_QD, labels[0], distance, RESTARTS, args.seed)
        scores = {f"Recall@{k}": share for k, share in found.recall().items()} | {"mAP@R": found.map_at_r(), "NMI": nmi}
        results[distance.name] = {key: round(100 * share, 4) for key, share in scores.items()}
        rankings[distance.name] = found
    return results, rankings["FAIM"]


def _read(args: argparse.Namespace, model: torch.nn.Module, head: FAIMHead, device: torch.device) -> Task:
    """Both folders; what has no answer is refused before the model runs, and again without unreadable images."""
    config = resolve_input_data_config(model)
    folders = [
        open_folder(place, flag, config["input_size"][0], args.skip_unreadable)
        for place, flag in ((args.gallery, "DIR"), (args.queries, "--queries"))
        if place is not None
    ]
    _refuse(args, folders[-1].class_names, folders[0].class_names)
    images = [
        read_images(folder, model, head, config, device, batch_size=args.batch_size, workers=args.workers, amp=args.amp)
        for folder in folders
    ]
    query, gallery = images[-1], images[0]
    _refuse(args, query.class_names, gallery.class_names)
    return Task(query, gallery, sorted({*gallery.class_names, *query.class_names}))


def _refuse(args: argparse.Namespace, query: list[str], gallery: list[str]) -> None:
    """Refuse what has no answer, given the class of each image."""
    leaves_one_out, known = args.queries is None, Counter(gallery)
    others = len(gallery) - leaves_one_out
    if not gallery or not query:
        raise UserError(
            f"none of the images of {args.queries if gallery else args.gallery} can be read. Check the files"
        )
    if len(known) < 2:
        raise UserError(
            f"DIR {args.gallery} has one class ({few(sorted(known))}), where every neighbour is right. "
            "Give a folder with one folder of images per class, at least two"
        )
    if not any(_positives(query, gallery, leaves_one_out)):
        if leaves_one_out:
            raise UserError(
                f"every class of DIR {args.gallery} has a single image, so that no query has another one "
                "of its class. Add images, or give the queries with --queries"
            )
        raise UserError(
            f"--queries {args.queries} and DIR {args.gallery} have no class in common (queries: "
            f"{few(sorted(set(query)))}; gallery: {few(sorted(known))}). Name the class folders alike"
        )
    if max(args.recall_at) > others:
        raise UserError(
            f"Recall@{max(args.recall_at)} needs as many gallery images for a query, and there are "
            f"{others}. Give smaller numbers with --recall-at, or more images"
        )


def _positives(query: list[str], gallery: list[str], leaves_one_out: bool) -> list[int]:
    """Gallery images of each query's class, besides itself."""
    counts = Counter(gallery)
    return [counts[name] - leaves_one_out for name in query]


def _say_what_is_compared(task: Task) -> int:
    """Lines for the terminal; the number of queries without positives."""
    query, gallery = task.query.class_names, task.gallery.class_names
    for images, what in ((task.gallery, "gallery"), (task.query, "queries"))[: 2 - task.leaves_one_out]:
        if images.unreadable:
            print(f"{images.unreadable} images of the {what} cannot be read and are left out")
    how = (
        "each against all others"
        if task.leaves_one_out
        else (f"against {len(gallery)} gallery images of {len(set(gallery))} classes")
    )
    print(f"{len(query)} queries of {len(set(query))} classes, {how}")
    positives = _positives(query, gallery, task.leaves_one_out)
    alone = [name for name, count in zip(query, positives, strict=True) if not count]
    if alone:
        why = "with a single image" if task.leaves_one_out else "that the gallery lacks"
        print(
            f"{len(alone)} queries have no positives and are left out of Recall and mAP@R: those of "
            f"{len(set(alone))} classes {why} ({few(sorted(set(alone)))})"
        )
    return len(alone)


def _draw(path: Path, task: Task, faim: Ranking, args: argparse.Namespace) -> None:
    labels_N = task.gallery.labels(task.classes).cpu()
    right_QK = (labels_N[faim.first_QK.cpu()] == task.query.labels(task.classes).cpu()[:, None]).numpy()
    first_QK = faim.first_QK.cpu().numpy()

    def tile(images: Images, i: int, right: bool | None = None) -> Tile:
        return Tile(images.pictures[images.numbers[i]], images.class_names[i], right)

    def row(i: int) -> list[Tile]:
        neighbours = zip(first_QK[i].tolist(), right_QK[i].tolist(), strict=True)
        return [tile(task.query, i), *(tile(task.gallery, n, right) for n, right in neighbours)]

    random, wrong = choose_rows((faim.positives_Q > 0).cpu().numpy(), right_QK[:, 0], args.sheet_rows, args.seed)
    sections = [
        (f"queries at random, and their {task.neighbours} nearest under FAIM", [row(i) for i in random]),
        ("queries whose nearest image is of another class", [row(i) for i in wrong]),
    ]
    draw_sheet(path, sections, task.neighbours)


def _check(args: argparse.Namespace) -> None:
    if args.queries is not None and Path(args.queries).resolve() == Path(args.gallery).resolve():
        raise UserError(
            f"--queries {args.queries} is the gallery itself, where each image would find itself. Leave "
            "--queries out: then each image is compared with all others"
        )
    if find_spec("sklearn") is None:
        raise UserError("NMI needs scikit-learn: pip install 'timm-faim[metric]'")


def _output_folder(args: argparse.Namespace) -> Path:
    run_folder = Path(args.checkpoint.removeprefix("local-dir:"))
    folder = args.output or (run_folder / "retrieval" if run_folder.is_dir() else Path("retrieval"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror}. Choose another --output") from e
    return check_writable(folder)
