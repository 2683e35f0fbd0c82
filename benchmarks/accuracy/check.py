"""Do the benchmark's shortcuts compute what the package computes? Random features; prints the largest differences.

python benchmarks/accuracy/check.py
"""

import closed_form
import torch
import trained
from running import RunningStatistics, WatchedHead, refresh_

from timm_faim import FAIMHead, fit_


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    N, C, D, shrinkage, lmbda = 240, 8, 48, 0.3, 0.1
    y = torch.arange(N) % C
    mix = torch.randn(D, D) / D**0.5
    x = torch.randn(C, D)[y] + torch.randn(N, D) @ mix + 2.0
    new = torch.randn(64, D) @ mix + 2.0

    head = FAIMHead(D, C, lambda_init=lmbda, margin=0.0).eval()
    fit_(head, [(x, y)], shrinkage)
    support = closed_form.Support(x[None], y, C)
    rotated = (new - support.centre_D) @ support.V_DD
    shortcut = closed_form.faim_indicatrix(support, new, rotated, shrinkage, lmbda)
    print(f"closed form, distances: {(head(new) / head.gamma() - shortcut).abs().max():.1e}")

    data = trained.TrainingSet.of(x[None], y, C)
    moved = trained.in_frame(data.full, False, scale=data.full.scale_init, margin=0.0).eval()
    gap = data.full.eval()(data.transform("faim_indicatrix_eye", new)) - moved(data.transform("faim_indicatrix", new))
    print(f"orthonormal frame, logits: {gap.abs().max():.1e}")
    running()


@torch.no_grad()
def running() -> None:
    """Moving sums against all features weighed at once, and a refresh from statistics that the head has already."""
    widths, C, decay, B, steps = {"mean": 40, "moments": 60}, 7, 0.9, 32, 30
    D, first = sum(widths.values()), widths["mean"]
    y = torch.arange(10 * B) % C
    x = torch.randn(C, D)[y] + torch.randn(len(y), D) @ torch.randn(D, D) / D**0.5
    head = WatchedHead(widths, C, scale=8.0, margin=0.1)
    head.start_(x, y)
    stats = RunningStatistics(head.faim, x, y, decay)
    mu = head.faim.mu.add_(0.1 * torch.randn(C, D)).clone()
    refresh_(head.faim, stats)
    print(f"refresh from the same moments, prototypes: {(head.faim.mu - mu).abs().max():.1e}")

    more, labels = torch.randn(steps * B, D) + 1.0, torch.randint(0, C, (steps * B,))
    for each, label in zip(more.split(B), labels.split(B), strict=True):
        stats.step(each, label)
    ages = torch.arange(steps).flip(0).repeat_interleave(B)
    start = torch.full((len(y),), B / (1.0 - decay) / len(y) * decay**steps, dtype=torch.float64)
    weights = torch.cat([start, decay ** ages.double()])
    x, y = torch.cat([x, more]).double(), torch.cat([y, labels])
    counts = x.new_zeros(C).index_add_(0, y, weights)
    means = x.new_zeros(C, D).index_add_(0, y, weights[:, None] * x) / counts[:, None]
    rows = (x - means[y]) * weights.sqrt()[:, None]
    within = rows.t() @ rows
    of_first = stats.second - means[:, :first].t() @ (means[:, :first] * counts[:, None])
    of_others = stats.scatters[0].rows.t() @ stats.scatters[0].rows
    print(f"moving sums, scatter of the first part: {(within[:first, :first] - of_first).abs().max():.1e}")
    print(f"moving sums, scatter of the second part: {(within[first:, first:] - of_others).abs().max():.1e}")


if __name__ == "__main__":
    main()
