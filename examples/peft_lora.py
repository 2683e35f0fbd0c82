"""peft: LoRA in the backbone of a vision transformer, the FAIM head saved beside it, and both opened again.

    pip install timm-faim peft
    python examples/peft_lora.py --model faim_vit_small_patch16_224 --pretrained --img-size 224

Without --pretrained the backbone is random. Then there is nothing worth adapting, and the validation images say
little: only the training images show that the adapters learn.
"""

import copy
from pathlib import Path

import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sample import class_names, loaders, parse, parser, top1, train_epochs
from torch import nn

import timm_faim


def with_lora(model: nn.Module, rank: int = 8) -> tuple[PeftModel, timm_faim.FAIMHead]:
    """A timm ViT with adapters, of which nothing else learns than these and the head; and that head."""
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["qkv", "proj", "fc1", "fc2"], modules_to_save=["head"]
    )
    learned = {name for name, parameter in model.head.named_parameters() if parameter.requires_grad}
    adapted = get_peft_model(model, config)
    # peft trains and saves a copy of the head, and makes all of it learn: centre and Σ too, which come from data.
    head = adapted.base_model.model.head.modules_to_save["default"]
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name in learned)
    return adapted, head


def main(argv: list[str] | None = None):
    options = parser(__doc__, model="faim_test_vit", img_size=64, epochs=20)
    options.add_argument("--output", default="output/lora", help="folder of the adapter (default: %(default)s)")
    args = parse(options, argv)
    names = class_names(args)
    base = timm.create_model(args.model, pretrained=args.pretrained, num_classes=len(names), img_size=args.img_size)
    train, val = loaders(args, base)
    timm_faim.fit_(base, train)  # before peft copies the head
    print(
        f"start: {top1(base, train):.1f} % of the training and {top1(base, val):.1f} % of the validation images right"
    )

    model, head = with_lora(copy.deepcopy(base))
    criterion = timm_faim.TargetMargin(nn.CrossEntropyLoss(), head)  # of the head, as the model holds two
    train_epochs(model, train, args.epochs, criterion, lr=1e-3)
    print(f"LoRA:  {top1(model, train):.1f} % and {top1(model, val):.1f} %")

    model.save_pretrained(args.output)
    size = sum(path.stat().st_size for path in Path(args.output).glob("*.safetensors"))
    learning, total = model.get_nb_trainable_parameters()
    print(f"{learning} of {total} parameters learned; the adapter with the head takes {size / 1e3:.0f} kB")
    again = PeftModel.from_pretrained(copy.deepcopy(base), args.output).eval()
    images = next(iter(val))[0]
    with torch.no_grad():
        difference = float((again(images) - model(images)).abs().max())
    print(f"opened again, logits differ by {difference:.1e} at most")
    return base, model, again, images


if __name__ == "__main__":
    main()
