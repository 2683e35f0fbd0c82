"""Training throughput: faim_X against X in train_faim.py's loop, and that loop against timm's and against a bare one.

    python benchmarks/train.py [--models ...] [--timm-train PATH] [--batch-size N] [--steps N] [--rounds N]
    python benchmarks/train.py --scaling 2          # images/s on 2 GPUs against 1, through accelerate launch

The data are random images already on the device, so that no loader hides a difference. All variants of a model share
settings (AdamW, label smoothing, bf16 autocast, torch.compile) and are timed in turn, round after round; medians and
ratios are over the rounds. --timm-train is timm's train.py of a source checkout: the script is not part of timm's
wheel; without it that column is left out.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
from accelerate import Accelerator
from machine import headline
from timm.task import ClassificationTask

from timm_faim.training import tasks
from timm_faim.training.args import parse_args
from timm_faim.training.launch import build_accelerator
from timm_faim.training.loop import Training, train_one_epoch
from timm_faim.training.loss import build_criterion
from timm_faim.training.model import build_model
from timm_faim.training.optimiser import build_optimizer, build_scheduler, split_groups
from timm_faim.training.options import Options

FAIM_CFG = ("space=sphere", "scale_init=24.0", "margin=0.15")


class RandomImages:
    """One batch on the device, over and over, with what the loops ask of a loader."""

    def __init__(self, images: torch.Tensor, target: torch.Tensor, steps: int) -> None:
        self.images, self.target, self.steps = images, target, steps

    def batches(self, epoch: int, start: int = 0):
        return iter(self)

    def __iter__(self):
        for _ in range(self.steps):
            yield self.images, self.target

    def __len__(self) -> int:
        return self.steps


def options(name: str, bench: argparse.Namespace) -> Options:
    """Options of train_faim.py for one variant."""
    words = [
        "--data-dir",
        "none",
        "--model",
        name,
        "--opt",
        "adamw",
        "--lr",
        "1e-4",
        "--epochs",
        "100000",
        "--warmup-epochs",
        "0",
        "--sched",
        "cosine",
        "--sched-on-updates",
        "-b",
        str(bench.batch_size),
        "--log-interval",
        "50",
    ]
    if torch.cuda.is_available():
        words += ["--amp", "--amp-dtype", "bfloat16", "--torchcompile"]
    if name.startswith("faim_"):
        words += ["--faim-cfg", *FAIM_CFG]
    return parse_args(words)


class OurLoop:
    """train_faim.py's epoch."""

    def __init__(self, name: str, bench: argparse.Namespace, accelerator: Accelerator, images: RandomImages) -> None:
        args = options(name, bench)
        torch.manual_seed(0)
        model = build_model(args, 1000).to(accelerator.device)
        if bench.channels_last(name):
            model, args.model.channels_last = model.to(memory_format=torch.channels_last), True
        criterion = build_criterion(args, model)
        self.task = tasks.build_task(args, model, criterion, accelerator.device)
        optimizer = build_optimizer(args.optimiser, args.schedule.lr, model)
        split_groups(optimizer, model, args.learning)
        scheduler, _ = build_scheduler(args.schedule, args.run, optimizer, len(images))
        self.task.trainable_module, optimizer = accelerator.prepare(model, optimizer)
        self.run = Training(
            args, accelerator, model, model, self.task, optimizer, images, Path(tempfile.mkdtemp()), scheduler
        )

    def images_per_second(self) -> float:
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        result = train_one_epoch(self.run)
        self.run.progress.end_epoch()
        return result["images_per_s"]


class BareLoop:
    """Forward, backward and update of the same compiled model and optimiser, and nothing else."""

    def __init__(self, ours: OurLoop, images: RandomImages) -> None:
        self.run, self.images = ours.run, images

    def images_per_second(self) -> float:
        run = self.run
        run.task.train()
        started = time.perf_counter()
        for images, target in self.images:
            images = images.contiguous(memory_format=torch.channels_last) if run.options.model.channels_last else images
            with run.accelerator.autocast():
                loss = run.task(images, target)["loss"]
            loss.backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        synchronize()
        return len(self.images) * len(self.images.target) / (time.perf_counter() - started)


