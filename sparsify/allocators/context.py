"""What an allocator may ask about the dense model, answered lazily and remembered."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsify.allocators.budget import apply_pattern
from sparsify.analysis.drift import Drift, drift
from sparsify.analysis.perturbation import Source
from sparsify.errors import UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.statistics import LayerStats
from sparsify.model.walk import Walk
from sparsify.pruners.base import Pruner
from sparsify.search.screen import Screen
from sparsify.types import Pattern, SparsityPlan

Objective = Callable[[SparsityPlan], float]
Progress = Callable[[int, int], None]
"""Called with (trials done, trials in all)."""


@dataclass
class DenseContext:
    """Answers for one model and one calibration text; the model must still be dense when asked.

    Attributes:
        view: the dense model.
        tokens: calibration token ids, [n, seqlen].
        batch_size: windows per forward.
        try_plan: held-out perplexity after pruning by a plan, leaving the model dense again.
        memo: answers so far; pass the same dict again for the same model, whatever the text.
        pruner: prunes the blocks of `input_norms`.
        pattern: that trial plans are rounded to.
        heldout: token ids that searches score on, [m, seqlen].
        seed: of searches that draw.
        progress: told of every trial of a search, and of every block of a drift.
    """

    view: BlockView
    tokens: Int[Tensor, "n seq"]
    batch_size: int | None = None
    try_plan: Objective | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    pruner: Pruner | None = None
    pattern: Pattern = field(default_factory=Pattern)
    heldout: Int[Tensor, "m seq"] | None = None
    seed: int = 0
    progress: Progress = lambda done, total: None

    def weights(self) -> Mapping[str, Tensor]:
        return {layer.spec.name: layer.weight for layer in self.view.layers}

    def dense_stats(self, needs: frozenset[str]) -> Mapping[str, LayerStats]:
        """One pass over the calibration text through the dense model."""
        return self.once(("dense_stats", needs), lambda: self._collect(needs))  # type: ignore[no-any-return]

    def objective(self, plan: SparsityPlan) -> float:
        """Held-out perplexity of a plan.

        Raises:
            UsageError: there is no held-out text.
        """
        self.heldout_tokens(None)
        assert self.try_plan is not None
        return self.try_plan(plan)

    def heldout_tokens(self, windows: int | None) -> Int[Tensor, "m seq"]:
        """The first held-out windows, or all of them.

        Raises:
            UsageError: there is no held-out text.
        """
        if self.heldout is None:
            raise UsageError("This allocator searches on held-out text", fix="pass heldout=<tokens> to sparsify.prune")
        return self.heldout[:windows]

    def drift(self, source: Source, windows: int | None, seeds: int) -> Drift:
        """What becomes of a disturbance of each block, on the first calibration windows."""
        return self.once(  # type: ignore[no-any-return]
            ("drift", source, windows, seeds),
            lambda: drift(
                self.view,
                self.tokens[:windows],
                source,
                seeds=seeds,
                batch_size=self.batch_size,
                progress=self.progress,
            ),
        )

    def screen(self, windows: int | None) -> AbstractContextManager[Screen]:
        """A screen on the first calibration windows; the model is dense again when it closes."""
        return Screen(self.view, self.view.snapshot(), self.tokens[:windows]).closing()

    def once(self, key: Any, make: Callable[[], Any], *, of_weights: bool = False) -> Any:
        place = key if of_weights else (self._text, key)
        if place not in self.memo:
            self.memo[place] = make()
        return self.memo[place]

    @cached_property
    def _text(self) -> str:
        """The calibration text, for answers that depend on it."""
        return f"{tuple(self.tokens.shape)} {hashlib.sha256(self.tokens.cpu().numpy().tobytes()).hexdigest()}"

    def dense_blocks(self, needs: frozenset[str]) -> Iterator[Mapping[str, LayerStats]]:
        walk = Walk(self.view, self.tokens, self.batch_size)
        for block in range(len(self.view.blocks)):
            yield walk.observe(block, needs, advance=True)

    def hidden_states(self, windows: int) -> Iterator[Float[Tensor, "n seq dim"]]:
        """What enters each block; overwritten in place when the next one is asked for."""
        walk = Walk(self.view, self.tokens[:windows], self.batch_size)
        for block in range(len(self.view.blocks)):
            yield walk.hidden
            walk.advance(block)

    @torch.no_grad()
    def input_norms(
        self, plan: SparsityPlan, windows: int
    ) -> Iterator[tuple[Float[Tensor, " inp"], Float[Tensor, " inp"]]]:
        """One walk; each block is pruned as in the propagated regime, observed again, and put back.

        Raises:
            UsageError: this context has no pruner.
        """
        if self.pruner is None:
            raise UsageError("This allocator prunes on trial, and the context has no pruner", fix="use sparsify.prune")
        targets = apply_pattern(plan, self.view.table, self.pattern).targets
        walk = Walk(self.view, self.tokens[:windows], self.batch_size)
        for block in range(len(self.view.blocks)):
            layers = self.view.layers_of(block)
            before = walk.observe(block, self.pruner.needs | {"norm"})
            dense = [layer.weight.clone() for layer in layers]
            try:
                for layer in layers:
                    pruned = self.pruner.prune(layer.weight, before[layer.spec.name], targets[layer.spec.name])
                    layer.write(pruned.weight)
                after = walk.observe(block, frozenset({"norm"}), advance=True)
            finally:
                for layer, weight in zip(layers, dense, strict=True):
                    layer.write(weight)
            yield from ((before[x.spec.name].norm, after[x.spec.name].norm) for x in layers)

    def _collect(self, needs: frozenset[str]) -> dict[str, LayerStats]:
        return {name: stats for block in self.dense_blocks(needs) for name, stats in block.items()}
