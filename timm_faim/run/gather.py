"""Rows of tensors exchanged between processes."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from timm_faim.run.errors import UserError


def gather_rows(rows: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """The rows [N, ...] of all processes, whose numbers may differ, in the order of the processes; a collective call.

    Padded for the exchange, which wants equal numbers.
    """
    if accelerator.num_processes == 1:
        return rows
    counts = accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = accelerator.gather(accelerator.pad_across_processes(rows.contiguous()))
    shards = padded.view(len(counts), max(counts), *rows.shape[1:])
    return torch.cat([shard[:count] for shard, count in zip(shards, counts, strict=True)])


def raise_together(problem: str | None) -> None:
    """Raise the first process's problem on every process; a collective call.

    Raises:
        UserError: one of them has a problem.
    """
    problems = [found for found in gather_object([problem]) if found is not None]
    if problems:
        raise UserError(problems[0])
