"""Accelerate as the options ask for it: precision, compilation, sharding and experiment trackers."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, TorchDynamoPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from timm_faim import FAIMChart
from timm_faim.models.attach import timm_class
from timm_faim.run.errors import UserError
from timm_faim.run.options import available_cores, flag, option, whole

if TYPE_CHECKING:
    from timm_faim.training.options import Options


@dataclass
class DeviceOptions:
    """Precision, processes and batch norm."""

    amp: bool = flag("mixed precision (default: what `accelerate launch` says)", marks="usual")
    amp_dtype: str = option("low precision type of --amp", "float16", choices=("float16", "bfloat16"))
    model_dtype: str | None = option("type of the weights, without --amp", choices=("float32", "bfloat16", "float16"))
    torchcompile: str | None = option("torch.compile", metavar="BACKEND", nargs="?", const="inductor")
    torchcompile_mode: str | None = option(
        "mode of torch.compile", choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    )
    fsdp: bool = flag("shard parameters, gradients and optimiser over the processes", marks="training")
    no_ddp_bb: bool = flag("do not broadcast buffers before every step")
    sync_bn: bool = flag("batch norm over the batches of all processes (GPUs only)", marks="training")
    dist_bn: str = option(
        "how processes agree on batch-norm statistics before an evaluation",
        "reduce",
        choices=("reduce", "broadcast", ""),
    )
    split_bn: bool = flag("separate batch norm for each split of the batch", marks="training")
    cpu_threads: int | None = option(
        "threads per process on the CPU (default: the cores shared out; `accelerate launch` alone leaves one)",
        None,
        whole(1, max(256, os.cpu_count() or 1)),
        "N",
        marks="runtime",
    )


@dataclass
class LoggingOptions:
    """Logging."""

    log_interval: int = option("steps between updates of the progress bar", 50, whole(1), "N", marks="runtime")
    log_with: list[str] = option(
        "trackers, for example tensorboard wandb mlflow", [], metavar="NAME", nargs="*", marks="training runtime"
    )
    project_name: str | None = option("project of the trackers", metavar="NAME", marks="runtime")
    log_wandb: bool = flag("the same as --log-with wandb", marks="training runtime")
    wandb_project: str | None = option(
        "project of wandb (default: --project-name)", metavar="NAME", marks="training runtime"
    )
    wandb_tags: list[str] = option("tags of the run in wandb", [], metavar="TAG", nargs="*", marks="training runtime")
    wandb_resume_id: str = option("with --resume: the run's id in wandb", "", metavar="ID", marks="training runtime")


def build_accelerator(options: "Options") -> Accelerator:
    """The Accelerator; it decides the device and the number of processes.

    --amp, --torchcompile and --fsdp go before the settings of `accelerate config` and `accelerate launch`.

    Raises:
        UserError: a tracker that is unknown or not installed; sharding without several GPUs; EMA with sharding.
    """
    device = options.device
    plugins: dict[str, Any] = {}
    if device.torchcompile:
        plugins["dynamo_plugin"] = TorchDynamoPlugin(backend=device.torchcompile, mode=device.torchcompile_mode)
    if device.fsdp:
        plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
            state_dict_type="sharded_state_dict",
            transformer_cls_names_to_wrap=[],
            # Weights stay in float32 and autocast lowers the precision, as without sharding: distances need it.
            mixed_precision_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
        )
    names = trackers(options.logging)
    try:
        accelerator = Accelerator(
            mixed_precision={"float16": "fp16", "bfloat16": "bf16"}[device.amp_dtype] if device.amp else None,
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    broadcast_buffers=not device.no_ddp_bb,
                    gradient_as_bucket_view=True,
                    # torch.compile makes one graph a bucket: few, large ones (1.92 x on 2 GPUs, 1.82 x with 25 MB).
                    bucket_cap_mb=120 if device.torchcompile else 25,
                )
            ],
            log_with=names or None,
            project_dir=options.run.output if names else None,
            **plugins,
        )
    except ValueError as e:
        raise UserError(f"Accelerate cannot be set up: {' '.join(str(e).split())}") from e
    missing = [name for name in names if name not in map(str, accelerator.log_with)]
    if missing:
        raise UserError(f"--log-with {missing[0]} needs its package: pip install {missing[0]}")
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if device.fsdp and not (sharded and accelerator.num_processes > 1):
        raise UserError(
            f"--fsdp shards a model over several GPUs, and this run has {accelerator.num_processes} "
            f"{accelerator.device.type} process(es). Launch on several GPUs, or leave --fsdp out"
        )
    if sharded and options.run.model_ema:
        raise UserError("--model-ema cannot average a sharded model. Leave it out, or train without FSDP")
    if sharded and options.contrastive.contrastive:
        raise UserError(
            "--contrastive reads the head's metric outside of the model, where FSDP shards it. Leave it "
            "out, or train without FSDP"
        )
    if sharded and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise UserError("FSDP1 is not supported. Set fsdp_version: 2 in the configuration of accelerate, or use --fsdp")
    share_out_cores(device, accelerator)
    if accelerator.device.type == "cuda":  # as timm's training does
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return accelerator


def share_out_cores(options: DeviceOptions, accelerator: Accelerator) -> None:
    """On the CPU, give each process its share of the cores.

    `accelerate launch` sets one thread a process unless told otherwise; a number that a person chose stands.
    """
    if accelerator.device.type != "cpu":
        return
    chosen = options.cpu_threads
    if chosen is None and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        chosen = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
    if chosen is not None:
        torch.set_num_threads(chosen)


def wrap_repeated_blocks(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Tell FSDP2 the model's repeated blocks, the units to gather: without units all weights are gathered at once."""
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin is None:
        return
    charts = [module for module in model.modules() if isinstance(module, FAIMChart)]
    if len({id(chart.metric) for chart in charts}) < len(charts):
        raise UserError(
            "block_shared=True does not go with FSDP, which gathers the weights of one block at a time. "
            "Leave it out, or train without FSDP"
        )
    model.to(memory_format=torch.contiguous_format)  # all that FSDP2 shards; images stay channels-last
    if not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = repeated_blocks(model)


