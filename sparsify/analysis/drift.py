"""Follow what becomes of a disturbance of one block, down to the last block."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsify.analysis.perturbation import Run, Source
from sparsify.data.inputs import Inputs, as_inputs
from sparsify.errors import NumericsError, UnsupportedModelError, UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.objective import batch_size_for
from sparsify.model.statistics import full_precision
from sparsify.model.walk import Walk
from sparsify.progress import Progress, silent


@dataclass(frozen=True)
class Drift:
    """What became of a disturbance: one entry per injection block l, later block k, seed and window; NaN for k < l.

    With e_k = h'_k - h_k, the disturbed less the clean state:

    Attributes:
        relative: ||e_k|| / ||h_k||, mean over the tokens of a window, [injected, blocks, seeds, windows].
        frobenius: the same of the window's states as one matrix.
        cosine: of h'_k and h_k, mean over tokens.
        start: ||e_l|| of every token, where the disturbance is put in, [injected, seeds, windows, seq].
        end: ||e_L|| of every token, after the last block.
        norm: ||h_k|| of every token of the dense model, [blocks, windows, seq].
        injected: the blocks l.
    """

    relative: Float[Tensor, "injected blocks seeds windows"]
    frobenius: Float[Tensor, "injected blocks seeds windows"]
    cosine: Float[Tensor, "injected blocks seeds windows"]
    start: Float[Tensor, "injected seeds windows seq"]
    end: Float[Tensor, "injected seeds windows seq"]
    norm: Float[Tensor, "blocks windows seq"]
    injected: tuple[int, ...]

    def over_windows(
        self, measure: Float[Tensor, "injected blocks seeds windows"]
    ) -> tuple[Float[Tensor, "injected blocks"], Float[Tensor, "injected blocks"]]:
        """Mean of a measure, and its standard error over windows, all draws of a window together (NaN for one)."""
        by_window = measure.mean(2)
        mean, windows = by_window.mean(-1), by_window.shape[-1]
        return mean, by_window.std(-1) / math.sqrt(windows) if windows > 1 else torch.full_like(mean, math.nan)

    def handed_on(
        self, norm: Literal["token", "frobenius"] = "token"
    ) -> Float[Tensor, "injected blocks seeds windows"]:
        """What `relative` (or `frobenius`) would be if every later block handed e_l on and only the stream grew."""
        rows = []
        for start, block in zip(self.start, self.injected, strict=True):
            if norm == "token":
                ratio = (start / self.norm[:, None]).mean(-1)
            else:
                ratio = (start.square().sum(-1) / self.norm[:, None].square().sum(-1)).sqrt()
            ratio[:block] = math.nan
            rows.append(ratio)
        return torch.stack(rows)


@torch.no_grad()
def drift(
    view: BlockView,
    inputs: Inputs | Int[Tensor, "n seq"],
    source: Source,
    *,
    blocks: tuple[int, ...] | None = None,
    seeds: int = 1,
    batch_size: int | None = None,
    progress: Progress = silent,
) -> Drift:
    """Disturb each block in turn and compare with the clean run at every later block; one pass over the text.

    All disturbed copies travel together: block k is applied to the clean states and to those disturbed at l < k. Every
    block runs in single precision whatever the model's (half precision rounds by 5e-4 and would drown a small
    disturbance), sums are in double precision. A draw is the same noise for any blocks chosen, any batch size and any
    text of a shape.

    Args:
        view: the dense model; its weights and hooks are what they were when this returns or raises.
        inputs: what is run through the model, or token ids [n, seqlen].
        source: the disturbance.
        blocks: blocks to disturb; None for all.
        seeds: draws of the noise, numbered from 0.
        batch_size: samples per forward; None picks one for the device.
        progress: told after each block.

    Raises:
        UsageError: no such block, or a disturbance below the resolution of single precision.
        UnsupportedModelError: blocks that hand on more than hidden states.
        NumericsError: a state, clean or disturbed, is not finite; the message names the block.
    """
    dtype = torch.promote_types(view.layers[0].weight.dtype, torch.float32)
    source.check(dtype)
    total = len(view.blocks)
    injected = tuple(range(total)) if blocks is None else tuple(sorted(set(blocks)))
    if not injected or not 0 <= injected[0] <= injected[-1] < total:
        raise UsageError("No such block", got=blocks, allowed=f"0 to {total - 1}")
    inputs = as_inputs(inputs)
    measures = _Measures.blank(len(injected), total, seeds, (len(inputs), inputs.length), view.device)
    with full_precision():
        walk = Walk(view, inputs, batch_size or batch_size_for(view.device, inputs.length)).to(dtype)
        if walk.stateful:
            raise UnsupportedModelError(
                "Blocks of this model hand each other keys and values, and a disturbed copy would read the clean one's",
                got=type(view.model).__name__,
                allowed="models whose blocks hand on hidden states alone",
            )
        copies: dict[tuple[int, int], Tensor] = {}
        for block in range(total):
            run = _runner(walk, block)
            with _in(dtype, view.blocks[block]):
                clean = run(walk.hidden)
                for key in copies:
                    copies[key] = run(copies[key])
                for seed in range(seeds if block in injected else 0):
                    draw = torch.Generator(view.device).manual_seed(seed * total + block)
                    copies[injected.index(block), seed] = source.disturbed(walk, block, run, clean, draw)
            measures.note(block, injected, copies, clean)
            walk.hidden = clean
            progress("block", block + 1, total)
    return measures.drift(injected)


@dataclass
class _Measures:
    """A drift in the making, on the device of the model."""

    relative: Tensor
    frobenius: Tensor
    cosine: Tensor
    start: Tensor
    end: Tensor
    norm: Tensor

    @classmethod
    def blank(cls, injected: int, blocks: int, seeds: int, text: tuple[int, ...], device: torch.device) -> "_Measures":
        nan = torch.tensor(math.nan, dtype=torch.float64, device=device)
        measure, token = nan.repeat(injected, blocks, seeds, text[0]), nan.repeat(injected, seeds, *text)
        return cls(measure, measure.clone(), measure.clone(), token, token.clone(), nan.repeat(blocks, *text))

    def note(
        self,
        block: int,
        injected: tuple[int, ...],
        copies: Mapping[tuple[int, int], Tensor],
        clean: Float[Tensor, "n seq dim"],
    ) -> None:
        """Compare every disturbed copy with the clean states after a block."""
        size = _inner(clean, clean)
        self.norm[block] = size.sqrt()
        for (i, seed), state in copies.items():
            off = _inner(state - clean, state - clean)
            self.relative[i, block, seed] = (off / size.clamp_min(TINY)).sqrt().mean(-1)
            self.frobenius[i, block, seed] = (off.sum(-1) / size.sum(-1).clamp_min(TINY)).sqrt()
            self.cosine[i, block, seed] = 1 - _turn(state, clean, off, size).mean(-1)
            self.end[i, seed] = off.sqrt()
            if injected[i] == block:
                self.start[i, seed] = off.sqrt()
        here = self.relative[sorted({i for i, _ in copies}), block]
        if not (torch.isfinite(here).all() and torch.isfinite(self.norm[block]).all()):
            raise NumericsError(
                f"The hidden states after block {block + 1} of {len(self.norm)} are not finite",
                fix="a smaller disturbance, or a model without such weights",
            )

    def drift(self, injected: tuple[int, ...]) -> Drift:
        return Drift(**{field.name: getattr(self, field.name).cpu() for field in fields(self)}, injected=injected)


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


TINY = 1e-300
"""In place of zero under a division."""


def _turn(
    state: Float[Tensor, "n seq dim"],
    clean: Float[Tensor, "n seq dim"],
    off: Float[Tensor, "n seq"],
    size: Float[Tensor, "n seq"],
) -> Float[Tensor, "n seq"]:
    """1 - cosine by the difference of the two: the plain formula loses an angle of 1e-4 in single precision."""
    old, new = size.clamp_min(TINY).sqrt(), _inner(state, state).clamp_min(TINY).sqrt()
    longer = (2 * _inner(clean, state - clean) + off) / (old + new)
    return (off - longer.square()) / (2 * old * new)


def _inner(a: Float[Tensor, "n seq dim"], b: Float[Tensor, "n seq dim"]) -> Float[Tensor, "n seq"]:
    """Inner products of tokens, summed in double precision."""
    return (a * b).sum(-1, dtype=torch.float64)
