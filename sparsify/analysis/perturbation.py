"""Disturb one block and follow what becomes of the disturbance down to the last block."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsify.blocks import BlockView
from sparsify.errors import NumericsError, UsageError
from sparsify.loss import batch_size_for
from sparsify.pruners.base import Pruner
from sparsify.pruners.wanda import Wanda
from sparsify.stats import full_precision
from sparsify.stream import Walk
from sparsify.types import Target

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
            what the branch adds), or the block's `weights`.
        spared: leading tokens that are left alone. One token of most models carries a massive activation, which all
            others attend to: noise relative to its norm is a disturbance of another kind.
    """

    eta: float = 1e-2
    site: Literal["output", "input", "attention", "mlp", "weights"] = "output"
    spared: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.eta < math.inf:
            raise UsageError("eta is the relative size of the noise", got=self.eta, allowed="eta > 0")
        if self.spared < 0 or (self.spared and self.site == "weights"):
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
                fix="dtype=float32" if dtype != torch.float32 else "a larger eta",
            )

    def disturbed(
        self, walk: Walk, block: int, run: Run, clean: Float[Tensor, "n seq dim"], draw: torch.Generator
    ) -> Float[Tensor, "n seq dim"]:
        if self.site == "output":
            return self._add(clean, draw)
        if self.site == "input":
            return run(self._add(walk.hidden, draw))
        if self.site == "weights":
            with _replaced(walk.view, block, lambda weight: noisy(weight.flatten(), self.eta, draw).view_as(weight)):
                return run(walk.hidden)
        with _changed_output(branch(walk.view.blocks[block], self.site), lambda out: self._add(out, draw)):
            return run(walk.hidden)

    def _add(self, x: Float[Tensor, "n seq dim"], draw: torch.Generator) -> Float[Tensor, "n seq dim"]:
        """Noise on every token but the spared ones."""
        return torch.cat([x[:, : self.spared], noisy(x, self.eta, draw)[:, self.spared :]], dim=1)


@dataclass(frozen=True)
class Pruned:
    """The block really pruned, on statistics of its own clean inputs: a disturbance of pruning's size and shape.

    Attributes:
        pruner: how.
        sparsity: zeros of each of its matrices; None is for an allocator to fill in.
    """

    pruner: Pruner = field(default_factory=Wanda)
    sparsity: float | None = None

    def check(self, dtype: torch.dtype) -> None:
        if self.sparsity is None or not 0 < self.sparsity < 1:
            raise UsageError("A pruned block has some zeros", got=self.sparsity, allowed="0 < sparsity < 1")

    def disturbed(
        self, walk: Walk, block: int, run: Run, clean: Float[Tensor, "n seq dim"], draw: torch.Generator
    ) -> Float[Tensor, "n seq dim"]:
        stats = walk.observe(block, self.pruner.needs) if self.pruner.needs else {}
        assert self.sparsity is not None  # `check` refused it
        target = Target(self.sparsity)
        layers = walk.view.layers_of(block)
        new = {x.spec.name: self.pruner.prune(x.weight, stats[x.spec.name], target).weight for x in layers}
        queue = iter(layers)
        with _replaced(walk.view, block, lambda _: new[next(queue).spec.name]):
            return run(walk.hidden)


@dataclass(frozen=True)
class Drift:
    """What became of a disturbance: one entry per injection block l, later block k, seed and window; NaN for k < l.

    Attributes:
        relative: ||h'_k - h_k|| / ||h_k||, mean over the tokens of a window, [injected, blocks, seeds, windows].
        frobenius: the same of the window's states as one matrix.
        cosine: of h'_k and h_k, mean over tokens.
        norm: ||h_k|| of every token of the dense model, [blocks, windows, seq].
        injected: the blocks l.
    """

    relative: Float[Tensor, "injected blocks seeds windows"]
    frobenius: Float[Tensor, "injected blocks seeds windows"]
    cosine: Float[Tensor, "injected blocks seeds windows"]
    norm: Float[Tensor, "blocks windows seq"]
    injected: tuple[int, ...]


