"""Do the benchmark's shortcuts compute what the package computes? Random features; prints the largest differences.

python benchmarks/accuracy/check.py
"""

import closed_form
import torch
import trained

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


if __name__ == "__main__":
    main()
