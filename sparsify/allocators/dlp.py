"""DLP: blocks with large scores are redundant and pruned more."""

from dataclasses import dataclass
from typing import Literal

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
class DLP(Allocator):
    """Keep ratios linear in 1 - score / (sum of scores), where a block's score is the mean of its Wanda scores.

    Source: Chen et al., "DLP: Dynamic Layerwise Pruning" (arXiv 2505.23807), by the released code
    (`get_dlp_ratios`): the importance is mapped as OWL's, over a range of 2 alpha.

    Deviations: an upper clip at 0.99 and the parameter-weighted budget (no effect on decoders of equal blocks). The
    paper writes the median, the released code for unstructured pruning takes the mean; so `statistic` is an option.

    Attributes:
        alpha: half the width of the range of sparsities.
        statistic: `mean` (released code) or `median` (paper) of the pooled scores of a block.
    """

    alpha: float = 0.15
    statistic: Literal["mean", "median"] = "mean"
    version: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 0.5:
            raise UsageError(
                "alpha is half the width of the range of sparsities", got=self.alpha, allowed="0 <= alpha < 0.5"
            )
        if self.statistic not in STATISTICS:
            raise UsageError("Unknown statistic", got=self.statistic, allowed=", ".join(STATISTICS))

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        scores = context.once(
            ("dlp", self.statistic), lambda: wanda_by_block(layers, context, STATISTICS[self.statistic])
        )
        total = sum(scores)
        importance = [1 - score / total for score in scores]
        return outlier_profile(layers, importance, 2 * self.alpha, sparsity, {"block_score": scores})


def median_of(scores: list[Float[Tensor, "_ _"]]) -> Float[Tensor, ""]:
    """Median over all scores of a block (the lower of the two middle ones), in double precision like the mean."""
    return torch.cat([s.flatten() for s in scores]).median().double()


STATISTICS = {"mean": mean_of, "median": median_of}
