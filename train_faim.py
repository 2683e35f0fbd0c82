#!/usr/bin/env python3
"""Train a FAIM model, or any timm model, on real images.

    accelerate launch train_faim.py                                       # the bundled Omniglot characters
    accelerate launch train_faim.py --data-dir DIR --model faim_resnet50 --pretrained
    python train_faim.py --model resnet10t                                # the linear baseline, same script

The run folder gets summary.csv, learning_curve.png, args.yaml, config.json, last.safetensors and
model_best.safetensors.
"""
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.utils import ModelEmaV3, distribute_bn, random_seed

from timm_faim import faim_heads, set_damping
from timm_faim.training import factories
from timm_faim.training.args import parse_args
from timm_faim.training.checkpoint import BEST, save_config, save_weights
from timm_faim.training.data import build_fit_loader, build_loaders, count_unreadable, open_datasets, set_epoch
from timm_faim.training.errors import UserError, report
from timm_faim.training.files import create_run_folder
from timm_faim.training.loop import evaluate, train_one_epoch
from timm_faim.training.report import append_summary, draw_learning_curve, epoch_line, head_metrics, save_args


def train(argv: Sequence[str]) -> None:
    """One run, from the command line to the saved model."""
    args = parse_args(argv)
    factories.check_model_name(args.model)

    # Accelerate decides the device and the number of processes; --amp and --torchcompile go before its own settings.
    accelerator = Accelerator(
        mixed_precision={"float16": "fp16", "bfloat16": "bf16"}[args.amp_dtype] if args.amp else None,
        dynamo_backend=args.torchcompile,
    )
    factories.share_out_cores(args, accelerator)
    world, is_main = accelerator.num_processes, accelerator.is_main_process
    log = print if is_main else lambda *_, **__: None
    logging.basicConfig(level=logging.WARNING if is_main else logging.ERROR, format="%(name)s: %(message)s")

    # The same seed everywhere for the weights; another one per process, below, for the augmentation.
    random_seed(args.seed, 0)
    data = open_datasets(args, factories.input_channels(args))
    model = factories.build_model(args, data.num_classes)
    data_config = factories.build_data_config(args, model)
    train_loader, val_loader = build_loaders(args, data, data_config, accelerator)

    criterion = factories.build_criterion(args, model)
    mixup = factories.build_mixup(args, data.num_classes)
    model.to(accelerator.device)
    optimizer = factories.build_optimizer(args, model, world)
    scheduler, epochs = factories.build_scheduler(args, optimizer, len(train_loader))

    # Everything that a wrong option can break is built; from here on there is work to keep.
    run_folder = prepare_run_folder(args, accelerator, data_config["input_size"][-1])
    if is_main:
        save_args(args, run_folder / "args.yaml")
        save_config(model, run_folder / "config.json", data_config, data.label_names, args.pretrained)
    if args.head_init == "data" and faim_heads(model):
        log("heads from class statistics of the training data")
        factories.fit_heads_to(model, build_fit_loader(args, data_config, accelerator), accelerator)
    random_seed(args.seed, accelerator.process_index)

    # The average copies the bare model: `prepare` below patches its forward and may wrap it.
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    bare_model = model
    model, optimizer = accelerator.prepare(model, optimizer)
    evaluated = ema.module if ema else bare_model
    damping = getattr(bare_model, "faim_cfg", {}).get("damping", 0.0)

    log(f"{args.model}: {sum(p.numel() for p in bare_model.parameters()) / 1e6:.2f} M parameters, "
        f"{data.num_classes} classes, {len(data.train)} training and {len(data.val)} validation images, "
        f"input {'x'.join(map(str, data_config['input_size']))}; {world} x {accelerator.device.type}; "
        f"lr {args.lr:.3g}; run folder {run_folder}")

    best, history, started = -1.0, [], time.perf_counter()
    try:
        for epoch in range(epochs):
            set_epoch(train_loader, epoch)
            if args.damp_epochs:
                set_damping(bare_model, max(damping, 1 - epoch / args.damp_epochs))
            trained = train_one_epoch(
                epoch, model, train_loader, criterion, optimizer, scheduler, accelerator, args, run_folder, mixup, ema,
            )
            if args.damp_epochs:
                set_damping(bare_model, damping)  # evaluate what a saved and reopened model computes
            if world > 1 and args.dist_bn:
                distribute_bn(evaluated, world, reduce=args.dist_bn == "reduce")
            validated = evaluate(evaluated if ema else model, val_loader, accelerator, args)
            if not math.isfinite(validated["loss"]):
                raise UserError(f"the validation loss is {validated['loss']} after epoch {epoch + 1}. Checkpoints of "
                                f"earlier epochs are kept in {run_folder}. Try a lower --lr or --clip-grad")
            unreadable = count_unreadable((train_loader, val_loader), accelerator) if args.skip_unreadable else 0

            lr = sum(group["lr"] for group in optimizer.param_groups) / len(optimizer.param_groups)
            if scheduler is not None:
                scheduler.step(epoch + 1, validated["top1"])
            is_best, best = validated["top1"] > best, max(best, validated["top1"])
            if is_main:
                trained.update(head_metrics(evaluated))
                save_weights(evaluated, run_folder, is_best)
                append_summary(run_folder / "summary.csv", epoch, trained, validated, lr)
                history.append({f"{part}_{key}": metrics[key] for key in ("loss", "top1")
                                for part, metrics in (("train", trained), ("eval", validated))})
                drawn = draw_learning_curve(run_folder / "learning_curve.png", history)
                log(epoch_line(epoch, epochs, trained, validated, is_best))
                if unreadable:
                    log(f"           {unreadable} unreadable images left out so far")
                if epoch == 0 and not drawn:
                    log("no learning_curve.png: matplotlib is not installed (pip install 'timm-faim[train]')")
    except KeyboardInterrupt:
        kept = f"{len(history)} finished epochs are kept in {run_folder}" if history else "no epoch was finished"
        log(f"\nstopped by Ctrl-C in epoch {len(history) + 1}; {kept}")
        sys.exit(130)

    seconds = time.perf_counter() - started
    log(f"best validation top-1 {best:.2f} % after {seconds:.0f} s; weights in {run_folder / BEST}")
    log(f"load it: import timm, timm_faim; model = timm.create_model('local-dir:{run_folder}', pretrained=True)")
    accelerator.end_training()


def prepare_run_folder(args, accelerator: Accelerator, img_size: int) -> Path:
    """The main process makes the folder; the others learn its name."""
    name = [None]
    if accelerator.is_main_process:
        name[0] = str(create_run_folder(args.output, args.experiment, args.model, img_size))
    return Path(broadcast_object_list(name)[0])


def main() -> None:
    """Entry point: a person's mistakes come out as one line and exit status 1."""
    try:
        train(sys.argv[1:])
    except UserError as error:
        report(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
