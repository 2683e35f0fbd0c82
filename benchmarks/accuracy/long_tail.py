"""Unequal classes on frozen features: FAIM with shared prototypes against what others do for rare classes.

    python benchmarks/accuracy/long_tail.py --weights NAME=FILE ... --data leaf99=DIR grocery81=DIR omniglot242=DIR

Exponential tails: the class of rank r of C keeps most * imbalance^(-r / (C - 1)) images, at least one; ranks are drawn
by the seed. The parts of the features are the mean and the second moments, of whole images squashed to 160 px. Every
method chooses between its options by the class-mean accuracy of up to 3 folds of the training images; a class of one
image stays in training. Validation images choose nothing. Lines that the output has are not computed again.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from features import CACHE, named_folders
from frozen import VERSIONS
from maps import Frozen, Recipe, View, fitted_moments, second_moments
from settings import STAGES
from tables import interval, show, whence
from tail_methods import FAMILIES
from torch import Tensor

FOLDS, CONTROL = 3, "FAIM"
OURS = ("FAIM", "FAIM shared 1", "FAIM shared", "FAIM shared + prior", "FAIM + prior", "FAIM, softmax of look-alikes")
NOTE = """The number is the imbalance, most to fewest images. "With more": validation images beyond 8 a class are in
training, which is easier, since series of like images are in both. "By word": classes are the second words of the
folders' names (genus, alphabet), for imbalances that classes of at most 25 images don't have. FAIM shared 1 is
without any choice; the others chose their strengths by folds of the training images."""
COMMAND = "python benchmarks/accuracy/long_tail.py --weights NAME=FILE … --data NAME=DIR …"


@dataclass(frozen=True)
class Tail:
    """A task: ``by_word`` takes the second word of the folders' names as the class, ``kept_for_test`` images of each
    class stay for validation while the others go to training (0: as the folders say), ``most`` is the most images of a
    class (0: as many as there are), with imbalance 1 those of every class."""

    data: str
    imbalance: float = 1.0
    by_word: bool = False
    most: int = 0
    kept_for_test: int = 0

    @property
    def name(self) -> str:
        kind = " by word" * self.by_word + " with more" * bool(self.kept_for_test)
        even = f"{self.most} a class" if self.most else "as it is"
        return f"{self.data}{kind}, {even if self.imbalance == 1 else f'{self.imbalance:g}'}"


TAILS = (
    Tail("grocery81"),
    Tail("grocery81", most=3),
    Tail("grocery81", 10),
    Tail("grocery81", 25),
    Tail("grocery81", 37, kept_for_test=8),
    Tail("omniglot242"),
    Tail("omniglot242", most=3),
    Tail("omniglot242", 10),
    Tail("leaf99"),
    Tail("leaf99", most=3),
    Tail("leaf99", 6),
    Tail("leaf99", by_word=True),
    Tail("omniglot242", 50, by_word=True, most=170),
    Tail("omniglot242", 100, by_word=True, most=170),
)
BALANCED = tuple(tail.name for tail in TAILS if tail.imbalance == 1 and not tail.by_word)


class Task:
    """Images of training and validation in one list, their classes, and which are for what."""

    def __init__(self, tail: Tail, frozen: Frozen) -> None:
        self.tail, self.frozen = tail, frozen
        y = torch.cat([frozen.train_N, frozen.val_N])
        if tail.by_word:
            words = [folder.name.split("_")[1] for folder in sorted((frozen.folder / "train").iterdir())]
            numbers = {word: i for i, word in enumerate(dict.fromkeys(words))}
            y = torch.tensor([numbers[word] for word in words])[y]
        self.y, self.classes = y, int(y.max()) + 1
        self.is_test = torch.arange(len(y)) >= len(frozen.train_N)
        if tail.kept_for_test:
            self.is_test &= place_in_class(torch.where(self.is_test, y, -1)) < tail.kept_for_test

    def cut(self, seed: int) -> Tensor:
        """Indices of the training images that the tail keeps."""
        generator = torch.Generator().manual_seed(seed)
        rank_C = torch.randperm(self.classes, generator=generator)
        order = torch.randperm(len(self.y), generator=generator)
        order = order[~self.is_test[order]]
        counts_C = torch.bincount(self.y[order], minlength=self.classes)
        if self.tail.imbalance > 1:
            wanted = (self.tail.most or counts_C.max()) * self.tail.imbalance ** (-rank_C / (self.classes - 1))
            counts_C = counts_C.minimum(wanted.round().long().clamp_min(1))
        elif self.tail.most:
            counts_C = counts_C.clamp_max(self.tail.most)
        return order[place_in_class(self.y[order]) < counts_C[self.y[order]]].sort().values

    def parts(self, kept: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parts of the kept images and of the validation images; principal components are of the kept ones."""
        recipe = Recipe(stage=STAGES[self.frozen.backbone])
        maps = torch.cat(self.frozen.of(View(), recipe.stage))
        mean_ND = torch.cat(self.frozen.of(View(), "mean")).float()
        moments = fitted_moments([maps[kept]], recipe)
        test = self.is_test.nonzero().flatten()
        return tuple({"mean": mean_ND[i], "moments": second_moments(moments, maps[i])} for i in (kept, test))


