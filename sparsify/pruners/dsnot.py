"""DSnoT: the mask of any pruner, edited without training until the mean of every output is nearer the dense one's."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparsify.errors import UsageError
from sparsify.model.statistics import NORM, LayerStats, Needs, Statistic
from sparsify.pruners.base import Pruned, Pruner
from sparsify.pruners.wanda import Wanda, wanda_scores
from sparsify.types import Target


@dataclass(frozen=True)
class SummedInput(Statistic):
    """Mean over windows of the sum over tokens of x_j, fp32, [inp]: the release's `sum_metric_row`."""

    def start(self, x: Float[Tensor, "rows inp"]) -> Tensor:
        return torch.zeros(x.shape[1], device=x.device)

    def fold(self, state: Any, x: Float[Tensor, "rows inp"], seen: Tensor, total: Tensor) -> None:
        state.mul_((seen / total).float()).add_(x.sum(dim=0) * total.float().reciprocal())


@dataclass(frozen=True)
class Variance(Statistic):
    """Variance of x_j over all tokens, fp32, [inp]; batches are joined exactly (Chan et al.), however they are cut.

    Deviation: the release averages the variances of single windows, which leaves out how far their means are apart.
    """

    def start(self, x: Float[Tensor, "rows inp"]) -> dict[str, Tensor]:
        mean, squares = torch.zeros(2, x.shape[1], device=x.device)
        return {"mean": mean, "squares": squares, "tokens": torch.zeros((), device=x.device)}

    def fold(self, state: Any, x: Float[Tensor, "rows inp"], seen: Tensor, total: Tensor) -> None:
        if len(x) == 0:  # an expert that none of these tokens was routed to
            return
        variance, mean = torch.var_mean(x, dim=0, correction=0)
        apart, share = mean - state["mean"], len(x) / (state["tokens"] + len(x))
        state["squares"].add_(len(x) * variance + apart.square() * state["tokens"] * share)
        state["mean"].add_(apart * share)
        state["tokens"].add_(len(x))

    def finalise(self, state: Any) -> Tensor:
        variance: Tensor = state["squares"] / state["tokens"]
        return variance


SUM, VARIANCE = SummedInput(), Variance()


