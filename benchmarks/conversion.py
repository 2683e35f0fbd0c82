"""Linear classifiers as FAIM heads without training: how far the answers agree, in float32.

    python benchmarks/conversion.py --weights FILE --images DIR

FILE are timm's weights of tf_efficientnet_lite0 (or --model), DIR is a folder or a tar of photographs, one folder a
class (names do not matter). Every fifth photograph calibrates, the others measure. Without the two options only the
second table is printed: random weights of trained scale, on made-up features (timm_faim.head.convert.probe_features).

top-1: features of the same best class; top-5: share of the linear layer's five best classes among the head's five;
KL: mean divergence of the head's softmax from the layer's, whose logits are computed in float64.
"""

import argparse
import copy
import logging
import sys

import timm
import torch
from machine import headline
from timm.data import create_dataset, create_transform, resolve_model_data_config
from timm.data.readers import add_img_extensions
from torch import nn

from timm_faim import agreement, convert, faim_heads, from_linear, to_linear
from timm_faim.head.convert import probe_features
from timm_faim.head.tap import layer_inputs
from timm_faim.models.attach import classifier_layers

# architecture, classes, whether its bias is taken away
ARCHITECTURES = [
    ("resnet50", 1000, False),
    ("resnet50", 1000, True),
    ("resnet50", 21843, False),
    ("efficientnet_b0", 1000, False),
    ("mobilenetv3_large_100", 1000, False),
    ("resnetv2_50x1_bit", 1000, False),
    ("densenet121", 1000, False),
    ("dla46x_c", 100, False),
    ("dla46x_c", 1000, False),
    ("resnet18", 1000, True),
    ("regnetx_002", 1000, False),
    ("convnext_tiny", 1000, False),
    ("swin_tiny_patch4_window7_224", 1000, False),
    ("deit_small_distilled_patch16_224", 1000, False),
    ("levit_128s", 1000, False),
    ("volo_d1_224", 1000, False),
    ("crossvit_small_240", 1000, False),
    ("efficientvim_m1", 1000, False),
    ("vit_tiny_patch16_224", 100, False),
    ("vit_tiny_patch16_224", 1000, False),
]
SPREAD = 2.0  # of one image's logits over the classes
DECAY = 35.0  # of the singular values, largest to smallest: 7.7 to 0.22 in tf_efficientnet_lite0
PROBES = 2048


def table(header: list[str], align: str) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "|".join("---:" if a == "r" else "---" for a in align) + "|", flush=True)


def cells(got: dict[str, float]) -> str:
    return f"{got['top1']:.2f} | {got['top5']:.2f} | {got['kl']:.1e}"


def worst(results: list[dict[str, float]]) -> dict[str, float]:
    return {key: (max if key == "kl" else min)(r[key] for r in results) for key in ("top1", "top5", "kl")}


