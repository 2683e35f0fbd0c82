"""Which columns of a distance matrix are a row's positives and negatives, and sums over rows block by block.

Shapes: B rows (queries, anchors), N columns (references), D features, b rows of one block.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**22  # entries of one block of rows on the CPU, 16 MiB a tensor


def block_entries(device: torch.device) -> int:
    """Entries of one block of rows; more on a GPU, where a block's cost is in launching its kernels."""
    return BLOCK if device.type == "cpu" else 4 * BLOCK


@dataclass
class Pairs:
    """Positives and negatives of rows among columns.

    Args:
        labels: [B] of the rows, or None with ``masks``.
        ref_labels: [N] of the columns, or None with ``masks``.
        own: column of row 0 where row i and column own + i are the same point, which is neither; None without.
        masks: positives and negatives [B, N] instead of labels.
    """

    labels: Tensor | None
    ref_labels: Tensor | None
    own: int | None
    masks: tuple[Tensor, Tensor] | None = None

    def block(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Positives and negatives [b, N] (bool) of rows ``start`` to ``stop``."""
        if self.masks is not None:
            return self.masks[0][start:stop], self.masks[1][start:stop]
        assert self.labels is not None and self.ref_labels is not None
        positive_bN = self.labels[start:stop, None] == self.ref_labels
        negative_bN = ~positive_bN
        if self.own is not None:
            own_b1 = torch.arange(self.own + start, self.own + stop, device=positive_bN.device).unsqueeze(1)
            positive_bN.scatter_(1, own_b1, False)
        return positive_bN, negative_bN


def mined_masks(indices: Sequence[Tensor], B: int, N: int) -> tuple[Tensor, Tensor]:
    """Positives and negatives [B, N] of a miner's tuple: (anchor, positive, anchor, negative) or triplets.

    Raises:
        ValueError: a tuple of another length.
    """
    if len(indices) == 3:
        indices = (indices[0], indices[1], indices[0], indices[2])
    if len(indices) != 4:
        raise ValueError(f"indices_tuple must hold 3 tensors (triplets) or 4 (pairs), got {len(indices)}")
    masks = []
    for anchors, others in (indices[:2], indices[2:]):
        mask_BN = torch.zeros(B, N, dtype=torch.bool, device=anchors.device)
        mask_BN[anchors, others] = True
        masks.append(mask_BN)
    return masks[0], masks[1]


def row_blocks(B: int, N: int, entries: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of rows with about so many entries each."""
    rows = max(1, entries // max(1, N))
    for start in range(0, B, rows):
        yield start, min(B, start + rows)


def blockwise_sum(
    rows: Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]],
    x_BD: Tensor,
    y_ND: Tensor,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Sum of row losses over all rows, and the sum of their counts, in memory O(one block + (B + N) D).

    Args:
        rows: (x [b, D], y [N, D], start, stop) -> row losses [b] and counts [b] of these rows.
        x_BD: points of the rows.
        y_ND: points of the columns.
        parameters: what ``rows`` reads besides and has a gradient.

    The gradient of the sum is computed block by block in the forward pass, as in fused linear cross entropy (Hsu et
    al. 2024, Liger Kernel), so nothing of size B·N is kept or computed twice.

    Raises:
        RuntimeError: differentiated with ``create_graph=True``.
    """
    return _BlockwiseSum.apply(rows, torch.is_grad_enabled(), x_BD, y_ND, *parameters)


class _BlockwiseSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Callable, has_grad: bool, x_BD: Tensor, y_ND: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        wanted = [has_grad and needed for needed in ctx.needs_input_grad[2:]]
        # with enable_grad: leaves of their own, so that a block's graph ends here
        y = y_ND.detach().requires_grad_(wanted[1])
        total, count, row_grads = 0.0, 0.0, []
        others = [t for t, want in zip((y, *parameters), wanted[1:], strict=True) if want]
        sums = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in others]
        for start, stop in row_blocks(len(x_BD), len(y_ND), block_entries(x_BD.device)):
            x = x_BD[start:stop].detach().requires_grad_(wanted[0])
            with torch.set_grad_enabled(any(wanted)):
                losses, counts = rows(x, y, start, stop)
                loss = losses.sum()
            total, count = total + loss.detach(), count + counts.sum()
            inputs = ([x] if wanted[0] else []) + others
            if inputs:
                grads = list(torch.autograd.grad(loss, inputs, materialize_grads=True))
                if wanted[0]:
                    row_grads.append(grads.pop(0))
                for into, grad in zip(sums, grads, strict=True):
                    into.add_(grad)
        rest = iter(sums)
        ctx.save_for_backward(
            torch.cat(row_grads) if wanted[0] else None, *(next(rest) if want else None for want in wanted[1:])
        )
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a loss that is computed block by block can be differentiated once, without "
                f"create_graph=True; use batches of at most {block_entries(grad_total.device)} pairs"
            )
        return None, None, *(None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors)
