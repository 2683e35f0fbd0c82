"""pytorch-grad-cam: where a CNN looks when it gives a class its logit.

    pip install timm-faim grad-cam
    python examples/grad_cam.py --save maps.png

The target is the class's logit, -γ times the distance to its prototype, so a map shows what draws the feature towards
the prototype. Grad-CAM as its authors describe it (Selvaraju et al. 2017); the other methods of the library are called
the same way.
"""

import numpy as np
import timm
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from sample import class_names, loaders, parse, parser, train_epochs
from torch import nn

import timm_faim


def main(argv: list[str] | None = None):
    options = parser(__doc__, img_size=64)
    options.add_argument("--layer", help="name of the module whose maps are weighed (default: the last but one stage)")
    options.add_argument("--save", metavar="FILE", help="write the first images under their maps")
    args = parse(options, argv)
    names = class_names(args)
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=len(names))
    train, val = loaders(args, model)
    timm_faim.fit_(model, train)
    train_epochs(model, train, args.epochs, timm_faim.TargetMargin(nn.CrossEntropyLoss(), model))
    timm_faim.fit_(model, train).eval()

    # The last stage, which is usual for photographs of 224 pixels, has 2 x 2 positions here.
    layer = args.layer or model.feature_info[-2]["module"]
    images, targets = next(iter(val))
    with GradCAM(model=model, target_layers=[model.get_submodule(layer)]) as cam:
        maps = cam(input_tensor=images, targets=[ClassifierOutputTarget(k) for k in targets.tolist()])

    least, most = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    pictures = ((images - least) / (most - least)).permute(0, 2, 3, 1).numpy()
    ink = pictures.mean(-1) < 0.5
    share = maps[ink].sum() / maps.sum()
    print(f"maps of {len(maps)} images from {layer}")
    print(f"{100 * share:.1f} % of their weight lies on dark pixels, which are {100 * ink.mean():.1f} % of the images")
    if args.save:
        row = [show_cam_on_image(*pair, use_rgb=True) for pair in zip(pictures[:8], maps[:8], strict=True)]
        Image.fromarray(np.concatenate(row, axis=1)).save(args.save)
    return maps, images


if __name__ == "__main__":
    main()