def place_in_class(y: Tensor) -> Tensor:
    """How many images of the same class come before each."""
    place = torch.empty_like(y)
    for label in y.unique():
        members = (y == label).nonzero().flatten()
        place[members] = torch.arange(len(members))
    return place


def tail_folds(y: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(training, held-out) indices; every image of a class of two and more is held out once."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    place = torch.empty_like(y)
    place[order] = place_in_class(y[order])
    fold = torch.where(torch.bincount(y)[y] > 1, place % FOLDS, FOLDS)
    for f in range(FOLDS):
        yield (fold != f).nonzero().flatten(), (fold == f).nonzero().flatten()


def recalls(scores: Tensor, y: Tensor) -> Tensor:
    """Share of right answers of each class [C] in %, nan without images."""
    right = (scores.argmax(1) == y).double()
    counts = torch.bincount(y, minlength=scores.shape[1])
    return 100.0 * torch.zeros(scores.shape[1]).double().index_add_(0, y, right) / counts


@torch.no_grad()
def run(task: Task, seed: int) -> dict:
    """Class-mean accuracy by method, that of the rarest and of the most frequent third, and the options chosen."""
    kept = task.cut(seed)
    y, (seen, test) = task.y[kept], task.parts(kept)
    held: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    held_y = []
    for train, out in tail_folds(y, seed):
        held_y.append(y[out])
        inside, outside = ({p: x[i] for p, x in seen.items()} for i in (train, out))
        for key, scores in all_scores(inside, y[train], task.classes, outside).items():
            held[key].append(scores)
    y_held, options = torch.cat(held_y), defaultdict(dict)
    for (family, option), scores in held.items():
        options[family][option] = recalls(torch.cat(scores), y_held).nanmean().item()
    chosen = {family: max(values, key=values.get) for family, values in options.items()}  # of equals the first
    final = all_scores(seen, y, task.classes, test)
    scores = {family: final[family, option] for family, option in chosen.items()}
    scores |= {"FAIM": final["FAIM shared", "0.0"], "FAIM shared 1": final["FAIM shared", "1.0"]}
    by_count = torch.bincount(y).sort(stable=True).indices
    third, y_test = task.classes // 3, task.y[task.is_test]
    found = {family: recalls(each, y_test) for family, each in scores.items()}
    best = {
        family: max(recalls(final[family, o], y_test).nanmean().item() for o in options[family]) for family in options
    }
    return {
        "class_mean": {family: each.nanmean().item() for family, each in found.items()},
        "rare": {family: each[by_count[:third]].nanmean().item() for family, each in found.items()},
        "frequent": {family: each[by_count[-third:]].nanmean().item() for family, each in found.items()},
        "chosen": chosen,
        "best_option": best,
        "images": len(y),
        "counts": [int(torch.bincount(y).min()), int(torch.bincount(y).max())],
    }


def all_scores(seen: dict[str, Tensor], y: Tensor, classes: int, test: dict[str, Tensor]) -> dict:
    found = {}
    for family in FAMILIES:
        with torch.enable_grad():
            found |= family(seen, y, classes, test)
    return found


def report(lines: list[dict]) -> list[str]:
    """The tables of one backbone."""
    by_tail: dict[str, list[dict]] = defaultdict(list)
    for line in lines:
        by_tail[line["config"]["tail"]].append(line)
    tails = [tail.name for tail in TAILS if tail.name in by_tail and tail.name not in BALANCED]
    balanced = [name for name in BALANCED if name in by_tail]
    text = ["", "Images and images of the rarest and of the most frequent class:", ""]
    for name in (*tails, *balanced):
        row = by_tail[name][0]
        text.append(f"- {name}: {row['images']} images, {row['counts'][0]} to {row['counts'][1]}")
    for title, value, names in (
        ("Class-mean accuracy in %, mean over seeds", "class_mean", tails),
        ("The best option of each method on the validation images, in hindsight", "best_option", tails),
        ("The rarest third of the classes", "rare", tails),
        ("The most frequent third", "frequent", tails),
        ("Balanced sets, class-mean accuracy", "class_mean", balanced),
    ):
        if not names:
            continue
        means = {m: [mean(row[value][m] for row in by_tail[n]) for n in names] for m in by_tail[names[0]][0][value]}
        text += ["", f"{title}:", "", "| method | " + " | ".join((*names, "mean")) + " |"]
        text.append("|---" + "|---:" * (len(names) + 1) + "|")
        for method, values in sorted(means.items(), key=lambda item: -mean(item[1])):
            text.append(f"| {method} | " + " | ".join(f"{v:.1f}" for v in values) + f" | {mean(values):.2f} |")
    rows = [row for name in tails for row in by_tail[name]]
    methods = list(rows[0]["class_mean"])
    peers = [m for m in methods if m not in OURS]
    peer = max(peers, key=lambda m: mean(mean(row["class_mean"][m] for row in by_tail[n]) for n in tails))
    text += [
        "",
        f"Paired differences on the tails, points, 95 % t-interval; best peer by mean, in hindsight: {peer}.",
        "",
    ]
    text += ["| difference | (tail, seed) pairs | means of tails | tails won |", "|---|---:|---:|---:|"]
    pairs = [("FAIM shared", m) for m in methods if m != "FAIM shared"]
    pairs += [("FAIM shared 1", peer), ("FAIM shared 1", CONTROL), ("FAIM shared + prior", peer)]
    text += [difference(by_tail, tails, a, b) for a, b in pairs]
    if balanced:
        text += [difference(by_tail, balanced, a, CONTROL, ", balanced") for a in ("FAIM shared", "FAIM shared 1")]
    return text


def difference(by_tail: dict[str, list[dict]], names: list[str], a: str, b: str, note: str = "") -> str:
    gaps = [[row["class_mean"][a] - row["class_mean"][b] for row in by_tail[name]] for name in names]
    means = [mean(each) for each in gaps]
    every = [gap for each in gaps for gap in each]
    wins = f"{sum(m > 0 for m in means)} of {len(means)}"
    return f"| {a} - {b}{note} | {interval(every)} ({len(every)}) | {interval(means)} | {wins} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", required=True, metavar="NAME=FILE", help="backbones as safetensors")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR", help="folders with train/ and val/")
    parser.add_argument("--cache", type=Path, default=CACHE, help="scratch folder for maps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "long_tail.jsonl")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    done = {json.dumps(line["config"], sort_keys=True) for line in lines}
    for backbone, weights in named_folders(args.weights).items():
        for data, folder in named_folders(args.data).items():
            frozen = Frozen(folder, weights, backbone, args.cache)
            for tail in (t for t in TAILS if t.data == data):
                task = Task(tail, frozen)
                for seed in range(args.seeds if tail.imbalance > 1 or tail.most else 1):
                    config = {"backbone": backbone, "tail": tail.name, "seed": seed}
                    if json.dumps(config, sort_keys=True) in done:
                        continue
                    began = time.time()
                    lines.append({"config": config, **run(task, seed), "versions": VERSIONS})
                    with args.output.open("a") as file:
                        file.write(json.dumps(lines[-1]) + "\n")
                    print(f"{config}: {time.time() - began:.1f} s", flush=True)
    text = ["# Unequal classes on frozen features", "", whence(lines[0]["versions"], COMMAND)]
    text += ["", NOTE]
    for backbone in dict.fromkeys(line["config"]["backbone"] for line in lines):
        text += ["", f"## {backbone}", *report([line for line in lines if line["config"]["backbone"] == backbone])]
    show(text, args.output.with_suffix(".md"))


if __name__ == "__main__":
    main()
