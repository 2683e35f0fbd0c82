"""Time and memory of classifier heads against nn.Linear in the same run: forward + cross entropy + backward, and on the
CPU inference of single features.

    python benchmarks/head.py                     # CPU table
    python benchmarks/head.py --device cuda       # GPU tables, compiled (--eager: eager as well)

Heads are timed in turn, round after round, so that a drift of the machine's speed touches all of them alike; medians
and ratios to Linear are over the rounds. Memory is the peak above parameters and inputs, without the parameters' own
gradients, in units of the logits (B·C·4 bytes). At these sizes a GPU step is bound by launches from Python, so the
time in GPU kernels stands beside the wall time.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from machine import headline
from torch import nn
from torch.nn import functional as F

from timm_faim import PRESETS, FAIMHead, FoldedHead, to_linear


class LiteralHead(FAIMHead):
    """The founding formula with [B, C, D] differences, on the same parameters."""

    def __init__(self, D, C):
        super().__init__(D, C, **PRESETS["flat"])

    def forward(self, x):
        return -self.gamma() * self.metric.reference(x, self.mu)


def floor(D: int, C: int) -> nn.Module:
    """What the default head cannot go below: the frozen frame and a linear layer."""
    return nn.Sequential(nn.Linear(D, D, bias=False).requires_grad_(False), nn.Linear(D, C))


HEADS: dict[str, Callable[..., nn.Module]] = {
    "Linear": nn.Linear,
    "frozen Linear(D, D) + Linear": floor,
    "FAIM": FAIMHead,
    "FAIM, λ = 0.1": partial(FAIMHead, lambda_init=0.1),
    "FAIM flat, diagonal Σ": partial(FAIMHead, **PRESETS["flat"]),
    "FAIM flat, full Σ": partial(FAIMHead, **PRESETS["flat"] | {"full_sigma": True}),
    "literal formula": LiteralHead,
}


class Step:
    """One training step of a head on fixed data; the features want a gradient too, as behind a backbone."""

    def __init__(self, make, B, C, D, device, compile_mode, autocast):
        torch.manual_seed(0)
        self.head = make(D, C).to(device)
        self.x = torch.randn(B, D, device=device, requires_grad=True)
        self.target = torch.randint(C, (B,), device=device)
        self.autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16, enabled=autocast)
        loss = self._loss
        self.loss = torch.compile(loss, mode=compile_mode) if compile_mode != "eager" else loss

    def _loss(self, x, target):
        with self.autocast():
            logits = self.head(x)
        return F.cross_entropy(logits.float(), target)

    def __call__(self):
        self.x.grad = None
        for parameter in self.head.parameters():
            parameter.grad = None
        self.loss(self.x, self.target).backward()

    def gradient_bytes(self):
        tensors = [self.x, *self.head.parameters()]
        return sum(t.grad.numel() * t.grad.element_size() for t in tensors if t.grad is not None)


def seconds(step: Step, device: str, calls: int) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - begin) / calls


def busy_seconds(step: Step, calls: int = 10) -> float:
    """Time in GPU kernels a step: what is left of the cost where a backbone keeps the launch queue full."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / calls


def peak_bytes(step: Step, device: str) -> int:
    step.x.grad = None
    for parameter in step.head.parameters():
        parameter.grad = None
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - step.gradient_bytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    allocations = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak - step.gradient_bytes()


def table(B, C, D, device, precision, compile_mode, rounds, names) -> None:
    # TF32 products also in the bf16 row: autocast moves Linear to bfloat16, FAIM stays in float32 by its policy
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    steps = {}
    for name in names:
        if name == "literal formula" and (B * C * D * 4 > 8e9 or compile_mode == "reduce-overhead"):
            continue
        steps[name] = Step(HEADS[name], B, C, D, device, compile_mode, precision == "bf16")
    budget = 0.02 if device == "cuda" else 0.05  # seconds a head and round
    calls = {name: max(1, int(budget / _warm(step, device))) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        for name, step in steps.items():
            if name == "literal formula" and i >= 3:  # hundreds of times slower: three rounds tell enough
                continue
            times[name].append(seconds(step, device, calls[name]))
    print(f"\n### {device}, B={B}, D={D}, C={C}, {precision}, {compile_mode}, medians of {rounds} rounds\n")
    print("| head | ms | ratio to Linear | GPU busy, ms | ratio | peak memory, B·C·4 bytes |")
    print("|---|---|---|---|---|---|")
    busy = {name: busy_seconds(step) * 1e3 if device == "cuda" else math.nan for name, step in steps.items()}
    for name, step in steps.items():
        ratio = statistics.median(t / base for t, base in zip(times[name], times["Linear"], strict=False))
        graphs = compile_mode == "reduce-overhead"  # CUDA graphs hold their memory in a pool of their own
        memory = "-" if graphs else f"{peak_bytes(step, device) / (B * C * 4):.1f}"
        kernels = f"{busy[name]:.3f} | {busy[name] / busy['Linear']:.2f}" if device == "cuda" else "- | -"
        wall = statistics.median(times[name]) * 1e3
        print(f"| {name} | {wall:.3f} | {ratio:.2f} | {kernels} | {memory} |", flush=True)
    del steps
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.empty_cache()


def inference_table(D, C, rounds) -> None:
    """Eager inference of one feature at a time, as a service sees it."""
    torch.manual_seed(0)
    head, x = FAIMHead(D, C).eval(), torch.randn(1, D)
    ways = {
        "Linear": nn.Linear(D, C),
        "frozen Linear(D, D) + Linear": floor(D, C),
        "FAIM": head,
        "FAIM, FoldedHead(head)": FoldedHead(head),
        "FAIM, the order alone: to_linear(head)": to_linear(head),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for i in range(40 * rounds + 40):
            for name, way in ways.items():
                begin = time.perf_counter()
                way(x)
                if i >= 40:
                    times[name].append(time.perf_counter() - begin)
    print(f"\n### cpu, inference of one feature, D={D}, C={C}, medians of {40 * rounds} calls\n")
    print("| head | µs | ratio to Linear |")
    print("|---|---|---|")
    base = statistics.median(times["Linear"])
    for name in ways:
        median = statistics.median(times[name])
        print(f"| {name} | {median * 1e6:.0f} | {median / base:.2f} |", flush=True)


def _warm(step: Step, device: str) -> float:
    for _ in range(2):
        step()
    return seconds(step, device, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--eager", action="store_true", help="GPU: also the eager step")
    parser.add_argument("--precision", nargs="+", default=["tf32", "float32", "bf16"], help="GPU precisions")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    command = f"python benchmarks/head.py {' '.join(sys.argv[1:])}".strip()
    print(headline(command, cuda=cuda))
    fast = [name for name in HEADS if name != "literal formula"]
    if not cuda:
        table(256, 1000, 768, "cpu", "float32", "eager", args.rounds, list(HEADS))
        table(256, 21841, 768, "cpu", "float32", "eager", max(3, args.rounds // 4), list(HEADS)[:3])
        inference_table(768, 1000, args.rounds)
        inference_table(1280, 15, args.rounds)
        return
    for precision in args.precision:
        table(256, 1000, 768, "cuda", precision, "default", args.rounds, list(HEADS))
        table(1024, 21841, 768, "cuda", precision, "default", args.rounds, fast)
    if args.eager:
        for B, C in ((256, 200), (256, 1000), (1024, 21841)):
            table(B, C, 768, "cuda", "tf32", "eager", args.rounds, fast)


if __name__ == "__main__":
    main()
