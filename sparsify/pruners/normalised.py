"""A layer's least-squares problem with inputs of norm one, where one penalty fits all of them."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsify.errors import NumericsError


@dataclass(frozen=True)
class Normalised:
    """||(W - P) X|| written as ||(W' - P') X'||, where W'_ij = W_ij n_j and X'_j = X_j / n_j for the input norms n.

    The magnitudes of W' are Wanda's scores. Inputs that were zero on all calibration text have n_j = 0: their weights
    rank lowest, and those that are kept are as they were.

    Attributes:
        gram: X' X'^T, [inp, inp].
        scale: n.
    """

    gram: Float[Tensor, "inp inp"]
    scale: Float[Tensor, " inp"]

    def scaled(self, weight: Float[Tensor, "out inp"]) -> Float[Tensor, "out inp"]:
        """W' of W, fp32."""
        return weight.float() * self.scale

    def restored(
        self, solution: Float[Tensor, "out inp"], weight: Float[Tensor, "out inp"], keep: Bool[Tensor, "out inp"]
    ) -> Float[Tensor, "out inp"]:
        """W of W', zero where `keep` is False."""
        dead = self.scale == 0
        new = torch.where(dead, weight.float(), solution / self.scale.masked_fill(dead, 1.0))
        return new.masked_fill(~keep, 0.0)


def normalised(gram: Float[Tensor, "inp inp"], damp: float = 0.0) -> Normalised:
    """The problem of a Gram matrix H, or of H + damp * mean(diag H) * I.

    Raises:
        NumericsError: H is not finite.
    """
    if not torch.isfinite(gram).all():
        raise NumericsError("The Gram matrix of a layer's inputs is not finite", fix="use dtype=float32")
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal += damp * diagonal.mean()
    norms = diagonal.sqrt()
    norms = norms.masked_fill(norms == 0, 1.0)
    return Normalised(hessian / norms / norms[:, None], norms.masked_fill(dead, 0.0))
