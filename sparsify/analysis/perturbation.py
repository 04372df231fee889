"""Ways to disturb one block of a dense model: noise at several places, or the block really pruned."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsify.errors import UsageError
from sparsify.model.statistics import LayerStats, reading
from sparsify.model.walk import Walk
from sparsify.pruners.base import Pruner
from sparsify.pruners.wanda import Wanda
from sparsify.types import Target, check_whole

Run = Callable[[Float[Tensor, "n seq dim"]], Float[Tensor, "n seq dim"]]
"""The block at hand, applied to all windows."""


@runtime_checkable
class Source(Protocol):
    """A way to disturb one block of the dense model."""

    def check(self, dtype: torch.dtype) -> None:
        """Refuse what the dtype cannot show.

        Raises:
            UsageError: the disturbance would drown in rounding.
        """

    def disturbed(
        self, walk: Walk, block: int, run: Run, clean: Float[Tensor, "n seq dim"], draw: torch.Generator
    ) -> Float[Tensor, "n seq dim"]:
        """The block's output when the block is disturbed.

        Args:
            walk: the dense model, standing before the block.
            block: its index.
            run: calls it on hidden states.
            clean: its output undisturbed.
            draw: where random numbers come from.
        """


@dataclass(frozen=True)
class Noise:
    """Gaussian noise: on hidden states relative to each token's norm, on weights relative to each matrix' norm.

    Attributes:
        eta: size: ||e|| = eta ||x|| for every token x (exactly), or for every weight matrix.
        site: `output` or `input` of the block (the residual stream), the `attention` or `mlp` branch alone (relative to
            what its module puts out: what the branch adds, but for a norm that may follow, as in Gemma), or the block's
            `weights`.
        spared: leading tokens that are left alone. One token of most models carries a massive activation, which all
            others attend to: noise relative to its norm is a disturbance of another kind.
    """

    eta: float = 1e-2
    site: Literal["output", "input", "attention", "mlp", "weights"] = "output"
    spared: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.eta, int | float) or not 0 < self.eta < math.inf:
            raise UsageError("eta is the relative size of the noise", got=self.eta, allowed="a number above 0")
        check_whole("spared", self.spared, 0)
        if self.spared and self.site == "weights":
            raise UsageError("spared is a number of tokens, which weights do not have", got=self.spared, fix="spared=0")
        if self.site not in ("output", "input", "attention", "mlp", "weights"):
            raise UsageError("Unknown site", got=self.site, allowed="output, input, attention, mlp, weights")

    def check(self, dtype: torch.dtype) -> None:
        least = 4 * torch.finfo(dtype).eps
        if self.eta < least:
            raise UsageError(
                f"Noise of this size drowns in the rounding of {str(dtype).removeprefix('torch.')}",
                got=f"eta={self.eta:g}",
                allowed=f"eta >= {least:.2g}",
                fix="a larger eta",
            )

    def disturbed(
        self, walk: Walk, block: int, run: Run, clean: Float[Tensor, "n seq dim"], draw: torch.Generator
    ) -> Float[Tensor, "n seq dim"]:
        if self.site == "output":
            return self._add(clean, normal(clean, draw))
        if self.site == "input":
            return run(self._add(walk.hidden, normal(walk.hidden, draw)))
        if self.site == "weights":
            weights = {x.spec.name: x.weight for x in walk.view.layers_of(block)}
            flat = {name: weight.flatten() for name, weight in weights.items()}
            new = {name: plus(x, normal(x, draw), self.eta).view_as(weights[name]) for name, x in flat.items()}
            with walk.view.replaced(block, new):
                return run(walk.hidden)
        # Drawn for all windows at once, so that the batches do not matter, and handed out as the branch asks.
        noise = iter(normal(walk.hidden, draw).split([x.stop - x.start for x in walk.batches]))
        with _changed_output(branch(walk.view.blocks[block], self.site), lambda out: self._add(out, next(noise))):
            return run(walk.hidden)

    def _add(self, x: Float[Tensor, "n seq dim"], noise: Float[Tensor, "n seq dim"]) -> Float[Tensor, "n seq dim"]:
        """Noise on every token but the spared ones."""
        if self.spared >= x.shape[1]:
            allowed = f"spared < {x.shape[1]}, the tokens of a window"
            raise UsageError("Every token is spared", got=f"spared={self.spared}", allowed=allowed)
        return torch.cat([x[:, : self.spared], plus(x, noise, self.eta)[:, self.spared :]], dim=1)


@dataclass(frozen=True)
class PrunedBlock:
    """The block really pruned, on statistics of its own clean inputs: a disturbance of pruning's size and shape.

    Attributes:
        pruner: how.
        sparsity: zeros of each of its matrices; None is for an allocator to fill in.
    """

    pruner: Pruner = field(default_factory=Wanda)
    sparsity: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pruner, Pruner):
            fix = "pruner@allocator.source.pruner=wanda"
            raise UsageError("pruner is a component, not a value", got=repr(self.pruner), fix=fix)
        if reading(self.pruner.needs, "gradient", "pair"):
            raise UsageError(
                "A block alone is pruned by statistics of its inputs",
                got=f"{type(self.pruner).__name__}, which reads gradients, or the dense model's inputs beside them",
                fix="pruner@allocator.source.pruner=wanda",
            )
        if self.sparsity is not None and not (isinstance(self.sparsity, int | float) and 0 < self.sparsity < 1):
            raise UsageError("A pruned block has some zeros", got=self.sparsity, allowed="0 < sparsity < 1")

    def check(self, dtype: torch.dtype) -> None:
        if self.sparsity is None:
            raise UsageError("A pruned block has some zeros", got=self.sparsity, allowed="0 < sparsity < 1")

    def disturbed(
        self, walk: Walk, block: int, run: Run, clean: Float[Tensor, "n seq dim"], draw: torch.Generator
    ) -> Float[Tensor, "n seq dim"]:
        assert self.sparsity is not None  # `check` refused it
        target = Target(self.sparsity)
        layers, needs = walk.view.layers_of(block), self.pruner.needs
        stats = walk.observe(block, needs) if needs else {x.spec.name: LayerStats(0) for x in layers}
        new = {x.spec.name: self.pruner.prune(x.weight, stats[x.spec.name], target).weight for x in layers}
        with walk.view.replaced(block, new):
            return run(walk.hidden)


def normal(x: Float[Tensor, "*shape"], draw: torch.Generator) -> Float[Tensor, "*shape"]:
    """Standard normal numbers in the shape of `x`, at least in single precision."""
    return torch.randn(x.shape, generator=draw, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def plus(x: Float[Tensor, "*rows dim"], noise: Float[Tensor, "*rows dim"], eta: float) -> Float[Tensor, "*rows dim"]:
    """`x` plus noise scaled to `eta` times the norm of each row of `x`."""
    wide = x.to(noise.dtype)
    scale = eta * wide.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    return (wide + scale * noise).to(x.dtype)


def branch(block: nn.Module, site: str) -> nn.Module:
    """The attention or MLP module of a block, by its name.

    Raises:
        UsageError: the block has no such module, or several.
    """
    words = {"attention": ("attn", "attention"), "mlp": ("mlp", "ffn", "feed_forward")}[site]
    branches = [
        module
        for name, module in block.named_children()
        if any(word in name.lower() for word in words) and any(isinstance(m, nn.Linear) for m in module.modules())
    ]
    if len(branches) != 1:
        names = ", ".join(name for name, _ in block.named_children())
        raise UsageError(
            f"The {site} branch of this model's blocks was not found", got=names, fix="site=output, input or weights"
        )
    return branches[0]


@contextmanager
def _changed_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def disturb(_module: nn.Module, _args: object, out: object) -> object:
        if isinstance(out, tuple):
            return (change(out[0]), *out[1:])
        assert isinstance(out, Tensor)
        return change(out)

    handle = module.register_forward_hook(disturb)
    try:
        yield
    finally:
        handle.remove()
