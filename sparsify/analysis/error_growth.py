"""How the error of pruning grows over depth (ATP, Fig. 1), with what a reader needs to judge it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparsify.data.inputs import Inputs
from sparsify.errors import NumericsError, UnsupportedModelError
from sparsify.model.blocks import BlockView
from sparsify.model.walk import Walk
from sparsify.progress import Progress, silent


@dataclass(frozen=True)
class Growth:
    """What stands at the output of every block, [blocks, windows]; each value is a mean over the tokens of a window.

    With h the residual stream of the dense model, h~ that of the pruned one, B the dense block and B~ the pruned one
    (so that h_i = B_i(h_{i-1}) and h~_i = B~_i(h~_{i-1})):

    Attributes:
        absolute: ||h~_i - h_i||^2: the reconstruction error E_i of ATP, Eq. 1, with inputs from the pruned prefix.
        relative: ||h~_i - h_i|| / ||h_i|| of a token.
        cosine: of h~_i and h_i of a token.
        norm: ||h_i||^2. It grows with depth, and a block that hands its input on hands on the error too: `absolute`
            grows for that reason alone, `relative` does not.
        own: ||B~_i(h~_{i-1}) - B_i(h~_{i-1})||^2: what pruning block i does to the input it gets.
        inherited: ||B_i(h~_{i-1}) - B_i(h_{i-1})||^2: what the dense block makes of the error it is given.
        update: ||(h~_i - h~_{i-1}) - (h_i - h_{i-1})|| / ||h_i - h_{i-1}|| of a token: the relative error of what the
            block adds to the stream.
        absolute_median: of the median token instead of the mean, here and below. The mean of squares is a matter of a
            single token in most models: the massive activation of the first is a hundred times as long as the others.
        norm_median: as above.
        own_median: as above.
        inherited_median: as above.
    """

    absolute: Float[Tensor, "blocks windows"]
    relative: Float[Tensor, "blocks windows"]
    cosine: Float[Tensor, "blocks windows"]
    norm: Float[Tensor, "blocks windows"]
    own: Float[Tensor, "blocks windows"]
    inherited: Float[Tensor, "blocks windows"]
    update: Float[Tensor, "blocks windows"]
    absolute_median: Float[Tensor, "blocks windows"]
    norm_median: Float[Tensor, "blocks windows"]
    own_median: Float[Tensor, "blocks windows"]
    inherited_median: Float[Tensor, "blocks windows"]

    def amplification(self, token: Literal["mean", "median"] = "median") -> Float[Tensor, " later"]:
        """c_i = inherited_i / E_{i-1} from the second block on: above one, the block enlarges what it is given.

        Not a number behind a prefix without error.
        """
        suffix = "" if token == "mean" else "_median"
        given, made = getattr(self, f"absolute{suffix}"), getattr(self, f"inherited{suffix}")
        ratio: Tensor = made[1:].mean(1) / given[:-1].mean(1)
        return ratio


METRICS = tuple(field.name for field in fields(Growth))


@torch.no_grad()
def error_growth(
    view: BlockView,
    dense: Mapping[str, Tensor],
    inputs: Inputs | Int[Tensor, "n seq"],
    *,
    batch_size: int | None = None,
    progress: Progress = silent,
) -> Growth:
    """Carry the text through the dense and the pruned model, block by block.

    One pass per model, and one of the dense blocks over the pruned model's states. Hidden states are in the model's
    own precision, as its perplexity is, differences and norms in single and sums in double precision; half precision
    puts a floor of about 5e-4 (fp16) or 4e-3 (bf16) under the relative error of two models that differ at all.

    Args:
        view: the pruned model; its weights are what they were when this returns or raises.
        dense: the prunable weights as they were, by layer name; everything else is taken to be shared.
        inputs: what is run through both models, or token ids [n, seqlen].
        batch_size: samples per forward; None picks one for the device.
        progress: told after each block.

    Raises:
        NumericsError: a hidden state is not finite; the message names the block.
        UnsupportedModelError: matrices of the pruned model are smaller than the dense ones.
    """
    _check_shapes(view, dense)
    true = Walk(view, inputs, batch_size)
    pruned = true.fork()
    rows = []
    for block in range(len(view.blocks)):
        before, mixed = (true.hidden.clone(), pruned.hidden.clone()), pruned.fork()
        with view.replaced(block, dense):
            true.advance(block)
            mixed.advance(block)
        pruned.advance(block)
        rows.append(_compare(true, pruned, mixed, before))
        _check(rows[-1], block)
        progress("block", block + 1, len(view.blocks))
    return Growth(**{name: torch.stack([row[name] for row in rows]) for name in METRICS})


def _check_shapes(view: BlockView, dense: Mapping[str, Tensor]) -> None:
    for layer in view.layers:
        if layer.weight.shape != dense[layer.spec.name].shape:
            raise UnsupportedModelError(
                "The error of a model that lost heads or channels is not followed: dense weights do not fit its blocks",
                got=f"{layer.spec.name} of shape {tuple(layer.weight.shape)}, "
                f"{tuple(dense[layer.spec.name].shape)} in the dense model",
                fix="eval=perplexity",
            )


def _compare(true: Walk, pruned: Walk, mixed: Walk, before: tuple[Tensor, Tensor]) -> dict[str, Float[Tensor, " n"]]:
    """The row of one block, batch by batch so that no single-precision copy of all states is made."""
    parts: dict[str, list[Tensor]] = {name: [] for name in METRICS}
    for batch in true.batches:
        h, t, m = (walk.hidden[batch].float() for walk in (true, pruned, mixed))
        h_in, t_in = (hidden[batch].float() for hidden in before)
        squares = {"absolute": t - h, "norm": h, "own": t - m, "inherited": m - h}
        tokens = {name: _square(x) for name, x in squares.items()} | {
            "relative": _ratio(t - h, h),
            "cosine": F.cosine_similarity(t, h, dim=-1).double(),
            "update": _ratio((t - t_in) - (h - h_in), h - h_in),
        }
        for name, values in tokens.items():
            parts[name].append(values.mean(-1).cpu())
            if name in squares:
                parts[f"{name}_median"].append(values.median(-1).values.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def _square(x: Float[Tensor, "b seq dim"]) -> Float[Tensor, "b seq"]:
    return x.square().sum(-1, dtype=torch.float64)


def _ratio(difference: Float[Tensor, "b seq dim"], whole: Float[Tensor, "b seq dim"]) -> Float[Tensor, "b seq"]:
    return (_square(difference) / _square(whole).clamp_min(1e-30)).sqrt()


def _check(row: Mapping[str, Tensor], block: int) -> None:
    if not all(bool(torch.isfinite(values).all()) for values in row.values()):
        raise NumericsError(
            f"The hidden states after block {block} are not finite", fix="dtype=float32 if this is half precision"
        )
