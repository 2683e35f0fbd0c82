"""Time and memory of contrastive losses: forward + backward with FAIM distance, against cosine in the same run.

    python benchmarks/losses.py                     # CPU tables
    python benchmarks/losses.py --device cuda       # GPU tables, eager and under torch.compile

"cosine" is SupCon (or NT-Xent) as one would write it in PyTorch, with one matrix of similarities; "cosine, these
blocks" is this package's loss with cosine in place of the distance; then SupConLoss of pytorch-metric-learning.
Losses are timed in turn, round after round; medians and ratios to "cosine" are over the rounds. Memory is the peak
above embeddings, parameters and their gradients, in units of one matrix (B·B·4 bytes). Embeddings are normalised in all
of them, 4 to a class.
"""

import argparse
import statistics
import sys

import torch
from head import peak_bytes, seconds
from machine import headline
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import SupConLoss
from torch import nn
from torch.nn import functional as F

from timm_faim import FAIMInfoNCELoss, FAIMMetric

TEMPERATURE = 0.1


class CosineLoss(nn.Module):
    """The losses written down with one matrix of cosines."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x, labels):
        x = F.normalize(x)
        logits = x @ x.t() / TEMPERATURE
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
        positive = (labels[:, None] == labels) & ~itself
        if self.form == "supcon":
            log_p = logits - logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
            return -(log_p.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)).mean()
        negatives = logits.masked_fill(positive | itself, -torch.inf).logsumexp(1, keepdim=True)
        return F.softplus(negatives - logits).masked_fill(~positive, 0.0).sum() / positive.sum()


class CosineMetric(FAIMMetric):
    """Cosine similarity in the place of a distance, for the same loss code."""

    def forward(self, x, y, scale):
        return x @ y.t() * -scale


class Step:
    """One step of a loss on fixed embeddings, which want a gradient as behind a backbone."""

    def __init__(self, loss: nn.Module, B: int, D: int, device: str, compiled: bool) -> None:
        torch.manual_seed(0)
        self.head = loss.to(device)
        if isinstance(loss, FAIMInfoNCELoss):
            loss.metric.to(device)  # one that is shared is no part of the loss
        self.loss = torch.compile(self.head) if compiled else self.head
        self.x = torch.randn(B, D, device=device, requires_grad=True)
        self.labels = torch.arange(B, device=device) // 4

    def __call__(self):
        self.x.grad = None
        self.head.zero_grad()
        self.loss(self.x, self.labels).backward()

    def gradient_bytes(self):
        tensors = [self.x, *self.head.parameters()]
        return sum(t.grad.numel() * t.grad.element_size() for t in tensors if t.grad is not None)


def losses(D: int, form: str) -> dict[str, nn.Module]:
    """The losses of one form by name; the first is the one to compare with."""
    options = {"temperature": TEMPERATURE, "form": form, "normalize": True}
    made = {
        "cosine": CosineLoss(form),
        "cosine, these blocks": FAIMInfoNCELoss(CosineMetric(D, lambda_init=0), **options),
        "FAIM diagonal": FAIMInfoNCELoss(in_features=D, **options),
        "FAIM full": FAIMInfoNCELoss(FAIMMetric(D, full_sigma=True), **options),
    }
    if form == "supcon":  # its NT-Xent loss makes a matrix of positive pairs by negative pairs
        made["pytorch-metric-learning, cosine"] = SupConLoss(TEMPERATURE, distance=CosineSimilarity())
    return made


def table(B: int, D: int, form: str, device: str, rounds: int, compiled: bool) -> None:
    steps = {name: Step(loss, B, D, device, compiled) for name, loss in losses(D, form).items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    calls = 10 if device == "cuda" else 1
    for i in range(rounds + 1):
        for name, step in steps.items():
            spent = seconds(step, device, calls)
            if i:  # the first round warms up
                times[name].append(spent)
    how = "torch.compile" if compiled else "eager"
    print(f"\n### {form}, {device}, {how}, B={B}, D={D}, float32, medians of {rounds} rounds\n")
    print("| loss | ms | ratio to cosine | ratio to cosine in these blocks | peak memory, B·B·4 bytes |")
    print("|---|---|---|---|---|")
    for name, step in steps.items():
        against = [
            statistics.median(t / base for t, base in zip(times[name], times[other], strict=True))
            for other in list(steps)[:2]
        ]
        memory = peak_bytes(step, device) / (B * B * 4)
        print(
            f"| {name} | {statistics.median(times[name]) * 1e3:.2f} | {against[0]:.2f} | {against[1]:.2f} | "
            f"{memory:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=4096, help="number of embeddings B")
    parser.add_argument("--features", type=int, default=768, help="width of the embeddings D")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    print(headline(f"python benchmarks/losses.py {' '.join(sys.argv[1:])}".strip(), cuda=cuda))
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, for all of them
    for form in ("ntxent", "supcon"):
        for compiled in (False, True) if cuda else (False,):
            table(args.batch, args.features, form, args.device, args.rounds, compiled)


if __name__ == "__main__":
    main()