def repeated_blocks(model: torch.nn.Module) -> list[str]:
    """Names of the classes, not torch's own, of which a model has a row of several: its blocks and stages."""
    names = set()
    for module in model.modules():
        if isinstance(module, (torch.nn.Sequential, torch.nn.ModuleList)) and len(module) > 1:
            kinds = {type(child) for child in module if any(True for _ in child.parameters())}
            if len({timm_class(kind) for kind in kinds}) == 1:
                names.update(kind.__name__ for kind in kinds if not kind.__module__.startswith("torch.nn"))
    return sorted(names)


def trackers(options: LoggingOptions) -> list[str]:
    """Names of the experiment trackers asked for."""
    return list(dict.fromkeys([*(options.log_with or []), *(["wandb"] if options.log_wandb else [])]))


def start_trackers(accelerator: Accelerator, options: LoggingOptions, folder: Path, recipe: dict[str, Any]) -> None:
    """Begin a run with every tracker; its files, where it has any, go to the run folder.

    Args:
        accelerator: made with the trackers.
        options: the project's name, and those of wandb.
        folder: run folder, whose name becomes the run's.
        recipe: the options to put on record.
    """
    if not trackers(options):
        return
    accelerator.project_configuration.project_dir = accelerator.project_configuration.logging_dir = str(folder)
    wandb = {"name": folder.name, "tags": options.wandb_tags or None}
    if options.wandb_resume_id:
        wandb.update(id=options.wandb_resume_id, resume="must")
    plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in recipe.items()}
    accelerator.init_trackers(
        options.wandb_project or options.project_name or "timm_faim",
        config=plain,
        init_kwargs={"wandb": wandb, "trackio": {"name": folder.name}},
    )
