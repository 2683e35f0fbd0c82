"""What second moments cost: a training step and inference of whole models, against the same FAIM model without them.

    python benchmarks/moments.py                     # inference on the CPU, batches of 1 and 32
    python benchmarks/moments.py --device cuda       # compiled training step and inference on a GPU
    python benchmarks/moments.py --stream 100000     # the closed form of that many features of D = 6,441 on the CPU

Models are timed in turn, round after round; medians, and the median of the rounds' ratios. Training is cross entropy
with the margin and AdamW under bfloat16 autocast; its memory is the peak of a step.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
from machine import headline
from torch import Tensor, nn

from timm_faim import FAIMHead, FoldedHead, TargetMargin, faim_heads
from timm_faim.head.closed_form import fit_from_statistics_
from timm_faim.head.statistics import HeadStatistics

CLASSES = 200
ARCHITECTURES = {
    "cuda": ("tf_efficientnet_lite0", "resnet50", "vit_small_patch16_224"),
    "cpu": ("tf_efficientnet_lite0",),
}
FORMS = {"plain": False, "moments": True, "moments, d = 64": {"components": 64}}


def build(arch: str, moments: object, device: str) -> nn.Module:
    model = timm.create_model(f"faim_{arch}", num_classes=CLASSES, faim_cfg={"moments": moments})
    return model.to(device, memory_format=torch.channels_last)


def fold_(model: nn.Module) -> nn.Module:
    """The model with folded heads, as for deployment."""
    for name, head in faim_heads(model).items():
        parent, _, child = name.rpartition(".")
        folded = FoldedHead(head)
        for hook in head._forward_pre_hooks.values():  # which puts the moments beside the features
            folded.register_forward_pre_hook(hook)
        setattr(model.get_submodule(parent), child, folded)
    return model


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Forward, loss, backward and update, compiled."""
    criterion = TargetMargin(nn.CrossEntropyLoss(), model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    compiled = torch.compile(model.train())

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = criterion(compiled(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def inference(model: nn.Module, x: Tensor, compiles: bool) -> Callable[[], None]:
    model = torch.compile(model.eval()) if compiles else model.eval()

    def step() -> None:
        with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16, enabled=compiles):
            model(x)

    return step


def seconds(step: Callable[[], None], device: str, repeats: int) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats


def compare(title: str, steps: dict[str, Callable[[], None]], device: str, rounds: int) -> None:
    """A table of the steps, the first being what the others are compared with."""
    for step in steps.values():
        seconds(step, device, 3)
    repeats = max(1, round(0.2 / max(seconds(step, device, 1) for step in steps.values())))
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device, repeats))
    peaks = {name: peak(step) if device == "cuda" else 0 for name, step in steps.items()}
    base = next(iter(steps))
    print(f"\n### {title}\n\n| model | ms | ratio | peak MiB | ratio |\n|---|---:|---:|---:|---:|")
    for name in steps:
        ratio = statistics.median(mine / theirs for mine, theirs in zip(times[name], times[base], strict=True))
        memory = f"{peaks[name] / 2**20:.0f} | {peaks[name] / peaks[base]:.2f}" if device == "cuda" else "- | -"
        print(f"| {name} | {1e3 * statistics.median(times[name]):.2f} | {ratio:.3f} | {memory} |", flush=True)


def peak(step: Callable[[], None]) -> int:
    """Peak above what is held between steps of all models."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def on_gpu(rounds: int, batch: int) -> None:
    for arch in ARCHITECTURES["cuda"]:
        x = torch.randn(batch, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
        y = torch.randint(CLASSES, (batch,), device="cuda")
        models = {name: build(arch, FORMS[name], "cuda") for name in ("plain", "moments")}
        steps = {name: training_step(model, x, y) for name, model in models.items()}
        compare(f"{arch}, compiled training step, batch {batch}, bf16", steps, "cuda", rounds)
        models["moments, folded"] = fold_(build(arch, True, "cuda"))
        steps = {name: inference(model, x, True) for name, model in models.items()}
        compare(f"{arch}, compiled inference, batch {batch}, bf16", steps, "cuda", rounds)
        del models, steps
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def on_cpu(rounds: int) -> None:
    for arch in ARCHITECTURES["cpu"]:
        models = {name: build(arch, moments, "cpu") for name, moments in FORMS.items()}
        models |= {f"{name}, folded": fold_(build(arch, FORMS[name], "cpu")) for name in list(FORMS)}
        for batch in (1, 32):
            x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
            steps = {name: inference(model, x, False) for name, model in models.items()}
            compare(f"{arch}, eager inference, batch {batch}", steps, "cpu", rounds if batch == 1 else rounds // 3)


def stream(images: int) -> None:
    """Statistics of a head of one small and one wide part, in one pass of random features of a decaying spectrum."""
    head = FAIMHead(64 + 6441, CLASSES, parts=(64, 6441))
    statistics_, begin = HeadStatistics(head), time.perf_counter()
    decay = torch.arange(1, 6506).rsqrt()
    for start in range(0, images, 500):
        x = torch.randn(500, 6505) * decay
        statistics_.update(x, torch.arange(start, start + 500) % CLASSES)
    fit_from_statistics_(head, statistics_)
    spent, most = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{images:,} features of D = 6,505 in one pass: {spent:.0f} s, peak memory of the process {most:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--stream", type=int, default=0, metavar="N", help="only the closed form of N features")
    args = parser.parse_args()
    print(headline(f"python benchmarks/moments.py {' '.join(sys.argv[1:])}".strip(), cuda=args.device == "cuda"))
    if args.stream:
        stream(args.stream)
    elif args.device == "cuda":
        on_gpu(args.rounds, args.batch)
    else:
        on_cpu(args.rounds)


if __name__ == "__main__":
    main()