@torch.no_grad()
def real_images(name: str, weights: str, images: str) -> None:
    model = timm.create_model(name, checkpoint_path=weights).eval()
    data = resolve_model_data_config(model)
    add_img_extensions(".webp")
    dataset = create_dataset("", root=images, transform=create_transform(**data))
    loader = torch.utils.data.DataLoader(dataset, batch_size=64)
    linear = copy.deepcopy(model.get_classifier())
    x_ND = torch.cat([model.forward_head(model.forward_features(x), pre_logits=True) for x, _ in loader])
    every = torch.arange(len(x_ND)) % 5 == 0
    calibration, x_ND = x_ND[every], x_ND[~every]
    norm = x_ND.norm(dim=1).mean().item()
    heads = {
        "weights alone (`pretrained=True`, `convert(model)`)": from_linear(linear),
        "calibrated (`convert(model, batches)`)": from_linear(linear, features=calibration),
        "feature norm wrong by 1/3": from_linear(linear, feature_norm=norm / 3),
        "feature norm wrong by 3": from_linear(linear, feature_norm=norm * 3),
        "prior forced, weights alone": from_linear(linear, prior=True),
        "prior forced, calibrated": from_linear(linear, prior=True, features=calibration),
    }
    C, D = linear.weight.shape
    print(f"\n## {name}, real weights (C = {C}, D = {D}), {len(x_ND)} photographs, {len(calibration)} calibrate\n")
    table(["conversion", "top-1 %", "top-5 %", "KL", "γ"], "lrrrr")
    for label, head in heads.items():
        print(f"| {label} | {cells(agreement(head, linear, x_ND))} | {head.scale.item():.1f} |")
    head = heads["calibrated (`convert(model, batches)`)"]
    back = to_linear(head, calibration)
    print(f"| the calibrated head back as `nn.Linear`, against the head | {cells(agreement(head, back, x_ND))} | |")
    twin = convert(copy.deepcopy(model))
    batch = torch.stack([dataset[i][0] for i in range(0, len(dataset), max(1, len(dataset) // 64))])
    gap = (twin(batch).log_softmax(-1) - model(batch).log_softmax(-1)).abs().max().item()
    print(f"\nWhole model from weights alone, {len(batch)} photographs: log softmax differs by at most {gap:.2g}.")


@torch.no_grad()
def trained_scale(model: nn.Module, norms: dict[str, float], decay: float) -> None:
    for name, linear in classifier_layers(model).items():
        D = linear.weight.shape[1]
        scale_D = torch.logspace(0, -1, D, base=decay) if decay > 1 else torch.ones(D)
        scale_D *= SPREAD / norms[name] / scale_D.square().mean().sqrt()
        shape = linear.weight.shape
        linear.weight.copy_((torch.randn(shape[0], D) * scale_D).reshape(shape))
        if linear.bias is not None:
            linear.bias.normal_(std=0.1)


def feature_norms(model: nn.Module, images: torch.Tensor) -> dict[str, float]:
    layers = classifier_layers(model)
    ((inputs, _),) = layer_inputs(model, layers, [(images, None)])
    return {name: x.norm(dim=1 if isinstance(layers[name], nn.Conv2d) else -1).mean().item()
            for name, x in inputs.items()}  # fmt: skip


def _normalise_as_trained(model: nn.Module, images: torch.Tensor) -> None:
    """Batch norms measure their input, as after training; with their initial statistics features shrink to nothing."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model(images)
    model.eval()


@torch.no_grad()
def architecture(name: str, classes: int, bias_free: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes).eval()
    if bias_free:
        for layer in classifier_layers(model).values():
            layer.bias = None
    images = torch.randn(4, *resolve_model_data_config(model)["input_size"])
    _normalise_as_trained(model, images)
    norms = feature_norms(model, images)
    results = []
    for decay in (1.0, DECAY):
        trained_scale(model, norms, decay)
        layers = copy.deepcopy(classifier_layers(model))
        expected = model(images).log_softmax(-1)
        twin = convert(copy.deepcopy(model), [images])
        gap = (twin(images).log_softmax(-1) - expected).abs().max().item()
        heads = {key: from_linear(layer, prior=twin.faim_cfg["prior"]) for key, layer in layers.items()}
        probes = {key: probe_features(layer, PROBES) for key, layer in layers.items()}
        results.append(worst([agreement(heads[key], layers[key], probes[key]) for key in layers]))
    kind = "conv 1×1" if isinstance(next(iter(layers.values())), nn.Conv2d) else "linear"
    kind += ", no bias" if bias_free else ""
    widths = ", ".join(str(layer.weight.shape[1]) for layer in layers.values())
    prior = "yes" if twin.faim_cfg["prior"] else "no"
    assert len(faim_heads(twin)) == len(layers)
    flat, falling = map(cells, results)
    print(f"| {name} | {kind} | {classes} | {widths} | {prior} | {flat} | {falling} | {gap:.1g} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", metavar="FILE", help="timm's weights of --model")
    parser.add_argument("--images", metavar="DIR", help="folder or tar of photographs")
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    args = parser.parse_args()
    if bool(args.weights) != bool(args.images):
        parser.error("--weights and --images go together")
    logging.disable(logging.INFO)
    command = "python benchmarks/conversion.py" + (" --weights FILE --images DIR" if args.weights else "")
    print("# Linear classifiers converted in closed form\n")
    print(headline(command, cuda=False))
    if args.weights:
        real_images(args.model, args.weights, args.images)
    print(
        "\n## Random weights of trained scale\n\n"
        f"Converted from weights alone, measured on {PROBES} made-up features; the worst of several heads. W has two\n"
        "spectra: flat, the worst case for the prior, which loses the direction of least spread, and falling by\n"
        f"{DECAY:g} from the largest to the smallest, as in tf_efficientnet_lite0. Last column: largest difference of\n"
        "the whole model's log softmax on 4 random images, which calibrate it too (falling spectrum).\n"
    )
    header = ["model", "classifier", "C", "D", "prior", "flat: top-1 %", "top-5 %", "KL"]
    table([*header, "falling: top-1 %", "top-5 %", "KL", "model"], "llrrlrrrrrrr")
    for case in ARCHITECTURES:
        architecture(*case)
    print("\nVOLO adds the largest auxiliary logits over the tokens, comparing features: that part is not kept.")


if __name__ == "__main__":
    sys.exit(main())
