"""Into the weight and out of it again, to the bit: merged = W + M.D with D = scale BA, in single precision."""

import torch
from jaxtyping import Float
from torch import Tensor


def merged_weight(
    weight: Float[Tensor, "out inp"], product: Float[Tensor, "out inp"], *, masked: bool = True
) -> Float[Tensor, "out inp"]:
    """W + M.D, M = (W != 0), rounded once: zeros keep their bits, and nothing else becomes one.

    A sum that would round to zero is the smallest normal number of its sign instead: as a zero it would be pruned from
    then on.

    Args:
        weight: W.
        product: D, at least in single precision.
        masked: False adds D everywhere, and fills the zeros.
    """
    whole = _rounded(weight.to(product.dtype) + product, weight)
    return torch.where(weight == 0, weight, whole) if masked else whole


def unmerged_weight(
    now: Float[Tensor, "out inp"],
    weight: Float[Tensor, "out inp"],
    product: Float[Tensor, "out inp"],
    *,
    masked: bool = True,
) -> Float[Tensor, "out inp"]:
    """What the base of a merged weight P is after P was pruned again.

    Where P is as it was merged, the base as it was, so that merging and unmerging drifts by not a bit; where P has
    become zero, zero; where it was changed otherwise (SparseGPT), P - D, rounded once and never to zero.

    Args:
        now: P.
        weight: the base before it was merged.
        product: D, as it was then.
        masked: as it was then.
    """
    free = torch.where(now == 0, now, _rounded(now.to(product.dtype) - product, now))
    return torch.where(now == merged_weight(weight, product, masked=masked), weight, free)


def _rounded(exact: Float[Tensor, "out inp"], weight: Float[Tensor, "out inp"]) -> Float[Tensor, "out inp"]:
    """In the weight's dtype; where the weight is not zero, this is not."""
    rounded = exact.to(weight.dtype)
    sign = torch.where(exact == 0, weight, rounded)  # a zero has the sign of what was rounded
    least = torch.full_like(weight, torch.finfo(weight.dtype).tiny).copysign(sign)
    return torch.where((rounded == 0) & (weight != 0), least, rounded)
