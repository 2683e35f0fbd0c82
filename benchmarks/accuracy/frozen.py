"""Does FAIM help on frozen features? Few-shot and full data sets, without training and with trained heads.

    python benchmarks/accuracy/frozen.py --weights FILE --data NAME=DIR ... --output results/frozen.jsonl

Each run is one JSON line: its ``config`` (method, data set, shots, …), seed, chosen options, top-1 and ECE on the
validation images, hash of the data, versions. Runs whose config and seed the file already has are skipped. Protocol:

* cuts of 1, 3, 5 images a class (the seed draws them) and all images (the seed draws folds and batches only);
* closed form: options by cross-validation on the training images, see ``closed_form.py``; with ``support: views`` the
  augmented views count as further training images, which gives even a single image a class a within-class covariance;
* trained: ``--trials`` settings from the same Sobol points, chosen on a quarter of each class of the training images of
  seed 0 (1 shot: the setting of 3 shots), then each seed once on the validation images, see ``trained.py``.

Nothing is chosen on validation images.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import closed_form
import sklearn
import timm
import torch
import trained
from features import FrozenFeatures, cut, data_arguments, frozen_features, named_folders
from measures import measures
from torch import Tensor

import timm_faim

SHOTS = (3, 5, None, 1)  # None: all images; 1 comes last, as it takes the setting chosen for 3
VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "timm": timm.__version__,
    "scikit-learn": sklearn.__version__,
    "timm_faim": timm_faim.__version__,
}
PER_CLASS_SHRINKAGE = "lda_ledoit_wolf"  # by far the slowest; deterministic


def selection_split(targets_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(training, selection) indices: a quarter of each class, at least one image, is for selection."""
    order = torch.randperm(len(targets_N), generator=torch.Generator().manual_seed(1000 + seed))
    held = torch.zeros(len(targets_N), dtype=torch.bool)
    for label in targets_N.unique():
        members = order[targets_N[order] == label]
        held[members[: max(1, round(len(members) / 4))]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


class Log:
    """The JSON lines, and which runs they hold."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.done = {self._key(row["config"], row["seed"]): row for row in self.rows}

    @staticmethod
    def _key(config: dict, seed: int) -> str:
        return json.dumps([config, seed], sort_keys=True)

    def find(self, config: dict, seed: int) -> dict | None:
        return self.done.get(self._key(config, seed))

    def add(self, config: dict, seed: int, **values) -> None:
        row = {"config": config, "seed": seed, **values, "versions": VERSIONS}
        self.done[self._key(config, seed)] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def images_with_views(data: FrozenFeatures, views: bool) -> Tensor:
    """Training features [V, N, D], the centre crop first."""
    crop = data.train_ND[None]
    return torch.cat([crop, data.views_VND]) if views else crop


def run_closed_form(name: str, data: FrozenFeatures, shots: int | None, support: str, log: Log, seeds: int) -> None:
    classes = int(data.train_N.max()) + 1
    features = images_with_views(data, support == "views")
    for seed in range(seeds):
        configs = {
            method: dict(regime="closed form", method=method, data=name, shots=shots or "all", support=support)
            for method in closed_form.METHODS
            if method != PER_CLASS_SHRINKAGE or (shots is None and seed == 0)
        }
        missing = [method for method, config in configs.items() if not log.find(config, seed)]
        if not missing:
            continue
        index = cut(data.train_N, shots, seed)
        results = closed_form.run(features[:, index], data.train_N[index], data.val_ND, classes, seed, missing)
        for method, (logits, options, calibrated) in results.items():
            got = measures(logits, data.val_N)
            if not calibrated:  # nothing to set a temperature by
                got["ece"] = None
            log.add(configs[method], seed, chosen=options, **got, data_hash=data.data_hash)


def choose(method: str, splits: tuple, trials: int, steps: int) -> tuple[dict[str, float], float]:
    """The setting with the best accuracy on the selection images (the first of equals), and that accuracy."""
    part, x, y = splits
    scores = []
    for setting in trained.sobol_settings(method, trials):
        head = trained.train(method, part, setting, 0, steps)
        with torch.no_grad():
            scores.append((head(part.transform(method, x)).argmax(1) == y).float().mean().item())
    best = max(range(trials), key=lambda i: scores[i])
    return trained.sobol_settings(method, trials)[best], scores[best]


def run_trained(name: str, data: FrozenFeatures, shots: int | None, log: Log, args: argparse.Namespace) -> None:
    classes = int(data.train_N.max()) + 1
    features = images_with_views(data, True)

    def config(method: str, count: int | None) -> dict:
        return dict(
            regime="trained",
            method=method,
            data=name,
            shots=count or "all",
            support="views",
            trials=args.trials,
            steps=args.steps,
        )

    todo = [m for m in trained.SPACES if not all(log.find(config(m, shots), s) for s in range(args.seeds))]
    if not todo:
        return
    chosen: dict[str, tuple[dict, float]] = {}
    if shots == 1:
        for method in todo:
            row = log.find(config(method, 3), 0)
            chosen[method] = row["chosen"], row["selection_top1"]
    else:
        index = cut(data.train_N, shots, 0)
        kept, held = (index[part] for part in selection_split(data.train_N[index], 0))
        part = trained.TrainingSet.of(features[:, kept], data.train_N[kept], classes)
        for method in todo:
            start = time.time()
            chosen[method] = choose(method, (part, data.train_ND[held], data.train_N[held]), args.trials, args.steps)
            print(f"{name} {shots or 'all'} {method}: {time.time() - start:.1f} s, {chosen[method]}", flush=True)
    whole: trained.TrainingSet | None = None
    for seed in range(args.seeds):
        if whole is None or shots is not None:
            index = cut(data.train_N, shots, seed)
            whole = trained.TrainingSet.of(features[:, index], data.train_N[index], classes)
        for method in todo:
            if log.find(config(method, shots), seed):
                continue
            setting, selection = chosen[method]
            head = trained.train(method, whole, setting, seed, args.steps)
            with torch.no_grad():
                got = measures(head(whole.transform(method, data.val_ND)), data.val_N)
            log.add(
                config(method, shots), seed, chosen=setting, selection_top1=selection, **got, data_hash=data.data_hash
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("results/frozen.jsonl"))
    parser.add_argument("--closed-form-only", nargs="*", default=[], metavar="NAME", help="data sets without training")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    log = Log(args.output)
    sets = {}
    for name, folder in named_folders(args.data).items():
        views = 0 if name in args.closed_form_only else args.views
        sets[name] = frozen_features(name, folder, args.weights, args.cache, views)
    for name, data in sets.items():
        for shots in SHOTS:
            for support in ("centre", "views") if data.views_VND is not None else ("centre",):
                start = time.time()
                run_closed_form(name, data, shots, support, log, args.seeds)
                print(f"{name} {shots or 'all'} {support}: closed form in {time.time() - start:.1f} s", flush=True)
    for name, data in sets.items():
        if data.views_VND is not None:
            for shots in SHOTS:
                run_trained(name, data, shots, log, args)


if __name__ == "__main__":
    sys.exit(main())
