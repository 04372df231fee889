"""AlphaPruning: matrices whose spectrum has a heavy tail are well trained and pruned less."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.allocators.base import Allocator
from sparsify.allocators.budget import scale
from sparsify.allocators.context import Context
from sparsify.allocators.profile import Profile
from sparsify.errors import NumericsError, UsageError
from sparsify.types import LayerTable


@dataclass(frozen=True)
class AlphaPruning(Allocator):
    """Sparsity linear in the block's mean power-law exponent, scaled to the budget.

    Source: Lu et al., "AlphaPruning" (arXiv 2410.10912), Eq. 3-4, by the released code: phi = min-max of alpha
    mapped to [1 - tau, 1 + tau], s = eta phi with the parameter-weighted mean of s equal to S.

    Deviation: the release never clips, and at high sparsity can ask a block for more than 1, which empties it.
    Here such blocks are held at 0.99 and eta is solved again. `clip=False` gives the released behaviour, for
    comparison only; the ledger then shows the budget it misses.

    Attributes:
        tau: half the width of phi.
        estimator: `alpha_peak` (fix-finger, the paper's choice for language models) or `alpha_mid` (median).
        mapping: `block` averages alpha over a block's matrices; `layer` does not.
        clip: hold sparsities within [0, 0.99].
    """

    tau: float = 0.3
    estimator: Literal["alpha_peak", "alpha_mid"] = "alpha_peak"
    mapping: Literal["block", "layer"] = "block"
    clip: bool = True
    version: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.tau < 1:
            raise UsageError("tau is half the width of the sparsity ratios", got=self.tau, allowed="0 <= tau < 1")
        if self.estimator not in ESTIMATORS:
            raise UsageError("Unknown alpha estimator", got=self.estimator, allowed=", ".join(ESTIMATORS))
        if self.mapping not in ("block", "layer"):
            raise UsageError("Unknown mapping", got=self.mapping, allowed="block, layer")

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        alphas = context.once(("alpha", self.estimator), lambda: self._alphas(context), of_weights=True)
        signal = alphas if self.mapping == "layer" else block_means(layers, alphas)
        values = spectral_profile(layers, signal, self.tau, sparsity)
        return Profile(values, adjust=scale, exact=self.clip, notes={"alpha": alphas})

    def _alphas(self, context: Context) -> dict[str, float]:
        estimate = ESTIMATORS[self.estimator]
        return {name: estimate(spectrum(weight)) for name, weight in context.weights().items()}


def block_means(layers: LayerTable, alphas: dict[str, float]) -> dict[str, float]:
    """The mean exponent of a layer's block, by layer name."""
    by_block: dict[int, list[float]] = {}
    for layer in layers:
        by_block.setdefault(layer.block, []).append(alphas[layer.name])
    return {layer.name: sum(by_block[layer.block]) / len(by_block[layer.block]) for layer in layers}


def spectral_profile(layers: LayerTable, signal: dict[str, float], tau: float, sparsity: float) -> dict[str, float]:
    """Eta * phi for every layer, not clipped; a constant signal gives the uniform allocation."""
    low, high = min(signal.values()), max(signal.values())
    span = (high - low) or 1.0
    phi = {x.name: (signal[x.name] - low) / span * 2 * tau + 1 - tau for x in layers}
    eta = sparsity * layers.numel / sum(phi[x.name] * x.numel for x in layers)
    return {name: eta * value for name, value in phi.items()}


def spectrum(weight: Float[Tensor, "out inp"]) -> Float[Tensor, " n"]:
    """Eigenvalues of W^T W, ascending, on the CPU; those that are zero up to rounding are left out.

    Taken from the smaller Gram matrix in double precision: in single precision an accelerator's decomposition differs
    from the CPU's (which the release uses) by enough to move an eigenvalue into another bin of `alpha_peak`.

    Raises:
        NumericsError: fewer than two eigenvalues are left.
    """
    wide = weight.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    values = torch.linalg.eigvalsh(gram).float().cpu()
    values = values[values > values[-1] * torch.finfo(torch.float32).eps ** 2]
    if len(values) < 2:
        raise NumericsError("A spectrum of fewer than two eigenvalues has no power law", got=tuple(weight.shape))
    return values


def alpha_mid(eigenvalues: Float[Tensor, " n"]) -> float:
    """Hill exponent of the upper half of the spectrum."""
    start = len(eigenvalues) // 2
    return float(_hill(eigenvalues, torch.tensor([start], device=eigenvalues.device))[0])


def alpha_peak(eigenvalues: Float[Tensor, " n"], bins: int = 100) -> float:
    """Hill exponent of the tail with the smallest Kolmogorov-Smirnov distance, started near the density's peak.

    The peak is the left edge of the fullest of `bins` bins of log10(eigenvalue). Tails may start where
    log10(0.95 peak) <= eigenvalue <= 1.5 peak; the mixed scales of the lower bound are the release's and kept.
    """
    logs = eigenvalues.log10()
    low, high = logs.min(), logs.max()
    counts = torch.histc(logs, bins, min=float(low), max=float(high))
    peak = 10 ** torch.linspace(float(low), float(high), bins + 1, device=logs.device)[counts.argmax()]
    candidates = eigenvalues[:-1]
    starts = torch.nonzero((candidates >= torch.log10(0.95 * peak)) & (candidates <= 1.5 * peak)).flatten()
    if len(starts) == 0:
        raise NumericsError("No tail of the spectrum starts near its peak", got=f"peak {float(peak):g}")
    alphas = _hill(eigenvalues, starts)
    return float(alphas[_ks_distances(eigenvalues, starts, alphas).argmin()])


def _hill(eigenvalues: Float[Tensor, " n"], starts: Tensor) -> Float[Tensor, " starts"]:
    """1 + n / (sum of ln(lambda_k / lambda_i) over the tail that starts at i, n its length)."""
    logs = eigenvalues.log()
    tail_sums = logs.flip(0).cumsum(0).flip(0)[starts]
    counts = len(eigenvalues) - starts
    return 1 + counts / (tail_sums - counts * logs[starts])


def _ks_distances(
    eigenvalues: Float[Tensor, " n"], starts: Tensor, alphas: Float[Tensor, " starts"]
) -> Float[Tensor, " starts"]:
    """Largest gap between the fitted and the empirical distribution of each tail; 1 where alpha <= 1."""
    place = torch.arange(len(eigenvalues), device=eigenvalues.device) - starts[:, None]
    rank = place / (len(eigenvalues) - starts[:, None])
    ratio = (eigenvalues / eigenvalues[starts][:, None]).clamp_min(1.0)
    gaps = (1 - ratio ** (1 - alphas[:, None]) - rank).abs().masked_fill(place < 0, 0.0).amax(dim=1)
    return torch.where(alphas > 1, gaps, torch.ones_like(gaps))


ESTIMATORS: dict[str, Callable[[Float[Tensor, " n"]], float]] = {"alpha_peak": alpha_peak, "alpha_mid": alpha_mid}
