"""Lightning: a LightningModule with the head's margin, its closed-form start, and the closed form again at the end.

    pip install timm-faim lightning
    python examples/lightning_module.py
    python examples/lightning_module.py --resume output/lightning/last.ckpt --epochs 12

On several devices the processes sum their statistics, and each head is the same.
"""

from pathlib import Path

import lightning as L
import timm
from lightning.pytorch.callbacks import ModelCheckpoint
from sample import class_names, loaders, parse, parser
from timm.optim import create_optimizer_v2
from torch import nn

import timm_faim


class Classifier(L.LightningModule):
    """A FAIM model in training; ``images``, batches (images, class indices), set its head at the start and the end."""

    def __init__(self, name: str, num_classes: int, images=None, pretrained: bool = False, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["images"])
        self.model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
        self.criterion = timm_faim.TargetMargin(nn.CrossEntropyLoss(), self.model)
        self.images = images

    def forward(self, images):
        return self.model(images)

    def on_fit_start(self):
        # A hook in which the model is on its device and the processes know each other. A checkpoint has been loaded by
        # now, and its head has to stay.
        if self.images is not None and self.trainer.ckpt_path is None:
            timm_faim.fit_(self.model, self.images)

    def on_fit_end(self):
        if self.images is not None:
            timm_faim.fit_(self.model, self.images)

    def training_step(self, batch, _):
        return self.criterion(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        images, targets = batch
        right = self(images).argmax(1) == targets
        self.log("val_top1", 100 * right.float().mean(), batch_size=len(targets), sync_dist=True)

    def configure_optimizers(self):
        return create_optimizer_v2(self.model, "adamw", lr=self.hparams.lr, weight_decay=0.05)


def main(argv: list[str] | None = None):
    options = parser(__doc__)
    options.add_argument("--output", default="output/lightning", help="folder of what is saved (default: %(default)s)")
    options.add_argument("--devices", default="auto", help="how many (default: all GPUs, or one process on the CPU)")
    options.add_argument("--resume", metavar="FILE", help="go on from this checkpoint")
    args = parse(options, argv)
    names = class_names(args)
    module = Classifier(args.model, len(names), pretrained=args.pretrained)
    train, val = loaders(args, module.model)
    module.images = train
    last = ModelCheckpoint(args.output, save_top_k=0, save_last=True, enable_version_counter=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(max_epochs=args.epochs, devices=args.devices, callbacks=[last], **quiet)
    trainer.fit(module, train, val, ckpt_path=args.resume)
    found = trainer.validate(module, val, verbose=False)[0]["val_top1"]
    if trainer.is_global_zero:
        print(f"{found:.1f} % of the validation images right")
        timm_faim.save_model(module.model, Path(args.output, "model"), names)
        print(f'open it with timm.create_model("local-dir:{args.output}/model", pretrained=True)')
    return module, trainer


if __name__ == "__main__":
    main()