@dataclass(frozen=True)
class DSnoT:
    """Swaps weights of a row until e = sum_j (W - W')_ij s_j, what pruning took from the mean output, is near zero.

    s_j is the input summed over a window's tokens. A swap moves e towards zero twice: of the pruned weights the one
    with the largest sign(e) W_ij s_j / Var(x_j)^power comes back, and of the kept ones whose W_ij s_j has the other
    sign that with the lowest |W_ij| ||X_j||_2 goes. A row swaps at most `cycles` times, and not once |e| <=
    `threshold`; no weight is swapped twice. A row keeps as many weights as the first pruner left it; under N:M the two
    of a swap are of one group of M.

    Source: Zhang et al., "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs" (arXiv 2310.08915),
    and its released code: s_j is a sum over tokens there, which gives `threshold` its scale.

    Deviations:
        A row stops where its error would turn its sign. The release does so under N:M only: elsewhere rows go to and
        fro, mostly until `cycles` are through. Fifty swaps are few in rows of 4,096 inputs and too many in narrow ones;
        `same_sign=False` is as released.
        A pruner sees one matrix and not its name, so all are edited; the release leaves the MLP alone by default.
        The release edits dense weights below the first pruner's mask. Here kept weights stay as the first pruner made
        them, those that come back are dense, and e counts both: with SparseGPT it starts at what its update left over.
        Under N:M the release drops the group's lowest score of the first pruner, whatever that does to e. Here the
        rule is the one above, and a weight whose group has none to give in return stays away.
        Where candidates run out a row stops; the release goes on with weights that are none.

    Attributes:
        first: makes the mask that is edited.
        cycles: most swaps of a row.
        threshold: of |e|, below which a row is left alone.
        power: of the variance.
        same_sign: whether a row stops before a swap that would turn the sign of e, so that |e| never grows.
    """

    first: Pruner = field(default_factory=Wanda)
    cycles: int = 50
    threshold: float = 0.1
    power: float = 1.0
    same_sign: bool = True
    version: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.first, Pruner):
            fix = "pruner@pruner.first=<name>"
            raise UsageError("first is a component, not a value", got=repr(self.first), fix=fix)
        if self.cycles < 0 or not 0 <= self.threshold < math.inf or not 0 <= self.power <= 10:
            raise UsageError(
                "DSnoT swaps so often, until the error is so small, by gains over a power of the variance",
                got=f"cycles={self.cycles}, threshold={self.threshold}, power={self.power}",
                allowed="cycles >= 0, threshold >= 0, 0 <= power <= 10",
            )

    @property
    def needs(self) -> Needs:
        return self.first.needs | {SUM, VARIANCE, NORM}

    def prune(self, weight: Float[Tensor, "out inp"], stats: LayerStats, target: Target) -> Pruned:
        """Prune as `first` does, then swap.

        Raises:
            UsageError: N:M groups that are not neighbours (RIA's permutation), which cannot be seen from here.
        """
        if target.group is not None and not getattr(self.first, "by_neighbours", True):
            fix = "pruner.first.permute=none"
            raise UsageError("Only groups of M neighbouring inputs can be edited", got=repr(self.first), fix=fix)
        pruned = self.first.prune(weight, stats, target)
        keep = self._edited(weight.float(), pruned, stats, target.group)
        back = weight.to(pruned.weight.dtype)
        return replace(pruned, weight=torch.where(pruned.keep, pruned.weight, back).masked_fill(~keep, 0.0), keep=keep)

    def _edited(
        self, dense: Float[Tensor, "out inp"], pruned: Pruned, stats: LayerStats, group: int | None
    ) -> Bool[Tensor, "out inp"]:
        """The mask after all swaps."""
        absent, present = dense * stats[SUM], pruned.weight.float() * stats[SUM]
        gain, cost = absent / stats[VARIANCE] ** self.power, wanda_scores(pruned.weight, stats.norm)
        sides = []
        for sign in (-1, 1):
            gains = torch.where(~pruned.keep & (sign * absent > 0), sign * gain, -math.inf)
            costs = torch.where(pruned.keep & (sign * present < 0), cost, math.inf)
            sides.append(paired(gains, costs, group or dense.shape[1], self.cycles))
        steps = [present.gather(1, side.gone) - absent.gather(1, side.grown) for side in sides]
        return swapped(pruned.keep, sides, self._taken((absent - present).sum(dim=1), steps, sides))

    def _taken(self, error: Float[Tensor, " out"], steps: list[Tensor], sides: "list[Swaps]") -> Int[Tensor, "out 2"]:
        """How many swaps of either side every row makes, in their order, from the side that its error is on."""
        # One more at the end, that is none: whoever gets there stops.
        step = F.pad(torch.stack(steps, dim=1), (0, 1))
        there = F.pad(torch.stack([side.there for side in sides], dim=1), (0, 1))
        rows = torch.arange(len(error), device=error.device)
        taken = torch.zeros(len(error), 2, dtype=torch.long, device=error.device)
        going = torch.ones_like(error, dtype=torch.bool)
        for _ in range(self.cycles):
            side = (error > 0).long()
            at = rows, side, taken[rows, side]
            after = error + step[at]
            going = going & there[at] & (error.abs() > self.threshold)
            if self.same_sign:
                going = going & (after.sign() == error.sign())
            error = torch.where(going, after, error)
            taken[rows, side] += going
        return taken


class Swaps(NamedTuple):
    """Swaps of every row that move its error one way, the most welcome first.

    Attributes:
        grown: inputs whose weights come back.
        gone: inputs whose weights go for them.
        there: False where a row has no more swaps.
    """

    grown: Int[Tensor, "out n"]
    gone: Int[Tensor, "out n"]
    there: Bool[Tensor, "out n"]


def paired(gains: Float[Tensor, "out inp"], costs: Float[Tensor, "out inp"], group: int, most: int) -> Swaps:
    """In every group the k-th highest gain with the k-th lowest cost, then the pairs of a row by gain.

    What one swap takes is no candidate of another, and the two signs of an error have no candidates in common: the
    pairs are known before the first swap.

    Args:
        gains: -inf where a weight may not come back.
        costs: inf where a weight may not go.
        group: inputs among which weights are swapped.
        most: pairs of a row that are of interest.
    """
    depth = min(most, group)
    grown = gains.unflatten(1, (-1, group)).topk(depth)
    gone = costs.unflatten(1, (-1, group)).topk(depth, largest=False)
    start = torch.arange(0, gains.shape[1], group, device=gains.device)[:, None]
    gain = grown.values.masked_fill(gone.values.isinf(), -math.inf).flatten(1)
    best = gain.topk(min(most, gain.shape[1]))
    back, out = ((part.indices + start).flatten(1).gather(1, best.indices) for part in (grown, gone))
    return Swaps(back, out, best.values > -math.inf)


def swapped(keep: Bool[Tensor, "out inp"], sides: list[Swaps], taken: Int[Tensor, "out 2"]) -> Bool[Tensor, "out inp"]:
    """The mask after the first `taken` swaps of either side."""
    new = keep.clone()
    for side, count in zip(sides, taken.T, strict=True):
        done = torch.arange(side.there.shape[1], device=keep.device) < count[:, None]
        new.scatter_(1, side.grown, new.gather(1, side.grown) | done)
        new.scatter_(1, side.gone, new.gather(1, side.gone) & ~done)
    return new
