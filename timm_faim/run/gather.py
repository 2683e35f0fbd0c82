"""Rows of tensors exchanged between processes."""

import torch
from accelerate import Accelerator


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
