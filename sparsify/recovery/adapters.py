"""Low-rank adapters on the linear layers of a pruned model: attached, trained, merged, taken off again."""

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from sparsify.errors import NumericsError, UnsupportedModelError, UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.prunable import Layer
from sparsify.model.statistics import full_precision
from sparsify.recovery.adapter import A, Adapter
from sparsify.search.proxy import fits
from sparsify.types import Skipped


class Adapters:
    """Adapters x (W + scale M.(BA))^T + bias, M = (W != 0), on every `Linear` and `Conv1D` of a model's blocks.

    Modules and their names stay: an adapter is two parameters more in its module and another forward for that instance,
    both gone with `detach`, or when a `with` ends. All layers of a block share a rank.

    Source: LoSA (arXiv 2502.14816). The release stores eight components and allocates up to sixteen, so that those
    above eight never train; here `rank_max` are stored (8 is the release). It merges and unmerges in the model's
    precision and drifts by rounding; here the base comes back to the bit. Its shrinking drops what was trained: that is
    `keep=False`.

    Args:
        view: the model. Its own weights' `requires_grad` is left alone.
        ranks: of every block, or of each by its index.
        rank_max: components that are stored.
        scale: of the product, the same for every rank; LoSA's is 16/8.
        dropout: on the adapters' input in train mode. Above zero a layer takes two dense products.
        seed: of what A starts from; B starts from zero.
        masked: False for plain LoRA, whose merging fills zeros: a baseline.

    Attributes:
        skipped: layers without an adapter: an expert in a 3-D parameter has no module of its own.

    Raises:
        UnsupportedModelError: nothing in the model can have an adapter.
        UsageError: ranks out of bounds or not of these blocks, dropout or scale out of range, or there are adapters
            already.
    """

    def __init__(
        self,
        view: BlockView,
        ranks: Mapping[int, int] | int,
        rank_max: int = 16,
        *,
        scale: float = 2.0,
        dropout: float = 0.0,
        seed: int = 0,
        masked: bool = True,
    ) -> None:
        if not 0 <= dropout < 1:
            raise UsageError("Dropout is a probability", got=dropout, allowed="from 0 to below 1")
        check_scale(scale)
        layers = [layer for layer in view.layers if layer.expert is None]
        _check(layers)
        self.view, self.rank_max = view, rank_max
        self.skipped = [_skipped(layer) for layer in view.layers if layer.expert is not None]
        self._blocks = sorted({layer.spec.block for layer in layers})
        self._ranks = self._checked(ranks)
        self._trained = dict(self._ranks)  # components that hold something, in use or not
        self._generator = torch.Generator().manual_seed(seed)
        self._adapters = [
            Adapter(layer, self._ranks[layer.spec.block], rank_max, scale, dropout, masked) for layer in layers
        ]
        for adapter in self._adapters:
            adapter.attach(self._generator)
        self.merged = False

    def __enter__(self) -> "Adapters":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    @property
    def layers(self) -> list[Layer]:
        """The layers with an adapter."""
        return [adapter.layer for adapter in self._adapters]

    @property
    def ranks(self) -> dict[int, int]:
        """Components in use, by block."""
        return dict(self._ranks)

    def parameters(self) -> list[nn.Parameter]:
        """All that is stored, for an optimiser: A and B of the first layer, of the second, and so on."""
        return [factor for adapter in self._adapters for factor in adapter.factors]

    def num_trainable(self) -> int:
        """Numbers in components in use: (in + out) r, summed over layers."""
        specs = [layer.spec for layer in self.layers]
        return sum((spec.in_features + spec.out_features) * self._ranks[spec.block] for spec in specs)

    def set_ranks(self, ranks: Mapping[int, int] | int, *, keep: bool = True) -> None:
        """Use other numbers of components.

        Growing brings back components that shrinking had set aside, as they were, and fresh ones whose B is zero.
        Shrinking adds what was trained to the base weight, rounded once, so that the model computes what it did; what
        was set aside before is forgotten. An optimiser has moments of the components as they were: make a new one, as
        the release does.

        Args:
            ranks: of every block, or of each by its index.
            keep: False sets components that are no longer in use aside, as the release does: what they had learnt is
                missing until they are back.

        Raises:
            UsageError: ranks out of bounds, or the adapters are merged: what is in the weights has the rank it has.
        """
        self._refuse_merged("their ranks change")
        wanted = self._checked(ranks)
        with full_precision():
            for adapter in self._adapters:
                block = adapter.layer.spec.block
                self._set_rank(adapter, wanted[block], self._trained[block], keep)
        for block, rank in wanted.items():
            folded = keep and rank < self._ranks[block]
            self._trained[block] = rank if folded else max(rank, self._trained[block])
        self._ranks = wanted

    def merge(self) -> None:
        """Put the products into the weights: zeros stay, nothing else becomes zero, the forward is the model's own.

        The weights before are kept for `unmerge`, on the device where they take no more than half of what is free, else
        on the host.

        Raises:
            UsageError: they are merged.
            NumericsError: a weight would not be finite; nothing is merged then.
        """
        self._refuse_merged("they are merged")
        near = fits(self.view, sum(layer.weight.nbytes for layer in self.layers))
        with full_precision():
            try:
                for adapter in self._adapters:
                    adapter.merge(near)
            except NumericsError:
                for adapter in self._adapters:
                    adapter.unmerge()
                raise
        self.merged = True

    def unmerge(self) -> None:
        """Take the products out of the weights, whatever was done to these since: see `merging.unmerged_weight`.

        Raises:
            UsageError: they are not merged, or have changed since they were.
            NumericsError: a weight is not finite then.
        """
        if not self.merged:
            raise UsageError("Only merged adapters are unmerged", fix="adapters.merge() first")
        with full_precision():
            for adapter in self._adapters:
                adapter.unmerge()
        self.merged = False

    def detach(self) -> None:
        """Leave the model without adapters; its weights stay as they are now, merged or not."""
        for adapter in self._adapters:
            adapter.detach()
        self._adapters, self.merged = [], False

    def state_dict(self) -> dict[str, Any]:
        """All about the adapters, on the host, for a checkpoint; the model's own weights are not in it.

        Raises:
            UsageError: they are merged: the weights before would be lost.
        """
        self._refuse_merged("their state is saved")
        return {
            "factors": {x.layer.spec.name: [f.detach().cpu().clone() for f in x.factors] for x in self._adapters},
            "ranks": dict(self._ranks),
            "trained": dict(self._trained),
            "generator": self._generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be as at `state_dict`.

        Raises:
            UsageError: these are merged, or the state is of other layers or another `rank_max`.
        """
        self._refuse_merged("a state is loaded")
        saved = {name: [factor.shape for factor in factors] for name, factors in state["factors"].items()}
        if saved != {x.layer.spec.name: [factor.shape for factor in x.factors] for x in self._adapters}:
            raise UsageError("The state is of adapters of other layers, or of another rank_max")
        self._ranks, self._trained = self._checked(state["ranks"]), dict(state["trained"])
        self._generator.set_state(state["generator"])
        for adapter in self._adapters:
            adapter.use(self._ranks[adapter.layer.spec.block])
            for factor, values in zip(adapter.factors, state["factors"][adapter.layer.spec.name], strict=True):
                factor.copy_(values)

    def _set_rank(self, adapter: Adapter, rank: int, trained: int, keep: bool) -> None:
        if keep and rank < adapter.rank:
            adapter.fold(rank, adapter.rank)
        adapter.renew(trained, rank, self._generator)
        adapter.use(rank)

    def _checked(self, ranks: Mapping[int, int] | int) -> dict[int, int]:
        wanted = dict.fromkeys(self._blocks, ranks) if isinstance(ranks, int) else dict(ranks)
        if sorted(wanted) != self._blocks or not all(map(self._in_bounds, wanted.values())):
            raise UsageError(
                "Every block with adapters has a rank, and no other",
                got=f"ranks={ranks}"[:80],
                allowed=f"1 to rank_max={self.rank_max}, for blocks {self._blocks}"[:120],
            )
        return wanted

    def _in_bounds(self, rank: Any) -> bool:
        return isinstance(rank, int) and 1 <= rank <= self.rank_max

    def _refuse_merged(self, before: str) -> None:
        if self.merged:
            raise UsageError(f"Adapters have to be unmerged before {before}", fix="adapters.unmerge() first")


def check_scale(scale: float) -> None:
    """Refuse a scale of the product BA that is not above zero and finite."""
    if not 0 < scale < math.inf:
        raise UsageError("scale multiplies what adapters add", got=scale, allowed="above 0", fix="scale=2")


def _check(layers: list[Layer]) -> None:
    if not layers:
        raise UnsupportedModelError(
            "No layer of this model can have a low-rank adapter",
            got="experts in 3-D parameters only",
            allowed="Linear and Conv1D modules in its blocks",
        )
    if adapted := [layer.spec.name for layer in layers if A in layer.module._parameters]:
        raise UsageError("This model has low-rank adapters already", got=adapted[0], fix="adapters.detach() first")


def _skipped(layer: Layer) -> Skipped:
    spec = layer.spec
    return Skipped(spec.name, (spec.out_features, spec.in_features), "expert without a module of its own")
