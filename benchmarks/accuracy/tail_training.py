"""The training options for rare classes on heads of frozen features: --logit-adjust, --ldam, --samples-per-class 1.

    python benchmarks/accuracy/tail_training.py --weights NAME=FILE --data NAME=DIR ...

Cuts as in ``long_tail.py``, the mean of the last map alone. FAIM heads start in closed form, linear ones at random, and
all train by AdamW at one rate. Nothing is chosen: every strength stands in the table.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch
from features import CACHE, named_folders
from long_tail import TAILS, Task, recalls
from maps import Frozen, View
from tables import interval, show
from torch import Tensor, nn

from timm_faim import FAIMHead, fit_
from timm_faim.training.args import parse_args
from timm_faim.training.class_sampling import ClassSampler
from timm_faim.training.loss import build_criterion

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import headline

STEPS, BATCH, RATE = 300, 64, 2e-3
PLAIN = "cross entropy"
LOSSES = {
    PLAIN: "",
    **{f"--logit-adjust {tau}": f"--logit-adjust {tau}" for tau in (0.5, 1, 2)},
    **{f"--ldam {margin}": f"--ldam {margin}" for margin in (0.2, 0.5, 2, 10)},
    "--samples-per-class 1": "--samples-per-class 1",
}


def batches(y: Tensor, is_balanced: bool) -> list[Tensor]:
    """Indices of the images of each step."""
    if is_balanced:
        sampler, indices = ClassSampler(y.tolist(), BATCH, 1, 1, 0, seed=0), []
        while len(indices) < STEPS * BATCH:
            sampler.set_epoch(len(indices))
            indices += list(sampler)
    else:
        generator, indices = torch.Generator().manual_seed(0), []
        while len(indices) < STEPS * BATCH:
            indices += torch.randperm(len(y), generator=generator).tolist()
    return list(torch.tensor(indices[: STEPS * BATCH]).split(BATCH))


def trained(head: nn.Module, x: Tensor, y: Tensor, counts_C: Tensor, words: str) -> nn.Module:
    options = parse_args(["--data-dir", "d", "--smoothing", "0", *words.split()])
    is_balanced = bool(options.contrastive.samples_per_class)
    criterion = build_criterion(options, head.train(), counts_C if words and not is_balanced else None)
    optimiser = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for chosen in batches(y, is_balanced):
        optimiser.zero_grad()
        criterion(head(x[chosen]), y[chosen]).backward()
        optimiser.step()
        schedule.step()
    return head.eval()


def run(task: Task, seed: int) -> dict[str, float]:
    """Class-mean accuracy in % by head and loss."""
    kept, mean_ND = task.cut(seed), torch.cat(task.frozen.of(View(), "mean")).float()
    x, y, counts_C = mean_ND[kept], task.y[kept], torch.bincount(task.y[kept])
    found = {}

    def evaluate(name: str, head: nn.Module) -> None:
        with torch.no_grad():
            found[name] = recalls(head(mean_ND[task.is_test]), task.y[task.is_test]).nanmean().item()

    def faim(share: float) -> FAIMHead:
        return fit_(FAIMHead(x.shape[1], task.classes), [(x, y)], share=share)

    for share in (0.0, 1.0):
        evaluate(f"FAIM in closed form, share={share:g}", faim(share))
    for name, words in LOSSES.items():
        evaluate(f"FAIM, {name}", trained(faim(0.0), x, y, counts_C, words))
        torch.manual_seed(0)
        evaluate(f"linear, {name}", trained(nn.Linear(x.shape[1], task.classes), x, y, counts_C, words))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, metavar="NAME=FILE", help="a backbone as safetensors")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR", help="folders with train/ and val/")
    parser.add_argument("--cache", type=Path, default=CACHE, help="scratch folder for maps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "tail_training.md")
    args = parser.parse_args()
    ((backbone, weights),) = named_folders([args.weights]).items()
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for data, folder in named_folders(args.data).items():
        frozen = Frozen(folder, weights, backbone, args.cache)
        for tail in (t for t in TAILS if t.data == data and t.imbalance > 1 and not t.by_word and not t.kept_for_test):
            for seed in range(args.seeds):
                for name, value in run(Task(tail, frozen), seed).items():
                    rows[name][tail.name].append(value)
            print(f"{tail.name} done", flush=True)
    tails = list(next(iter(rows.values())))
    command = "python benchmarks/accuracy/tail_training.py --weights NAME=FILE --data NAME=DIR …"
    text = [f"# Training heads on unequal classes, {backbone}", "", headline(command, cuda=False), ""]
    text += [
        f"Class-mean accuracy in %, mean over {args.seeds} cuts; the last column is the paired difference from cross"
    ]
    text += ["entropy with the same head, points, 95 % t-interval over (tail, cut).", ""]
    text += [
        "| head and loss | " + " | ".join((*tails, "mean", "gain")) + " |",
        "|---" + "|---:" * (len(tails) + 2) + "|",
    ]
    for name, by_tail in rows.items():
        plain = rows[f"{name.split(',')[0].split()[0]}, {PLAIN}"]
        gaps = [a - b for tail in tails for a, b in zip(by_tail[tail], plain[tail], strict=True)]
        values = [mean(by_tail[tail]) for tail in tails]
        text.append(f"| {name} | " + " | ".join(f"{v:.1f}" for v in (*values, mean(values))) + f" | {interval(gaps)} |")
    show(text, args.output)


if __name__ == "__main__":
    main()
