"""captum: which pixels bring an image nearer to its class than to a look-alike.

    pip install timm-faim captum
    python examples/captum_attributions.py --image 3

Integrated gradients of the difference of two distances, d(x, rival) - d(x, class), from a blank page to the image. The
attributions of all pixels sum to what the difference gains on the way (completeness; Sundararajan et al. 2017).
"""

import timm
import torch
from captum.attr import IntegratedGradients
from PIL import Image
from sample import class_names, loaders, parse, parser, train_epochs
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

import timm_faim
from timm_faim.run.options import whole


class Nearer(nn.Module):
    """By how much images [B, 3, H, W] are nearer to one prototype than to another: d(x, rival) - d(x, own) [B].

    The logits are -γ d (of a head without a class prior), so distances are the logits over -γ.
    """

    def __init__(self, model: nn.Module, own: int, rival: int) -> None:
        super().__init__()
        self.model, self.own, self.rival = model, own, rival

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        distances = -self.model(images) / self.model.get_classifier().gamma()
        return distances[:, self.rival] - distances[:, self.own]


def main(argv: list[str] | None = None):
    options = parser(__doc__)
    options.add_argument(
        "--image", type=whole(0, 10**9), default=0, help="number of the validation image (default: %(default)s)"
    )
    options.add_argument("--steps", type=whole(1, 10**5), default=128, help="of the integral (default: %(default)s)")
    args = parse(options, argv)
    names = class_names(args)
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=len(names))
    train, val = loaders(args, model)
    if args.image >= len(val.dataset):
        options.error(f"--image must be below {len(val.dataset)}, the number of validation images, got {args.image}")
    timm_faim.fit_(model, train)
    train_epochs(model, train, args.epochs, timm_faim.TargetMargin(nn.CrossEntropyLoss(), model))
    timm_faim.fit_(model, train).eval()

    image = val.dataset[args.image][0].unsqueeze(0)
    blank = val.dataset.transform(Image.new("RGB", (args.img_size, args.img_size), "white")).unsqueeze(0)
    with torch.no_grad():
        own, rival = model(image).topk(2).indices[0].tolist()
    nearer = Nearer(model, own, rival)
    attributions = IntegratedGradients(nearer).attribute(image, blank, n_steps=args.steps, internal_batch_size=64)
    with torch.no_grad():
        gain = float(nearer(image) - nearer(blank))
        print(f"{names[own]} rather than {names[rival]}: nearer by {float(nearer(image)):.3f}")
    print(f"gain over a blank page {gain:.3f}, attributions sum to {float(attributions.sum()):.3f}")
    grid = adaptive_avg_pool2d(attributions.sum(1), 4)[0] * attributions[0, 0].numel() / 16
    print("by place (positive: speaks for the class, negative: for the rival)")
    for row in grid.tolist():
        print(" ".join(f"{value:+.3f}" for value in row))
    return attributions, gain


if __name__ == "__main__":
    main()
