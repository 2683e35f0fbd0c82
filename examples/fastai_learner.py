"""fastai: a Learner whose model keeps its FAIM head, with fastai's freezing, learning rates by group and predictions.

    pip install timm-faim fastai
    python examples/fastai_learner.py

``vision_learner(dls, "faim_...")`` is not the way: it takes the backbone alone and puts a linear head of fastai on it,
without a word. Give ``Learner`` the model instead.
"""

import fastai.vision.all as fv
import timm
import torch
from sample import class_names, parse, parser
from torch import nn

import timm_faim


class PlainBatches:
    """fastai's batches as plain tensors, which a closed-form fit needs; they can be read again, as moments need."""

    def __init__(self, loader) -> None:
        self.loader = loader

    def __iter__(self):
        return (tuple(x.as_subclass(torch.Tensor) for x in batch) for batch in self.loader)


def same(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output


class MarginLoss(fv.CrossEntropyLossFlat):
    """fastai's cross entropy, with its softmax and argmax for predictions, after the head's margin."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.margin = timm_faim.TargetMargin(same, model)

    def __call__(self, output, target, **kwargs):
        return super().__call__(self.margin(output, target), target, **kwargs)


def backbone_and_head(model: nn.Module) -> list[list[nn.Parameter]]:
    """Groups for freeze() and slice(lr), of what learns alone: unfreeze() would let the centre and Σ learn as well."""
    head = {id(p) for head in timm_faim.faim_heads(model).values() for p in head.parameters()}
    learning = fv.trainable_params(model)
    return [[p for p in learning if id(p) not in head], [p for p in learning if id(p) in head]]


def open_images(args) -> fv.DataLoaders:
    names, config = class_names(args), timm.models.get_pretrained_cfg(args.model)
    block = fv.DataBlock(
        (fv.ImageBlock, fv.CategoryBlock(vocab=names, sort=False)),  # timm's order; by itself fastai takes another
        get_items=lambda root: [path for path in fv.get_image_files(root) if fv.parent_label(path) in names],
        splitter=fv.GrandparentSplitter("train", "val"),
        get_y=fv.parent_label,
        item_tfms=fv.Resize(args.img_size, fv.ResizeMethod.Squish),
        batch_tfms=fv.Normalize.from_stats(config.mean, config.std),
    )
    return block.dataloaders(args.data_dir, bs=16, num_workers=0)


def main(argv: list[str] | None = None) -> fv.Learner:
    args = parse(parser(__doc__), argv)
    dls = open_images(args)
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=dls.c)
    images = PlainBatches(dls.train.new(shuffle=False, drop_last=False))
    timm_faim.fit_(model, images)
    learn = fv.Learner(dls, model, MarginLoss(model), splitter=backbone_and_head, metrics=fv.accuracy)
    print(f"head in closed form: {100 * learn.validate()[1]:.1f} % of the validation images right")
    learn.fit_one_cycle(args.epochs, slice(3e-3, 1e-2))  # with --pretrained weights: learn.fine_tune(args.epochs)
    timm_faim.fit_(model, images)
    print(f"after {args.epochs} epochs: {100 * learn.validate()[1]:.1f} %")
    return learn


if __name__ == "__main__":
    main()
