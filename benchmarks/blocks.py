"""FAIM blocks in a vision transformer: time and memory of a training step, and stability of training.

    python benchmarks/blocks.py                    # vit_base_patch16_224, bf16, torch.compile: steps against no blocks
    python benchmarks/blocks.py --stability        # 12 blocks of 12, 500 steps in bf16: the loss against no blocks

Steps: AdamW on random images on the device; variants are timed in turn, round after round, medians and ratios over the
rounds; memory is the peak of a step. Stability: ViT-S with 8 x 8 patches of the bundled Omniglot characters at 64
pixels, batch 128 of augmented drawings, learning rate 5e-4 with 50 steps of warm-up; mean loss of the last 50 steps;
each seed gives all variants the same weights, batches and distortions.
"""

import argparse
import statistics
import sys
import time

import numpy as np
import timm
import torch
from machine import headline
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from timm_faim.data import omniglot242_root

VARIANTS = {
    "no blocks": {},
    "2 blocks": {"blocks": 2},
    "2 blocks, p + gate of the mean": {"blocks": 2, "block_base": "mean"},
    "2 blocks, full Σ": {"blocks": 2, "block_full_sigma": True},
}
STABLE = {
    "no blocks": {},
    "12 blocks": {"blocks": 12},
    "12 blocks, p + gate of the mean": {"blocks": 12, "block_base": "mean"},
    "12 blocks, Randers": {"blocks": 12, "block_symmetric": False},
}
HEAD = {"space": "sphere", "scale_init": 24.0}


class Step:
    """A training step on one batch of random images."""

    def __init__(self, options: dict, args: argparse.Namespace, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = timm.create_model(args.model, num_classes=1000, faim_cfg=HEAD | options).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=device == "cuda")
        size = self.model.pretrained_cfg["input_size"]
        self.images = torch.randn(args.batch_size, *size, device=device)
        self.target = torch.randint(1000, (args.batch_size,), device=device)
        self.forward = torch.compile(self.model) if args.compile else self.model

    def __call__(self) -> None:
        with torch.autocast(self.device, torch.bfloat16):
            loss = nn.functional.cross_entropy(self.forward(self.images).float(), self.target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def throughput(args: argparse.Namespace, device: str) -> None:
    steps = {name: Step(options, args, device) for name, options in VARIANTS.items()}
    memory, times = {}, {name: [] for name in steps}
    for name, step in steps.items():
        for _ in range(3):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            own = sum(p.numel() * p.element_size() for p in step.model.parameters()) * 3  # weights, two moments
            memory[name] = torch.cuda.max_memory_allocated() - before + own
    for _ in range(args.rounds):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(args.steps):
                step()
            synchronize(device)
            times[name].append((time.perf_counter() - start) / args.steps)
    print(f"\n{args.model}, batch {args.batch_size}, {args.rounds} rounds of {args.steps} steps\n")
    print("| variant | ms a step | ratio | memory, MiB | ratio |")
    print("|---|---|---|---|---|")
    for name in steps:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["no blocks"], strict=True))
        used = memory.get(name, 0) / 2**20
        against = f"{used:.0f} | {memory[name] / memory['no blocks']:.3f}" if memory else "- | -"
        print(f"| {name} | {statistics.median(times[name]) * 1e3:.2f} | {ratio:.3f} | {against} |")


def drawings() -> tuple[torch.Tensor, torch.Tensor]:
    """The training drawings [N, 1, 64, 64] (bytes, strokes bright) and their classes [N]."""
    images, classes = [], []
    for c, folder in enumerate(sorted((omniglot242_root() / "train").iterdir())):
        for path in sorted(folder.iterdir()):
            images.append(255 - np.asarray(Image.open(path).convert("L").resize((64, 64), Image.Resampling.BILINEAR)))
            classes.append(c)
    return torch.from_numpy(np.stack(images))[:, None], torch.tensor(classes)


def train(options: dict, seed: int, data: tuple[torch.Tensor, torch.Tensor], args: argparse.Namespace, device: str):
    """Losses [steps] of a run, and the model."""
    torch.manual_seed(seed)
    model = timm.create_model("faim_vit_small_patch16_224", img_size=64, patch_size=8, in_chans=1, num_classes=242,
                              faim_cfg=HEAD | {"blocks": 0})  # fmt: skip
    charted = timm.create_model("faim_vit_small_patch16_224", img_size=64, patch_size=8, in_chans=1, num_classes=242,
                                faim_cfg=HEAD | options)  # fmt: skip
    charted.load_state_dict(model.state_dict(), strict=False)  # the same weights; charts are the identity
    model = charted.to(device).train()
    images, classes = (t.to(device) for t in data)
    distort = v2.RandomAffine(12, (0.08, 0.08), (0.85, 1.15), 8)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, weight_decay=0.05)
    losses = torch.zeros(args.train_steps)
    torch.manual_seed(seed)
    for step in range(args.train_steps):
        optimizer.param_groups[0]["lr"] = 5e-4 * min(1.0, (step + 1) / 50)
        chosen = torch.randint(len(classes), (args.batch_size,)).to(device)
        x = torch.cat([distort(part) for part in images[chosen].split(16)]).float() / 255  # one map for 16 drawings
        with torch.autocast(device, torch.bfloat16):
            logits = model(x)
        loss = nn.functional.cross_entropy(logits.float(), classes[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.detach()
    return losses, model


def stability(args: argparse.Namespace, device: str) -> None:
    data = drawings()
    last: dict[str, list[float]] = {name: [] for name in STABLE}
    moved: dict[str, tuple[float, float]] = {}
    for seed in range(args.seeds):
        for name, options in STABLE.items():
            losses, model = train(options, seed, data, args, device)
            assert torch.isfinite(losses).all(), f"{name}, seed {seed}: a loss is not finite"
            last[name].append(float(losses[-50:].mean()))
            charts = [block.faim_chart for block in model.blocks if hasattr(block, "faim_chart")]
            if charts:
                moved[name] = (max(abs(c.metric.lmbda.item()) for c in charts), max(c.p.norm().item() for c in charts))
            print(f"{name}, seed {seed}: {last[name][-1]:.4f}", file=sys.stderr, flush=True)
    print(f"\nvit_small, 12 blocks, {args.train_steps} steps, batch {args.batch_size}, {args.seeds} seeds\n")
    print("| variant | mean loss of the last 50 steps, by seed | ratio to no blocks | largest λ | largest norm of p |")
    print("|---|---|---|---|---|")
    for name, values in last.items():
        ratio = statistics.mean(values) / statistics.mean(last["no blocks"])
        lmbda, p = (f"{value:.3f}" for value in moved[name]) if name in moved else ("-", "-")
        print(f"| {name} | {', '.join(f'{v:.4f}' for v in values)} | {ratio:.3f} | {lmbda} | {p} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stability", action="store_true")
    parser.add_argument("--model", default="faim_vit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=15, help="steps of a round")
    parser.add_argument("--train-steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    print(headline(f"python benchmarks/blocks.py {' '.join(sys.argv[1:])}".strip(), device == "cuda"))
    (stability if args.stability else throughput)(args, device)


if __name__ == "__main__":
    main()
