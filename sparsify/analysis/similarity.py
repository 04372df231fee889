"""How much alike the inputs of a model's blocks are, over samples: linear CKA, or normalised HSIC."""

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.errors import NumericsError, UsageError
from sparsify.model.statistics import full_precision
from sparsify.model.walk import Walk
from sparsify.progress import Progress, silent

LEAST_WINDOWS = 3
"""The CKA of two samples is one whatever they are: their centred Grams are multiples of each other."""


@torch.no_grad()
def block_similarity(
    walk: Walk, *, centred: bool = True, positions: int = 64, progress: Progress = silent
) -> Float[Tensor, "blocks blocks"]:
    """Similarity of the inputs of every pair of blocks, in [0, 1], on the CPU: symmetric, one on the diagonal.

    With X_i [n, seq * dim] the hidden states before block i, a row a window, and K_i = X_i X_i^T:

        CKA(i, j)   = <H K_i H, H K_j H> / (||H K_i H||_F ||H K_j H||_F),  H = I - 1 1^T / n
        nHSIC(i, j) = ||X_j^T X_i||_F^2 / (||X_i^T X_i||_F ||X_j^T X_j||_F) = <K_i, K_j> / (||K_i||_F ||K_j||_F)

    Source: LoSA (arXiv 2502.14816); CKA is of its released code (`CKA/cka.py`, the biased estimate), nHSIC its text's.
    Only the Grams, n x n, are kept of a block; the release makes them anew for every pair. They are summed in double
    precision (single where there is no other), and centred window against window before the product: that is H K H,
    without the cancellation where all windows share a few huge activations.

    Args:
        walk: before the first block; after this, before the last.
        centred: CKA; without it nHSIC.
        positions: of all windows that are copied at a time.
        progress: told after each block.

    Raises:
        UsageError: fewer than three windows, of which nothing can be said.
        NumericsError: states that are not finite, or the same in every window; the message names the block.
    """
    if len(walk.hidden) < LEAST_WINDOWS:
        raise UsageError(
            "The similarity of blocks is taken over windows",
            got=f"{len(walk.hidden)} of them",
            allowed=f"at least {LEAST_WINDOWS}",
            fix="more calibration windows",
        )
    total = len(walk.view.blocks)
    grams: list[Tensor] = []
    with full_precision():
        for block in range(total):
            if block:
                walk.advance(block - 1)
            gram = sample_gram(walk.hidden, centred=centred, positions=positions)
            grams.append(_unit(gram, block, total).cpu())
            progress("block", block + 1, total)
    units = torch.stack(grams).flatten(1)
    cosines = units @ units.T
    return ((cosines + cosines.T) / 2).clamp(0, 1).fill_diagonal_(1)


def sample_gram(
    hidden: Float[Tensor, "n seq dim"], *, centred: bool = True, positions: int = 64
) -> Float[Tensor, "n n"]:
    """K = X X^T of samples flattened to rows, centred on both sides or as it is; summed some positions at a time."""
    dtype = torch.float32 if hidden.is_mps else torch.float64
    gram = torch.zeros(len(hidden), len(hidden), dtype=dtype, device=hidden.device)
    for part in hidden.split(positions, dim=1):
        rows = part.to(dtype, copy=True).flatten(1)
        if centred:
            rows -= rows[:1].clone()  # what all windows share is gone to the last bit
            rows -= rows.mean(0)
        gram += rows @ rows.T
    return (gram + gram.T) / 2


def _unit(gram: Float[Tensor, "n n"], block: int, total: int) -> Float[Tensor, "n n"]:
    """The Gram at Frobenius norm one, scaled before its entries are squared."""
    largest = gram.abs().max()
    if not torch.isfinite(largest) or largest == 0:
        what = "the same in every window" if largest == 0 else "not finite"
        fix = "other windows" if largest == 0 else "a model whose states are finite, or dtype=float32"
        raise NumericsError(f"The inputs of block {block + 1} of {total} are {what}", fix=fix)
    gram = gram / largest
    return gram / torch.linalg.matrix_norm(gram)
