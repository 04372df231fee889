"""OWL: blocks with more outlier scores are pruned less."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.allocators.base import Allocator, outlier_profile
from sparsify.allocators.context import Context
from sparsify.allocators.profile import Profile
from sparsify.allocators.scores import mean_of, wanda_by_block
from sparsify.errors import UsageError
from sparsify.types import LayerTable


@dataclass(frozen=True)
class OWL(Allocator):
    """Keep ratios linear in the share of Wanda scores above M times their block's mean.

    Source: Yin et al., "Outlier Weighed Layerwise Sparsity" (arXiv 2310.05175), Eq. 1-2, by the released code: the
    range of sparsities is exactly 2 lam wide but not centred on S, and blocks at or below zero get 0.01.

    Deviations: an upper clip at 0.99, the parameter-weighted budget (no effect on decoders of equal blocks), and the
    budget is met again after a block was lifted to 0.01.

    Attributes:
        M: a score is an outlier above M times the block's mean.
        lam: half the width of the range of sparsities.
    """

    M: float = 5.0
    lam: float = 0.08
    version: int = 1

    def __post_init__(self) -> None:
        if self.M <= 0 or not 0 <= self.lam < 0.5:
            raise UsageError(
                "OWL's hyper-parameters are out of range",
                got=f"M={self.M}, lam={self.lam}",
                allowed="M > 0, 0 <= lam < 0.5",
            )

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        ratios = context.once(
            ("owl", self.M), lambda: wanda_by_block(layers, context, partial(outlier_percent, multiple=self.M))
        )
        return outlier_profile(layers, ratios, 2 * self.lam, sparsity, {"outlier_percent": ratios})


def outlier_percent(scores: list[Float[Tensor, "_ _"]], multiple: float) -> Float[Tensor, ""]:
    """Percent of all scores of a block that exceed `multiple` times their common mean."""
    threshold = multiple * mean_of(scores)
    above = torch.stack([(s > threshold).sum() for s in scores]).sum()
    return 100.0 * above / sum(s.numel() for s in scores)
