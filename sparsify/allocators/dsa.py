"""DSA: an allocation function found by search, released for LLaMA-7B."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.allocators.base import Allocator, outlier_profile
from sparsify.allocators.context import Context
from sparsify.allocators.profile import Profile
from sparsify.allocators.scores import wanda_by_block
from sparsify.errors import NumericsError, UsageError
from sparsify.types import LayerTable


@dataclass(frozen=True)
class DSA(Allocator):
    """Blocks whose Wanda scores vary more on a log scale are pruned more.

    Source: Li et al., "Discovering Sparsity Allocation for Layer-wise Pruning of LLMs" (DSA, NeurIPS 2024),
    by the released code and the function it names for LLaMA-7B, `W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)`: v is the variance
    of ln|score| over a block (zero scores count as one) and asin(atan v) the signal, which is min-max scaled, inverted
    and mapped to keep ratios as OWL's over a range of 2 lam. The 7 is parsed and never used.

    asin has no value above one, that is for v > tan 1 = 1.557; the release takes zero there, which makes the block the
    *least* varied one, and so do we. The variances are recorded.

    Deviations: the search itself (2,000 candidates scored by perplexity) is not run; an upper clip at 0.99 and the
    parameter-weighted budget; a signal that is zero for every block says nothing and is refused instead of being a
    division by zero.

    Attributes:
        lam: half the width of the range of sparsities.
    """

    lam: float = 0.08
    version: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.lam < 0.5:
            raise UsageError("lam is half the width of the range of sparsities", got=self.lam, allowed="0 <= lam < 0.5")

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        variances = context.once(("dsa",), lambda: wanda_by_block(layers, context, log_variance))
        signal = [searched_signal(v) for v in variances]
        if not any(signal):
            raise NumericsError(
                "DSA's function has no value for any block of this model",
                got=f"variances of ln|score| from {min(variances):.4g} to {max(variances):.4g}",
                allowed=f"some block below {math.tan(1):.4g}",
                fix="another allocator, such as allocator=dlp",
            )
        return outlier_profile(layers, [-s for s in signal], 2 * self.lam, sparsity, {"log_variance": variances})


def log_variance(scores: list[Float[Tensor, "_ _"]]) -> Float[Tensor, ""]:
    """Unbiased variance of ln(score) over all scores of a block, zero scores counted as one."""
    logs = [torch.where(s > 0, s, 1.0).log().double() for s in scores]
    count = sum(s.numel() for s in logs)
    mean = torch.stack([s.sum() for s in logs]).sum() / count
    return torch.stack([(s - mean).square().sum() for s in logs]).sum() / (count - 1)


def searched_signal(variance: float) -> float:
    """asin(atan v), zero where it has no value."""
    angle = math.atan(variance)
    return math.asin(angle) if angle <= 1 else 0.0
