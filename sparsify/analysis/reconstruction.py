"""How far the outputs of every block are from the dense model's: what LoSA shares ranks out by."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsify.data.inputs import Inputs
from sparsify.errors import NumericsError
from sparsify.model.blocks import BlockView
from sparsify.model.walk import Walk
from sparsify.progress import Progress, silent


@torch.no_grad()
def reconstruction_losses(
    view: BlockView,
    dense: Mapping[str, Tensor],
    inputs: Inputs | Int[Tensor, "n seq"],
    *,
    batch_size: int | None = None,
    progress: Progress = silent,
) -> list[float]:
    """L_i = mean over channels c of ||Y_i[:,c] - Y~_i[:,c]||^2 / ||Y_i[:,c]||^2, by block.

    Y_i is the dense block's output on the dense model's inputs, Y~_i the pruned one's on what the pruned blocks before
    it give; norms are over all tokens of all samples, in double precision.

    Source: LoSA (arXiv 2502.14816), Eq. 6-7 and the released `lib/prune.py`, which keeps the dense model's outputs of
    all blocks (69 GB for LLaMA-2-7B). Here both models are carried through the text side by side: two buffers of hidden
    states.

    Args:
        view: the pruned model; its weights are what they were when this returns or raises.
        dense: the prunable weights as they were, by layer name.
        inputs: what is run through both models, or token ids [n, seqlen].
        batch_size: samples per forward.
        progress: told after each block.

    Raises:
        NumericsError: a block's output is not finite, or nothing; the message names the block.
    """
    true = Walk(view, inputs, batch_size)
    pruned = true.fork()
    losses = []
    for block in range(len(view.blocks)):
        with view.replaced(block, dense):
            true.advance(block)
        pruned.advance(block)
        losses.append(_relative(true, pruned, block))
        progress("block", block + 1, len(view.blocks))
    return losses


def _relative(true: Walk, pruned: Walk, block: int) -> float:
    """L_i of the states that both walks have behind a block, batch by batch."""
    sums = []
    for batch in true.batches:
        wanted = true.hidden[batch].float()
        sums.append(torch.stack([_by_channel(pruned.hidden[batch].float() - wanted), _by_channel(wanted)]))
    error, norm = torch.stack(sums).sum(dim=0)
    loss = float((error / norm.clamp_min(1e-30)).mean())
    if not loss < float("inf"):
        raise NumericsError(
            f"The outputs of block {block} are not finite", got=loss, fix="dtype=float32 if this is half precision"
        )
    return loss


def _by_channel(states: Float[Tensor, "b seq dim"]) -> Float[Tensor, " dim"]:
    return states.square().sum(dim=(0, 1), dtype=torch.float64)
