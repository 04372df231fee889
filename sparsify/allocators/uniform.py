"""Uniform: every layer gets the same sparsity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsify.allocators.base import Allocator
from sparsify.allocators.profile import Profile
from sparsify.types import LayerTable

if TYPE_CHECKING:
    from sparsify.allocators.context import Context


@dataclass(frozen=True)
class Uniform(Allocator):
    """s_i = S for every layer."""

    version: int = 1

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        return Profile({layer.name: sparsity for layer in layers}, high=1.0)