class TimmLoop:
    """timm's train_one_epoch on the same bare model, in timm's own task, compiled as timm does."""

    def __init__(self, ours: OurLoop, train_script, accelerator: Accelerator, images: RandomImages) -> None:
        args = ours.run.options
        self.images, self.script = images, train_script
        self.device = accelerator.device
        self.task = ClassificationTask(ours.run.model, criterion=ours.task.criterion, device=self.device, verbose=False)
        if args.device.torchcompile:
            self.task.compile()
        self.optimizer = build_optimizer(args.optimiser, args.schedule.lr, ours.run.model)
        self.scheduler, _ = build_scheduler(args.schedule, args.run, self.optimizer, len(images))
        self.args = SimpleNamespace(
            channels_last=args.model.channels_last,
            clip_grad=None,
            clip_mode="norm",
            distributed=False,
            grad_accum_steps=1,
            log_interval=args.logging.log_interval,
            mixup_off_epoch=0,
            prefetcher=True,
            recovery_interval=0,
            save_images=False,
            synchronize_step=False,
            world_size=1,
            rank=0,
            local_rank=0,
        )

    def images_per_second(self) -> float:
        synchronize()
        started = time.perf_counter()
        self.script.train_one_epoch(
            0,
            self.task.get_trainable_module(),
            self.images,
            self.optimizer,
            self.args,
            task=self.task,
            device=self.device,
            lr_scheduler=self.scheduler,
            amp_autocast=lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"),
        )
        synchronize()
        return len(self.images) * len(self.images.target) / (time.perf_counter() - started)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def load_script(path: str):
    """timm's train.py as a module."""
    spec = importlib.util.spec_from_file_location("timm_train", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(name: str, bench: argparse.Namespace, accelerator: Accelerator) -> dict[str, list[float]]:
    """images/s of every variant of one architecture, by round."""
    size = timm.get_pretrained_cfg(name).input_size[-1] if torch.cuda.is_available() else 64
    device = accelerator.device
    batch = RandomImages(
        torch.randn(bench.batch_size, 3, size, size, device=device),
        torch.randint(1000, (bench.batch_size,), device=device),
        bench.steps,
    )
    plain, faim = (OurLoop(prefix + name, bench, accelerator, batch) for prefix in ("", "faim_"))
    variants = {
        "X": plain.images_per_second,
        "faim_X": faim.images_per_second,
        "X, bare loop": BareLoop(plain, batch).images_per_second,
        "faim_X, bare loop": BareLoop(faim, batch).images_per_second,
    }
    if bench.timm_train:
        script = load_script(bench.timm_train)
        for label, ours in (("X", plain), ("faim_X", faim)):
            variants[f"{label}, timm's loop"] = TimmLoop(ours, script, accelerator, batch).images_per_second
    times: dict[str, list[float]] = {label: [] for label in variants}
    for number in range(bench.rounds + 1):
        for label, run in variants.items():
            rate = run()
            if number:  # the first round compiles and warms up
                times[label].append(rate)
    return times


def print_table(name: str, times: dict[str, list[float]], bench: argparse.Namespace) -> None:
    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    compared = {"X": None, "faim_X": "X", "X, bare loop": None, "faim_X, bare loop": None}
    print(f"\n{name}, batch {bench.batch_size}, {bench.rounds} rounds of {bench.steps} steps\n")
    print("| variant | images/s | range | ratio |\n|---|---|---|---|")
    for label, values in times.items():
        against = compared.get(label)
        note = f"{ratio(label, against):.3f} x {against}" if against else ""
        print(f"| {label} | {statistics.median(values):.0f} | {min(values):.0f} to {max(values):.0f} | {note} |")
    for label in ("X", "faim_X"):
        for other in (f"{label}, bare loop", f"{label}, timm's loop"):
            if other in times:
                name = other.removeprefix(f"{label}, ")
                print(f"- {label} in train_faim.py's loop: {ratio(label, other):.3f} x {name}")


def scaling(bench: argparse.Namespace) -> None:
    """Launch this script on 1 and on N GPUs in turn and compare the images/s of faim_X."""
    rows: dict[int, list[float]] = {1: [], bench.scaling: []}
    for number in range(bench.rounds):
        for count in rows:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
            result = subprocess.run(
                [
                    *launcher,
                    __file__,
                    "--rate-only",
                    "--models",
                    bench.models[0],
                    "--batch-size",
                    str(bench.batch_size),
                    "--steps",
                    str(bench.steps),
                ],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            rows[count].append(json.loads(result.stdout.strip().splitlines()[-1]))
            print(f"round {number + 1}, {count} GPU(s): {rows[count][-1]:.0f} images/s", flush=True)
    medians = {count: statistics.median(rates) for count, rates in rows.items()}
    print(f"\nfaim_{bench.models[0]}, batch {bench.batch_size} a GPU\n\n| GPUs | images/s | ratio |\n|---|---|---|")
    for count, rate in medians.items():
        print(f"| {count} | {rate:.0f} | {rate / medians[1]:.3f} |")


def rate_only(bench: argparse.Namespace, accelerator: Accelerator) -> None:
    """Print the images/s of faim_X over all processes, the median of three epochs after a warm-up."""
    size = timm.get_pretrained_cfg(bench.models[0]).input_size[-1] if torch.cuda.is_available() else 64
    batch = RandomImages(
        torch.randn(bench.batch_size, 3, size, size, device=accelerator.device),
        torch.randint(1000, (bench.batch_size,), device=accelerator.device),
        bench.steps,
    )
    ours = OurLoop(f"faim_{bench.models[0]}", bench, accelerator, batch)
    rates = [ours.images_per_second() for _ in range(4)][1:]
    if accelerator.is_main_process:
        print(json.dumps(statistics.median(rates)))
    accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_base_patch16_224", "convnext_tiny", "resnet50"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timm-train", metavar="PATH", help="timm's train.py")
    parser.add_argument("--scaling", type=int, metavar="N", help="compare N GPUs with 1")
    parser.add_argument("--rate-only", action="store_true", help=argparse.SUPPRESS)
    bench = parser.parse_args()
    bench.channels_last = lambda name: "resnet" in name or "convnext" in name

    if bench.scaling:
        print(headline(" ".join(["python", *sys.argv]), torch.cuda.is_available()))
        scaling(bench)
        return
    accelerator = build_accelerator(options(f"faim_{bench.models[0]}", bench))
    if bench.rate_only:
        rate_only(bench, accelerator)
        return
    print(headline(" ".join(["python", *sys.argv]), torch.cuda.is_available()))
    for name in bench.models:
        print_table(name, measure(name, bench, accelerator), bench)
        torch.compiler.reset()
        sys.stdout.flush()


if __name__ == "__main__":
    main()
