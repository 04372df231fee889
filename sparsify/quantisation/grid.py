"""Grids of few levels for the weights of a matrix: a scale and a zero point for every group of a row."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from sparsify.errors import NumericsError
from sparsify.model.blocks import BlockView

LOWEST = {torch.float16: 2.0**-22, torch.bfloat16: 2.0**-100}
"""Smallest scales: with larger ones a weight rounded to its dtype is still nearest to its own code."""


@dataclass(frozen=True)
class Precision:
    """How fine a grid is.

    Attributes:
        bits: of a code; there are 2^bits levels.
        group: neighbouring inputs of a row that share a scale, the last ones of a row fewer; None for the row.
        symmetric: whether the zero point is the middle code instead of the one that fits the group.
    """

    bits: int
    group: int | None = None
    symmetric: bool = False

    def width(self, inputs: int) -> int:
        """Inputs of a group in a matrix with so many."""
        return min(self.group or inputs, inputs)

    def fitted(
        self, weight: Float[Tensor, "out cols"], keep: Bool[Tensor, "out cols"], stored: torch.dtype
    ) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
        """Scale and zero point for one group of every row, of its kept weights alone.

        With m = 2^bits - 1, lo = min(w, 0) and hi = max(w, 0) over the kept w: scale (hi - lo) / m and zero point
        round(-lo / scale). A symmetric grid has -lo = hi = max|w| and the zero point 2^(bits - 1), so that its largest
        code is half a step below hi. Zero is a level of either. As in GPTQ's released `Quantizer.find_params`, but
        that the scale is one of 16 bits, which is then used.

        Args:
            weight: single precision.
            keep: which weights count.
            stored: dtype that the scale can be stored in.
        """
        kept, top = weight.masked_fill(~keep, 0.0), 2**self.bits - 1
        low, high = kept.amin(dim=1).clamp_max(0), kept.amax(dim=1).clamp_min(0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / top).to(stored).to(weight.dtype).clamp_min(LOWEST[stored])
        middle = torch.full_like(scale, 2 ** (self.bits - 1))
        return scale, middle if self.symmetric else (-low / scale).round().clamp(0, top)


@dataclass(frozen=True)
class Grid:
    """The grid of a matrix, stored as an engine would: it gives the codes back of a matrix that is kept in its dtype.

    A code q stands for scale (q - zero). Rounding such a number to float16 moves it by less than an eighth of a step,
    since |q - zero| < 2^8, and so does bfloat16 by less than half of one up to 128 levels from zero. Beyond that, which
    only 8 bits have, bfloat16 may not tell two neighbouring codes apart: of these the one is taken that it holds.

    Attributes:
        precision: bits and groups.
        scale: float16 (bfloat16 for a matrix in bfloat16), [out, groups].
        zero: code of zero, [out, groups].
    """

    precision: Precision
    scale: Float[Tensor, "out groups"]
    zero: UInt8[Tensor, "out groups"]

    @classmethod
    def of(
        cls, weight: Float[Tensor, "out inp"], keep: Bool[Tensor, "out inp"], precision: Precision, stored: torch.dtype
    ) -> "Grid":
        """The grid of a matrix as it is (`Precision.fitted`), group by group."""
        width = precision.width(weight.shape[1])
        pairs = zip(weight.split(width, dim=1), keep.split(width, dim=1), strict=True)
        found = [precision.fitted(part, kept, stored) for part, kept in pairs]
        return cls.stored(precision, stored, *(torch.stack(each, dim=1) for each in zip(*found, strict=True)))

    @classmethod
    def stored(cls, precision: Precision, dtype: torch.dtype, scale: Tensor, zero: Tensor) -> "Grid":
        """From scales that fit the dtype and whole zero points, both in single precision."""
        return cls(precision, scale.to(dtype), zero.to(torch.uint8))

    def codes(self, weight: Float[Tensor, "out inp"]) -> UInt8[Tensor, "out inp"]:
        """The level nearest to every weight."""
        scale, zero = self._spread(weight)
        return nearest(weight.float(), scale, zero, self.precision.bits, self.scale.dtype).to(torch.uint8)

    def values(self, codes: UInt8[Tensor, "out inp"]) -> Float[Tensor, "out inp"]:
        """What codes stand for, single precision; exactly 0.0 for the zero point."""
        scale, zero = self._spread(codes)
        return (codes.float() - zero) * scale

    def rounded(self, weight: Float[Tensor, "out inp"]) -> Float[Tensor, "out inp"]:
        """Every weight at its nearest level, single precision."""
        return self.values(self.codes(weight))

    def holds(self, weight: Float[Tensor, "out inp"]) -> bool:
        """Whether every weight is a level, as its dtype has it."""
        return torch.equal(self.rounded(weight).to(weight.dtype), weight)

    def to(self, device: torch.device | str) -> "Grid":
        """The same elsewhere."""
        return Grid(self.precision, self.scale.to(device), self.zero.to(device))

    def _spread(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every entry of a matrix, single precision on its device."""
        inputs = matrix.shape[1]
        where = torch.arange(inputs, device=matrix.device) // self.precision.width(inputs)
        scale, zero = (x.to(matrix.device, torch.float32)[:, where] for x in (self.scale, self.zero))
        return scale, zero


def nearest(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, stored: torch.dtype) -> Tensor:
    """Codes of weights, as whole numbers in their dtype: clip(round(w / scale) + zero, 0, 2^bits - 1).

    In bfloat16 a code of 8 bits is then that of its value as stored; once is enough: what is off by more than half a
    step lies where values of that dtype are further apart than levels.
    """
    codes = ((weight / scale).round() + zero).clamp(0, 2**bits - 1)
    if stored == torch.bfloat16 and bits == 8:
        held = ((codes - zero) * scale).to(stored).to(weight.dtype)
        codes = ((held / scale).round() + zero).clamp(0, 2**bits - 1)
    return codes


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """The 16 bits that scales of a matrix of this dtype are stored in."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def check_on_grids(view: BlockView, grids: Mapping[str, Grid]) -> None:
    """Every weight of a quantised layer is a level of its grid.

    Raises:
        NumericsError: one is not; the message names its layer.
    """
    for layer in view.layers:
        if layer.spec.name in grids and not grids[layer.spec.name].holds(layer.weight):
            raise NumericsError(
                f"Weights of {layer.spec.name} are not on the grid that they were quantised to",
                fix="nothing after quantising may change weights",
            )
