"""Retrieval among classes never trained on: FAIM, Euclidean and cosine, each with its own tuned learning rate and τ.

    python benchmarks/hidden_classes.py --device cuda --jobs 8 --results FILE
    python benchmarks/hidden_classes.py --quick          # smoke test on the CPU: 10 steps, one trial a method, 2 seeds

Data: the bundled Omniglot characters, 242 classes with 20 drawings each, at 32 x 32. In folder order (by alphabet) the
last 80 are hidden: Tagalog, Sanskrit, and Latin but for its first 5. No choice of any kind sees them.
Tuning: the first 108 classes train, the next 54 (Katakana from its 39th on, Korean, 5 of Latin) validate. Every method
has the same trials, --rates x --temperatures with --trial-seeds seeds, and takes the setting of the best mean Recall@1
(at a tie, mAP@R) among the 1,080 validation drawings. A chosen value at the edge of the grid has an asterisk: widen the
grid, for all methods, with the same FILE; what FILE holds is not run again (start a new one after changing this file).
Final: trained on all 162 with the choice, --seeds other seeds, Recall@1 and mAP@R among the 1,600 hidden drawings, each
the query once, by the method's own distance, in float64. Seed s gives every method the same initial network, batches
and distortions, hence paired differences to cosine; their 95 % interval is Student's over the seeds. A run that
diverged counts as 0.

The same for all: the SupCon loss of this package (for cosine with the similarity in place of -d), batches of 32 classes
x 4 drawings, random affine distortion, 4 blocks of 3x3 convolution with 64 channels, batch norm, ReLU and max pooling,
a linear layer to 64 features; float32 (TF32 convolutions on a GPU); AdamW, 5 % warm-up, cosine to 0. A metric that
learns has the network's learning rate; weight decay 0.01 is on convolutions and the linear layer only. Euclidean is the
FAIM metric with Σ = σ I and λ = 0, frozen. All start at the library's own σ: 1 / 128 for 64 plain features, 1 / 2 for
normalised ones (times 0.98 with λ = 0.1).
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from machine import headline
from PIL import Image
from torch import Tensor, nn

from timm_faim import FAIMInfoNCELoss, FAIMMetric
from timm_faim.data import omniglot242_root

TRAINED, TUNED = 162, 108  # classes of the final runs and of the trials
SIZE, CHANNELS, FEATURES = 32, 64, 64
CLASSES_OF_BATCH, DRAWINGS_OF_BATCH, DRAWINGS = 32, 4, 20
FIRST_FINAL_SEED = 100  # trials have seeds from 0
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, 1 to 9 degrees of freedom


class CosineMetric(FAIMMetric):
    """Minus the cosine in the place of a distance, for the same code."""

    def forward(self, x, y, scale=None):
        similarity = x @ y.t()
        return -similarity if scale is None else similarity * -scale


class Method(NamedTuple):
    """A distance: whether embeddings are normalised, and which metric with which parameters learned."""

    normalize: bool
    kind: type[FAIMMetric] = FAIMMetric
    full_sigma: bool = False
    lambda_init: float = 0.0
    learned: bool = True

    def metric(self) -> FAIMMetric:
        """A new metric at the library's own start; the 1-form is frozen where λ = 0."""
        metric = self.kind(FEATURES, full_sigma=self.full_sigma, lambda_init=self.lambda_init)
        metric.reset_to_unit_distance(2.0 if self.normalize else 2.0 * FEATURES)
        for name, parameter in metric.named_parameters():
            parameter.requires_grad_(self.learned and (self.lambda_init > 0 or name not in ("beta", "lmbda")))
        return metric


METHODS = {
    "cosine": Method(True, CosineMetric, learned=False),
    "Euclidean": Method(False, learned=False),
    "Euclidean, normalised": Method(True, learned=False),
    "FAIM diagonal": Method(False, lambda_init=0.1),
    "FAIM diagonal, normalised": Method(True, lambda_init=0.1),
    "FAIM full Σ, normalised": Method(True, full_sigma=True, lambda_init=0.1),
    "FAIM diagonal, normalised, λ = 0": Method(True),
}


class Run(NamedTuple):
    """All that a result depends on, but for the machine; the key of a line of results."""

    phase: str  # "trial" or "final"
    method: str
    rate: float
    temperature: float
    seed: int
    steps: int
    device: str


def read_drawings() -> np.ndarray:
    """Ink of all drawings in [0, 1], [242, 20, 32, 32], classes in folder order."""
    root = omniglot242_root()
    classes = sorted(folder.name for folder in (root / "train").iterdir())
    ink = np.empty((len(classes), DRAWINGS, SIZE, SIZE), np.float32)
    for row, name in zip(ink, classes, strict=True):
        files = sorted((root / "train" / name).iterdir()) + sorted((root / "val" / name).iterdir())
        for into, file in zip(row, files, strict=True):
            with Image.open(file) as image:
                into[:] = 1.0 - np.asarray(image.convert("L").resize((SIZE, SIZE), Image.Resampling.BOX)) / 255.0
    return ink


