"""A search over sparsities on held-out text, where the rules guess them: the control that every rule is measured by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from sparsify.allocators.arithmetic import beta_grid, legal_maximum
from sparsify.allocators.base import Allocator
from sparsify.allocators.profile import Profile
from sparsify.allocators.searching import Searching, rule_profiles
from sparsify.allocators.uniform import Uniform
from sparsify.errors import UsageError
from sparsify.search import spaces
from sparsify.types import LayerTable

if TYPE_CHECKING:
    from sparsify.allocators.context import Context


@dataclass(frozen=True, kw_only=True)
class Search(Searching, Allocator):
    """Choose beta, or the sparsity of every block or matrix, by trial on held-out text.

    Sources: ATP (arXiv 2502.14770), Algorithm 1 (`space=beta, algorithm=grid`) and its Bayesian control (Table 6:
    `space=block, algorithm=tpe`, the set-up is our reading: free block sparsities around the mean, re-centred);
    EvoPress (arXiv 2410.14649) for budget-preserving evolution.

    Attributes:
        space: `beta` (ATP's common difference), `block` or `layer` (one sparsity for each).
        rules: allocators whose profiles are tried first, by any name; spaces of more than one number start from them.
        reach: half the width of the box that `random` and `tpe` draw from, around the wanted sparsity.
        step: of beta's grid.
    """

    space: Literal["beta", "block", "layer"] = "layer"
    rules: Mapping[str, Allocator] = field(default_factory=lambda: {"uniform": Uniform()})
    reach: float = 0.15
    step: float = 0.002
    version: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.space not in ("beta", "block", "layer"):
            raise UsageError("Unknown search space", got=self.space, allowed="beta, block, layer")
        if self.algorithm in ("grid", "golden") and self.space != "beta":
            raise UsageError(
                f"algorithm={self.algorithm} varies one number", got=f"space={self.space}", allowed="space=beta"
            )
        if not 0 < self.reach < 1 or not self.step > 0:
            raise UsageError("reach and step are positive", got=f"reach={self.reach}, step={self.step}")
        if not self.rules:
            raise UsageError("A search starts from at least one rule", fix="leave `rules` as it is")

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        return self.best_profile(layers, sparsity, context, self._space(layers, sparsity, context))

    def _space(self, layers: LayerTable, sparsity: float, context: Context) -> spaces.Space:
        if self.space == "beta":
            limit = legal_maximum(sparsity, layers.num_blocks) if layers.num_blocks > 1 else 0.0
            return spaces.progressions(layers, sparsity, limit, beta_grid(sparsity, layers.num_blocks, self.step))
        starts = rule_profiles(self.rules, layers, sparsity, context)
        return spaces.groups(layers, self.space, starts, self.reach)
