"""Machines, the run, its checkpoints and its logs."""

import os

from timm_faim.run.numbers import SHARE, whole
from timm_faim.run.parser import Flag, Off, Parser


def device(parser: Parser) -> None:
    add = parser.add_argument_group("precision, processes and batch norm").add_argument
    add("--amp", action=Flag, default=False, help="mixed precision (default: what `accelerate launch` says)")
    add("--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="low precision type of --amp")
    add("--model-dtype", choices=("float32", "bfloat16", "float16"), help="type of the weights, without --amp")
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile")
    add(
        "--torchcompile-mode",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        help="mode of torch.compile",
    )
    add("--fsdp", action=Flag, default=False, help="shard parameters, gradients and optimiser over the processes")
    add("--no-ddp-bb", action=Off, help="do not broadcast buffers before every step")
    add("--sync-bn", action=Flag, default=False, help="batch norm over the batches of all processes (GPUs only)")
    add(
        "--dist-bn",
        default="reduce",
        choices=("reduce", "broadcast", ""),
        help="how processes agree on batch-norm statistics before an evaluation",
    )
    add("--split-bn", action=Flag, default=False, help="separate batch norm for each split of the batch")
    add(
        "--cpu-threads",
        type=whole(1, max(256, os.cpu_count() or 1)),
        metavar="N",
        help="threads per process on the CPU (default: the cores shared out; `accelerate launch` alone leaves one)",
    )


def run(parser: Parser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("-b", "--batch-size", type=whole(1), default=128, metavar="N", help="images per process and step")
    add("-vb", "--validation-batch-size", type=whole(1), metavar="N", help="the same in validation")
    add("--model-ema", action=Flag, default=False, help="average the weights; the average is evaluated and saved")
    add("--model-ema-decay", type=SHARE, default=0.9998, help="decay of the average")
    add("--model-ema-warmup", action=Flag, default=False, help="raise the decay over the first updates")
    add("--seed", type=whole(0, 2**31 - 1), default=42, help="random seed; each sample draws from its place in the run")
    add("--output", default="./output", metavar="DIR", help="folder of runs")
    add("--experiment", default="", metavar="NAME", help="folder of this run (default: time, model and size)")
    add("--val-interval", type=whole(1), default=1, metavar="N", help="epochs between validations")
    add(
        "--eval-metric",
        metavar="NAME",
        help="what makes an epoch the best: top1, top5 or loss, or with --multi-label map, micro_f1, macro_f1, "
        "sample_f1 or loss (default: top1, map, or loss without validation)",
    )
    add("--eval-only", action=Flag, default=False, help="evaluate on the validation data, do not train")
    add(
        "--dry-run",
        action=Flag,
        default=False,
        help="try two updates and a validation batch, and tell what the run would do",
    )


def resume(parser: Parser) -> None:
    add = parser.add_argument_group("checkpoints").add_argument
    add(
        "--resume",
        default="",
        metavar="PATH",
        help="go on from a run folder or one of its checkpoints; without --config its args.yaml is the recipe. auto: "
        "from the unfinished run with these options, if there is one",
    )
    add("--no-resume-opt", action=Off, help="resume without the state of the optimiser")
    add(
        "--start-epoch",
        type=whole(0),
        metavar="N",
        help="number of the first epoch, from 0 (default: 0, or as resumed)",
    )
    add("--stop-epoch", type=whole(1), metavar="N", help="stop when N epochs are done, to be resumed later")
    add(
        "--recovery-interval", type=whole(0), default=0, metavar="N", help="updates between checkpoints within an epoch"
    )
    add(
        "--checkpoint-hist", type=whole(1), default=10, metavar="N", help="number of best epochs whose weights are kept"
    )


def logging(parser: Parser) -> None:
    add = parser.add_argument_group("logging").add_argument
    add("--log-interval", type=whole(1), default=50, metavar="N", help="steps between updates of the progress bar")
    add("--log-with", nargs="*", default=[], metavar="NAME", help="trackers, for example tensorboard wandb mlflow")
    add("--project-name", metavar="NAME", help="project of the trackers")
    add("--log-wandb", action=Flag, default=False, help="the same as --log-with wandb")
    add("--wandb-project", metavar="NAME", help="project of wandb (default: --project-name)")
    add("--wandb-tags", nargs="*", default=[], metavar="TAG", help="tags of the run in wandb")
    add("--wandb-resume-id", default="", metavar="ID", help="with --resume: the run's id in wandb")
    add("--report", action=Flag, default=True, help="write an HTML page about the run")
    add("--push-to-hub", default="", metavar="ORG/NAME", help="publish the finished run on the Hugging Face Hub")
    add("--hub-private", action=Flag, default=False, help="with --push-to-hub: make a private repository")
    add("--hub-license", metavar="ID", help="with --push-to-hub: licence of the weights, for example apache-2.0")
