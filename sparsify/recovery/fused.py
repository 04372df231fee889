"""W + (W != 0).(left right) in one pass over W: a Triton kernel for accelerators; only imported where Triton is."""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

ROWS, COLUMNS = 64, 128
"""Of a tile."""


def masked_sum(
    weight: Float[Tensor, "out inp"],
    left: Float[Tensor, "out rank"],
    right: Float[Tensor, "rank inp"],
    *,
    base: bool,
) -> Float[Tensor, "out inp"]:
    """A new matrix that lies as the weight does; sums in single precision, rounded once.

    Args:
        weight: W, on an accelerator.
        left: of the product.
        right: of the product.
        base: whether W is added.
    """
    if weight.stride(0) < weight.stride(1):  # Triton 3.6 confuses lanes of a tile that lies across, in single precision
        return masked_sum(weight.T, right.T, left.T, base=base).T
    whole, left, right = torch.empty_like(weight), left.contiguous(), right.contiguous()
    rows, columns = weight.shape
    rank = right.shape[0]
    tiles = triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS)
    padded = max(16, triton.next_power_of_2(rank))  # what a product of tiles takes at least
    kernel: Any = _masked_sum
    with torch.cuda.device(weight.device):
        kernel[tiles](
            weight,
            left,
            right,
            whole,
            rows,
            columns,
            rank,
            *weight.stride(),
            *whole.stride(),
            base,
            padded,
            ROWS,
            COLUMNS,
        )
    return whole


@triton.jit
@no_type_check
def _masked_sum(
    weight,
    left,
    right,
    whole,
    rows,
    columns,
    rank,
    weight_row,
    weight_column,
    whole_row,
    whole_column,
    base: tl.constexpr,
    padded: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
):
    """One tile; rows are counted in 64 bits, as a matrix may have more than 2^31 entries."""
    i = (tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)[:, None]
    j = (tl.program_id(0) * tile_columns + tl.arange(0, tile_columns)).to(tl.int64)[None, :]
    k = tl.arange(0, padded)
    inside = (i < rows) & (j < columns)
    b = tl.load(left + i * rank + k[None, :], mask=(i < rows) & (k[None, :] < rank), other=0.0)
    a = tl.load(right + k[:, None] * columns + j, mask=(k[:, None] < rank) & (j < columns), other=0.0)
    w = tl.load(weight + i * weight_row + j * weight_column, mask=inside, other=0.0)
    total = tl.dot(b, a, input_precision="ieee")
    if base:
        total += w.to(tl.float32)
    total = tl.where(w != 0, total, 0.0)
    tl.store(whole + i * whole_row + j * whole_column, total.to(w.dtype), mask=inside)
