"""Uniform: every layer gets the same sparsity."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.allocators.base import Context
from sparsify.allocators.budget import fit_plan
from sparsify.types import LayerTable, SparsityPlan


@dataclass(frozen=True)
class Uniform:
    """s_i = S for every layer."""

    version: int = 1

    def check(self, wanted: float, num_blocks: int) -> None:
        """Any sparsity below one is fine."""

    def allocate(self, layers: LayerTable, wanted: float, context: Context) -> SparsityPlan:
        return fit_plan(layers, {layer.name: wanted for layer in layers}, wanted, high=1.0)
