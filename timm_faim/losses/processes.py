"""Embeddings of all processes, with gradients, for losses that compare across them."""

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return distributed.get_rank() if world_size() > 1 else 0


class _AllGather(torch.autograd.Function):
    """Rows of all processes; the gradient of each row is the sum of what the processes computed for it."""

    @staticmethod
    def forward(ctx, rows_BD: Tensor) -> Tensor:
        ctx.count = len(rows_BD)
        return gather_all(rows_BD)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> Tensor:
        grad_ND = grad_ND.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(grad_ND)
        return grad_ND[ctx.count * rank() :][: ctx.count]


def gather_all(rows: Tensor) -> Tensor:
    """The rows [B, ...] of all processes in their order [W·B, ...], without gradient; B must be the same on all."""
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def gather_with_gradient(rows_BD: Tensor) -> Tensor:
    """The rows [B, D] of all processes in their order [W·B, D].

    With the mean of the processes' losses as the loss, and gradients that are averaged over processes as in
    DistributedDataParallel, the gradient is that of one process with all rows. B must be the same on all processes.
    """
    return _AllGather.apply(rows_BD)


def mean_over_processes(count: Tensor) -> Tensor:
    """The mean of a number over the processes, without gradient."""
    count = count.detach().clone()
    distributed.all_reduce(count)
    return count / world_size()
