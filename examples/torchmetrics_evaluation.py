"""torchmetrics in an evaluation loop: accuracy, calibration error and the classes that are taken for each other.

    pip install timm-faim torchmetrics
    python examples/torchmetrics_evaluation.py

A FAIM model gives logits as every classifier does, so nothing is particular here. They are all negative (-γ times a
distance): give softmax's probabilities to what wants some.
"""

import timm
import torch
from sample import class_names, loaders, parse, parser, top1, train_epochs
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

import timm_faim


@torch.inference_mode()
def evaluate(model: nn.Module, batches, num_classes: int) -> dict[str, torch.Tensor]:
    """`top1` (a share of all images), `mean_class_top1`, `ece` (15 bins), all in 0..1, and `confusion` [C, C]."""
    metrics = MetricCollection(
        {
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "mean_class_top1": MulticlassAccuracy(num_classes, average="macro"),
            "ece": MulticlassCalibrationError(num_classes, n_bins=15, norm="l1"),
            "confusion": MulticlassConfusionMatrix(num_classes),
        }
    )
    model.eval()
    for images, targets in batches:
        metrics.update(model(images).softmax(1), targets)
    return metrics.compute()


def main(argv: list[str] | None = None):
    args = parse(parser(__doc__), argv)
    names = class_names(args)
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=len(names))
    train, val = loaders(args, model)
    timm_faim.fit_(model, train)
    print(f"head in closed form: {top1(model, val):.1f} % of the validation images right")
    train_epochs(model, train, args.epochs, timm_faim.TargetMargin(nn.CrossEntropyLoss(), model))
    timm_faim.fit_(model, train)

    found = evaluate(model, val, len(names))
    print(f"after {args.epochs} epochs: {100 * found['top1']:.1f} %, calibration error {100 * found['ece']:.1f} %")
    mistakes = found["confusion"] - found["confusion"].diag().diag()
    for place in mistakes.flatten().argsort(descending=True, stable=True)[:3].tolist():
        true, said = divmod(place, len(names))
        print(f"{names[true]} taken for {names[said]}: {mistakes[true, said]} of {found['confusion'][true].sum()}")
    return model, val, found


if __name__ == "__main__":
    main()