def make_network() -> nn.Sequential:
    """Four convolutional blocks and a linear layer: [B, 1, 32, 32] -> [B, 64]."""
    layers: list[nn.Module] = []
    for width in (1, CHANNELS, CHANNELS, CHANNELS):
        layers += [
            nn.Conv2d(width, CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS),
            nn.ReLU(True),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(CHANNELS * (SIZE // 16) ** 2, FEATURES))


def draw_batches(classes: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers of drawings [steps, B] and affine maps [steps, B, 2, 3] of all batches of a run."""
    chosen = torch.rand(steps, classes, generator=generator).argsort(1)[:, :CLASSES_OF_BATCH]
    drawing = torch.rand(steps, CLASSES_OF_BATCH, DRAWINGS, generator=generator).argsort(2)[..., :DRAWINGS_OF_BATCH]
    index = (chosen[..., None] * DRAWINGS + drawing).flatten(1)
    # up to 17 degrees, 20 % in the size of each axis, shear 0.2, a shift by 10 % of the width
    limits = torch.tensor([0.3, 0.2, 0.2, 0.2, 0.2, 0.2])
    angle, wide, high, shear, *shift = ((2 * torch.rand(*index.shape, 6, generator=generator) - 1) * limits).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    wide, high = wide.exp(), high.exp()
    rows = [wide * cos, high * (shear * cos - sin), shift[0], wide * sin, high * (shear * sin + cos), shift[1]]
    return index, torch.stack(rows, -1).unflatten(-1, (2, 3))


def train(run: Run, drawings: Tensor) -> tuple[nn.Module, FAIMInfoNCELoss] | None:
    """Network and loss after training on drawings [C, 20, 32, 32] of all classes; None where it diverged."""
    device = drawings.device
    method = METHODS[run.method]
    generator = torch.Generator().manual_seed(run.seed)
    index, maps = (t.to(device) for t in draw_batches(len(drawings), run.steps, generator))
    labels = torch.arange(CLASSES_OF_BATCH, device=device).repeat_interleave(DRAWINGS_OF_BATCH)
    images = drawings.flatten(0, 1).unsqueeze(1)
    torch.manual_seed(run.seed)
    network = make_network().to(device)
    loss = FAIMInfoNCELoss(method.metric(), temperature=run.temperature, form="supcon", normalize=method.normalize)
    loss.metric.to(device)
    weights = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() == 1]
    others += [p for p in loss.metric.parameters() if p.requires_grad]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=run.rate, fused=device.type == "cuda")
    warmup = run.steps // 20 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / run.steps))
    )
    for step in range(run.steps):
        grid = nn.functional.affine_grid(maps[step], [len(labels), 1, SIZE, SIZE], align_corners=False)
        batch = nn.functional.grid_sample(images[index[step]], grid, align_corners=False)
        try:
            value = loss(network(batch), labels)
        except ValueError as error:  # on the CPU the loss looks for it, on a GPU retrieval() does
            if "not finite" in str(error):
                return None
            raise
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return network, loss


@torch.no_grad()
def retrieval(network: nn.Module, loss: FAIMInfoNCELoss, drawings: Tensor) -> tuple[float, float]:
    """Recall@1 and mAP@R (R = 19) in per cent, every drawing of [C, 20, 32, 32] the query once; 0 where not finite."""
    network.eval()
    x_ND = loss.embed(network(drawings.flatten(0, 1).unsqueeze(1)).double())
    distance_NN = loss.metric(x_ND, x_ND)
    if not distance_NN.isfinite().all():
        return 0.0, 0.0
    labels = torch.arange(len(drawings), device=drawings.device).repeat_interleave(DRAWINGS)
    nearest = distance_NN.fill_diagonal_(torch.inf).topk(DRAWINGS - 1, largest=False).indices
    hits = (labels[nearest] == labels[:, None]).double()
    precision = hits.cumsum(1) / torch.arange(1, DRAWINGS, device=drawings.device)
    return 100 * hits[:, 0].mean().item(), 100 * (hits * precision).mean().item()


_drawings: Tensor  # of a worker, set by start_worker


def start_worker(ink: np.ndarray, device: str, threads: int) -> None:
    """Put the drawings on the device of this process."""
    global _drawings
    torch.set_num_threads(threads)
    _drawings = torch.from_numpy(ink).to(device)


def execute(run: Run) -> dict:
    """One training and its retrieval, as a line of results."""
    begin = time.perf_counter()
    known, end = (TUNED, TRAINED) if run.phase == "trial" else (TRAINED, len(_drawings))
    trained = train(run, _drawings[:known])
    recall, precision = retrieval(*trained, _drawings[known:end]) if trained else (0.0, 0.0)
    seconds = round(time.perf_counter() - begin, 2)
    return {**run._asdict(), "recall": recall, "map": precision, "seconds": seconds}


class Study:
    """Runs with results by key, kept in a file."""

    def __init__(self, pool: ProcessPoolExecutor, file: Path | None) -> None:
        self.pool = pool
        self.file = file
        self.results: dict[Run, tuple[float, float]] = {}
        if file is not None and file.exists():
            for line in file.read_text().splitlines():
                self.add(json.loads(line))

    def add(self, result: dict) -> None:
        key = Run(*(result[name] for name in Run._fields))
        self.results[key] = (result["recall"], result["map"])

    def complete(self, runs: list[Run]) -> None:
        """Execute those runs that have no result yet; an error in one cancels the others and is raised."""
        missing = [run for run in runs if run not in self.results]
        print(f"{len(missing)} of {len(runs)} {runs[0].phase} runs to do", file=sys.stderr, flush=True)
        futures = [self.pool.submit(execute, run) for run in missing]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                result = future.result()
                self.add(result)
                if self.file is not None:
                    with self.file.open("a") as stream:
                        stream.write(json.dumps(result, ensure_ascii=False) + "\n")
                print(
                    f"{number:4}/{len(missing)} {result['seconds']:6.1f} s  Recall@1 {result['recall']:5.2f}  "
                    f"{result['method']}, lr {result['rate']:g}, τ {result['temperature']:g}, seed {result['seed']}",
                    file=sys.stderr,
                    flush=True,
                )
        except BaseException:
            self.pool.shutdown(cancel_futures=True)
            raise

    def means(self, runs: list[Run]) -> tuple[float, float]:
        """Mean Recall@1 and mAP@R of runs."""
        recalls, maps = zip(*(self.results[run] for run in runs), strict=True)
        return statistics.fmean(recalls), statistics.fmean(maps)


def difference(values: list[float], base: list[float]) -> str:
    """Mean paired difference and its 95 % interval (Student's t)."""
    paired = [a - b for a, b in zip(values, base, strict=True)]
    mean = statistics.fmean(paired)
    half = T_QUANTILES[len(paired) - 2] * statistics.stdev(paired) / len(paired) ** 0.5
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def study(pool: ProcessPoolExecutor, args: argparse.Namespace) -> list[str]:
    """Tune, train, and the lines of the table."""
    runs = Study(pool, args.results)
    settings = list(itertools.product(args.rates, args.temperatures))

    def group(phase: str, method: str, setting: tuple[float, float], first: int, count: int) -> list[Run]:
        return [Run(phase, method, *setting, first + i, args.steps, args.device) for i in range(count)]

    trials = {(m, s): group("trial", m, s, 0, args.trial_seeds) for m in METHODS for s in settings}
    runs.complete([run for trial in trials.values() for run in trial])
    chosen = {m: max(settings, key=lambda s: runs.means(trials[m, s])) for m in METHODS}
    finals = {m: group("final", m, chosen[m], FIRST_FINAL_SEED, args.seeds) for m in METHODS}
    runs.complete([run for final in finals.values() for run in final])

    def marked(value: float, values: list[float]) -> str:
        return f"{value:g}" + ("*" if value in (min(values), max(values)) else "")

    lines = [
        "| method | learning rate | τ | validation Recall@1 | hidden Recall@1 | … minus cosine | hidden mAP@R "
        "| … minus cosine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cosine = list(zip(*(runs.results[run] for run in finals["cosine"]), strict=True))
    for method in METHODS:
        rate, temperature = chosen[method]
        cells = [
            method,
            marked(rate, args.rates),
            marked(temperature, args.temperatures),
            f"{runs.means(trials[method, chosen[method]])[0]:.2f}",
        ]
        for values, base in zip(zip(*(runs.results[run] for run in finals[method]), strict=True), cosine, strict=True):
            cells += [
                f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}",
                "" if method == "cosine" else difference(values, base),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one process each")
    parser.add_argument("--steps", type=int, default=600, help="steps of a run")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2], help="learning rates")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.015, 0.03, 0.06, 0.12, 0.25])
    parser.add_argument("--trial-seeds", type=int, default=1, help="seeds of a trial")
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11), help="seeds of the final runs")
    parser.add_argument("--results", type=Path, help="JSON lines, read first and added to (default: not kept)")
    parser.add_argument("--quick", action="store_true", help="10 steps, one trial a method, 2 seeds")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rates, args.temperatures, args.seeds = 10, [3e-3], [0.12], 2
    command = f"python benchmarks/hidden_classes.py {' '.join(sys.argv[1:])}".strip()
    threads = 1 if args.device == "cuda" else max(1, (os.cpu_count() or 1) // args.jobs)
    with ProcessPoolExecutor(
        args.jobs, get_context("spawn"), start_worker, (read_drawings(), args.device, threads)
    ) as pool:
        lines = study(pool, args)
    print(headline(command, cuda=args.device == "cuda"))
    print(
        f"\n{args.steps} steps a run, {len(args.rates) * len(args.temperatures)} settings a method x "
        f"{args.trial_seeds} seeds, {args.seeds} other seeds; per cent, mean ± standard deviation over seeds, "
        "mean difference (95 % interval); * at the edge of the grid\n"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
