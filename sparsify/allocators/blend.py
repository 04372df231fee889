"""A weighted sum of rules: what each of them knows about where to prune, added up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from sparsify.allocators.arithmetic import RelativeProgression
from sparsify.allocators.base import Allocator
from sparsify.allocators.profile import Profile
from sparsify.allocators.searching import Searching, rule_profiles
from sparsify.allocators.spectral import AlphaPruning
from sparsify.errors import UsageError
from sparsify.search import spaces
from sparsify.types import LayerTable

if TYPE_CHECKING:
    from sparsify.allocators.context import Context


@dataclass(frozen=True, kw_only=True)
class Blend(Searching, Allocator):
    """S + sum_k w_k (p_k - S) over the profiles p_k of other allocators, fitted to the budget.

    Ours; no paper. With `weights="auto"` the weights are searched on held-out text inside the cell, starting from each
    rule alone and from their mean.

    Attributes:
        parts: the allocators, by any name.
        weights: one number per part by the same name, or `auto`.
    """

    parts: Mapping[str, Allocator] = field(
        default_factory=lambda: {"depth": RelativeProgression(0.5), "alphapruning": AlphaPruning()}
    )
    weights: Mapping[str, float] | Literal["auto"] = "auto"
    trials: int = 40
    version: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise UsageError("A blend needs parts", fix="allocator.parts: {owl: {...}, alphapruning: {...}}")
        if self.algorithm in ("grid", "golden"):
            raise UsageError(
                "A blend has several weights", got=f"algorithm={self.algorithm}", allowed="random, tpe, evolution"
            )
        if self.weights != "auto" and set(self.weights) != set(self.parts):
            raise UsageError(
                "A blend needs one weight per part",
                got=", ".join(sorted(self.weights)),
                allowed=", ".join(sorted(self.parts)),
                fix="allocator.weights=auto",
            )

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        space = spaces.blends(rule_profiles(self.parts, layers, sparsity, context), sparsity)
        if self.weights == "auto":
            return self.best_profile(layers, sparsity, context, space)
        return Profile(space.profile(np.array([float(self.weights[name]) for name in self.parts])))