@torch.no_grad()
def drift(
    view: BlockView,
    tokens: Int[Tensor, "n seq"],
    source: Source,
    *,
    blocks: tuple[int, ...] | None = None,
    seeds: int = 1,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Drift:
    """Disturb each block in turn and compare with the clean run at every later block; one pass over the text.

    All disturbed copies travel together: block k is applied to the clean states and to those disturbed at l < k. Every
    block runs in single precision whatever the model's (half precision rounds by 5e-4 and would drown a small
    disturbance), sums are in double precision. A seed gives the same noise whatever the blocks chosen and the batch
    size.

    Args:
        view: the dense model; its weights and hooks are what they were when this returns or raises.
        tokens: token ids, [n, seqlen].
        source: the disturbance.
        blocks: blocks to disturb; None for all.
        seeds: draws of the noise.
        batch_size: windows per forward; None picks one for the device.
        progress: told after each block.

    Raises:
        UsageError: no such block, or a disturbance below the resolution of single precision.
        NumericsError: a state is not finite; the message names the block.
    """
    dtype = torch.promote_types(view.layers[0].weight.dtype, torch.float32)
    source.check(dtype)
    total = len(view.blocks)
    injected = tuple(range(total)) if blocks is None else tuple(sorted(set(blocks)))
    if not injected or not 0 <= injected[0] <= injected[-1] < total:
        raise UsageError("No such block", got=blocks, allowed=f"0 to {total - 1}")
    shape = (len(injected), total, seeds, len(tokens))
    names, blank = ("relative", "frobenius", "cosine"), torch.tensor(math.nan, dtype=torch.float64, device=view.device)
    found = {name: blank.repeat(shape) for name in names}
    norms = blank.repeat(total, *tokens.shape)
    with full_precision():
        walk = Walk(view, tokens, batch_size or batch_size_for(view.device, tokens.shape[1])).to(dtype)
        copies: dict[tuple[int, int], Tensor] = {}
        for block in range(total):
            run = _runner(walk, block)
            with _in(dtype, view.blocks[block]):
                clean = run(walk.hidden)
                copies = {key: run(state) for key, state in copies.items()}
                for seed in range(seeds if block in injected else 0):
                    draw = torch.Generator(view.device).manual_seed(seed * total + block)
                    copies[injected.index(block), seed] = source.disturbed(walk, block, run, clean, draw)
            for (i, seed), state in copies.items():
                for name, values in _compared(state, clean).items():
                    found[name][i, block, seed] = values
            norms[block] = _inner(clean, clean).sqrt()
            _check_finite(found["relative"][:, block], norms[block], block)
            walk.hidden = clean
            progress(block + 1, total)
    return Drift(**{name: values.cpu() for name, values in found.items()}, norm=norms.cpu(), injected=injected)


def _runner(walk: Walk, block: int) -> Run:
    """The block on hidden states of all windows, batch by batch, leaving the walk where it stands."""

    def run(hidden: Float[Tensor, "n seq dim"]) -> Float[Tensor, "n seq dim"]:
        return torch.cat([walk.call(block, i, hidden[where]) for i, where in enumerate(walk.batches)])

    return run


@contextmanager
def _in(dtype: torch.dtype, module: nn.Module) -> Iterator[None]:
    """A module with floating-point parameters and buffers of another dtype; afterwards it has the old tensors."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point() and t.dtype != dtype]
    before = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def noisy(x: Float[Tensor, "*rows dim"], eta: float, draw: torch.Generator) -> Float[Tensor, "*rows dim"]:
    """`x` plus Gaussian noise whose norm is `eta` times that of each row."""
    noise = torch.randn(x.shape, generator=draw, device=x.device, dtype=torch.float32)
    scale = eta * x.float().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    return (x.float() + scale * noise).to(x.dtype)


def branch(block: nn.Module, site: str) -> nn.Module:
    """The attention or MLP module of a block, by its name.

    Raises:
        UsageError: the block has no such module, or several.
    """
    words = {"attention": ("attn", "attention"), "mlp": ("mlp", "ffn", "feed_forward")}[site]
    found = [
        module
        for name, module in block.named_children()
        if any(word in name.lower() for word in words) and any(isinstance(m, nn.Linear) for m in module.modules())
    ]
    if len(found) != 1:
        names = ", ".join(name for name, _ in block.named_children())
        raise UsageError(
            f"The {site} branch of this model's blocks was not found", got=names, fix="site=output, input or weights"
        )
    return found[0]


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


@contextmanager
def _replaced(view: BlockView, block: int, new: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Other weights in every matrix of a block, in order; put back whatever happens."""
    layers = view.layers_of(block)
    before = [layer.weight.clone() for layer in layers]
    try:
        for layer, weight in zip(layers, before, strict=True):
            layer.write(new(weight).to(weight.dtype))
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.write(weight)


def _compared(state: Float[Tensor, "n seq dim"], clean: Float[Tensor, "n seq dim"]) -> dict[str, Tensor]:
    """Measures of one disturbed copy, each [n]."""
    off, size = _inner(state - clean, state - clean), _inner(clean, clean).clamp_min(1e-300)
    old, new = size.sqrt(), _inner(state, state).clamp_min(1e-300).sqrt()
    # 1 - cos by the difference: the plain formula loses an angle of 1e-4 in the rounding of single precision.
    longer = (2 * _inner(clean, state - clean) + off) / (old + new)
    return {
        "relative": (off / size).sqrt().mean(-1),
        "frobenius": (off.sum(-1) / size.sum(-1)).sqrt(),
        "cosine": 1 - ((off - longer.square()) / (2 * old * new)).mean(-1),
    }


def _inner(a: Float[Tensor, "n seq dim"], b: Float[Tensor, "n seq dim"]) -> Float[Tensor, "n seq"]:
    """Inner products of tokens, summed in double precision."""
    return (a * b).sum(-1, dtype=torch.float64)


def _check_finite(relative: Tensor, norm: Tensor, block: int) -> None:
    if torch.isinf(relative).any() or not torch.isfinite(norm).all():
        raise NumericsError(f"The hidden states after block {block} are not finite", fix="dtype=float32")
