"""LSA: blocks that lose much when half of them is removed are redundant and pruned more."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.allocators.base import Allocator, outlier_profile
from sparsify.allocators.context import Context
from sparsify.allocators.profile import Profile
from sparsify.errors import UsageError
from sparsify.model.statistics import GRAM, LayerStats
from sparsify.types import LayerTable

BETAS = {10: 0.06, 20: 0.02, 30: 0.04, 40: 0.02, 50: 0.04, 60: 0.10, 70: 0.15, 80: 0.12}
"""The release's beta by percent of sparsity."""


@dataclass(frozen=True)
class LSA(Allocator):
    """Keep ratios linear in 1 - E / (sum of E), where E is a block's minimal linear reconstruction error at 50%.

    Source: Yang et al., "LSA: Layer-wise Sparsity Allocation ... Based on Minimal Linear Reconstruction Error" (ICLR
    2026), Algorithm 1, by the released code (`BlockWanda.blk_s`). In every output row, and in groups of inputs from
    left to right, the input whose removal adds least to || (W - W') X ||^2 given those already removed goes first,
    until `share` of the group is gone. E is the error of a matrix, averaged over the matrices of a block. A larger E
    means more pruning; the paper takes it as a sign that the errors are spread evenly and no outlier is lost.

    Deviations: a last group narrower than the others loses `share` of its own width (the release takes as many as from
    a full group, which empties it); an upper clip at 0.99 and the parameter-weighted budget. Blocks only, not
    the variants per matrix.

    Attributes:
        beta: half the width of the range of sparsities; `auto` takes the release's for this sparsity.
        share: of the inputs that are removed.
        group: inputs that are chosen among together.
    """

    beta: float | Literal["auto"] = "auto"
    share: float = 0.5
    group: int = 128
    version: int = 1

    def __post_init__(self) -> None:
        number = isinstance(self.beta, int | float) and 0 <= self.beta < 0.5
        if self.beta != "auto" and not number:
            raise UsageError(
                "beta is half the width of the range of sparsities",
                got=repr(self.beta),
                allowed="auto, 0 <= beta < 0.5",
            )
        if not 0 < self.share < 1 or self.group < 2:
            raise UsageError(
                "LSA's hyper-parameters are out of range",
                got=f"share={self.share}, group={self.group}",
                allowed="0 < share < 1, group >= 2",
            )

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        errors = context.once(("lsa", self.share, self.group), lambda: self._errors(context))
        total = sum(errors)
        beta = released_beta(sparsity) if self.beta == "auto" else float(self.beta)
        importance = [1 - error / total for error in errors]
        return outlier_profile(layers, importance, 2 * beta, sparsity, {"reconstruction_error": errors, "beta": beta})

    @torch.no_grad()
    def _errors(self, context: Context) -> list[float]:
        weights = context.weights()
        means = []
        for stats in context.stats_by_block(frozenset({GRAM})):
            errors = [minimal_error(w, gram, self.share, self.group) for w, gram in _by_input(stats, weights)]
            means.append(torch.stack(errors).sum() / len(stats))
        return [mean.item() for mean in means]


def released_beta(sparsity: float) -> float:
    """The release's beta for a sparsity: that of the whole tenth below it, 10% to 80%."""
    return BETAS[min(max(int(10 * sparsity + 1e-9), 1), 8) * 10]


def _by_input(stats: Mapping[str, LayerStats], weights: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Matrices that read the same input, stacked: their rows do not depend on each other."""
    names: dict[int, list[str]] = {}
    for name, item in stats.items():
        names.setdefault(id(item), []).append(name)
    for shared in names.values():
        yield torch.cat([weights[name] for name in shared]), stats[shared[0]].gram


def minimal_error(
    weight: Float[Tensor, "out inp"], gram: Float[Tensor, "inp inp"], share: float, group: int
) -> Float[Tensor, ""]:
    """Sum over rows of the error of removing `share` of each group of inputs, the cheapest next one first.

    With S = gram * (w^T w) for a row w, the error of removing the inputs P is the sum of S over P x P, so removing j
    after P adds S_jj + 2 sum_{i in P} S_ij; this cost is kept for every input and updated with each removal.
    """
    rows = weight.float()
    cost = rows.square() * gram.diagonal()
    error = torch.zeros((), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], group):
        here = slice(start, min(start + group, rows.shape[1]))
        removed, added = _greedy(rows[:, here], gram[here, here], cost[:, here], share)
        error += added
        cost[:, here.stop :] += 2 * rows[:, here.stop :] * (removed @ gram[here, here.stop :])
    return error


def _greedy(
    rows: Float[Tensor, "out n"], gram: Float[Tensor, "n n"], cost: Float[Tensor, "out n"], share: float
) -> tuple[Float[Tensor, "out n"], Float[Tensor, ""]]:
    """The weights removed from a group (zero elsewhere) and the error they add."""
    cost = cost.clone()
    removed = torch.zeros_like(rows)
    added = torch.zeros((), dtype=torch.float64, device=rows.device)
    doubled = 2 * rows
    for _ in range(int(rows.shape[1] * share)):
        least, place = cost.min(dim=1, keepdim=True)
        added += least.sum(dtype=torch.float64)
        gone = rows.gather(1, place)
        removed.scatter_(1, place, gone)
        cost.addcmul_(doubled * gone, gram.index_select(0, place.squeeze(1)))
        cost.scatter_(1, place, torch.inf)
    return removed, added
