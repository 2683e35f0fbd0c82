"""What the tests of fitted classifiers share: a tiny backbone on disk, and `timm-faim fit` in this process."""

from pathlib import Path

import runs
import timm
import torch
from safetensors.torch import save_file

from timm_faim.commands import run_command

QUICK = ["--img-size", "32", "--batch-size", "4", "--workers", "0", "--no-report"]


def save_backbone(path: Path, model: str = "test_resnet") -> Path:
    """Weights of a tiny timm model with batch-norm statistics of noise, as a file for --pretrained-path."""
    torch.manual_seed(1)
    made = timm.create_model(model, num_classes=0).train()
    with torch.no_grad():
        for _ in range(20):
            made(torch.randn(16, 3, 32, 32))
    save_file({name: tensor.contiguous() for name, tensor in made.state_dict().items()}, path)
    return path


def fit(data: Path, output: Path, backbone: Path, *argv: object, experiment: str = "run", model="faim_test_resnet"):
    """One fit; its run folder."""
    runs.fresh_accelerator()
    words = ["--output", output, "--experiment", experiment, "--model", model, "--pretrained-path", backbone]
    words += ["--cache", output / "cache", *QUICK, "--crop-mode", "model", *argv]
    run_command("fit", [str(word) for word in (data, *words)])
    return output / experiment
