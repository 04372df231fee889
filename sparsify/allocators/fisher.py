"""Fisher ranks without a search: one level more for the most sensitive third, one less for the least."""

from dataclasses import dataclass

from sparsify.allocators.base import Allocator
from sparsify.allocators.context import Context
from sparsify.allocators.profile import Profile
from sparsify.analysis.fisher import fisher_traces
from sparsify.analysis.units import Groups, Measure, aggregated, check_groups, check_measure, units
from sparsify.data.inputs import first
from sparsify.errors import UsageError
from sparsify.types import LayerTable, Pattern, check_whole


@dataclass(frozen=True)
class FisherRanks(Allocator):
    """Blocks ranked by the trace of their Fisher information: the top third keeps a level more, the bottom third less.

    Source: MSP (arXiv 2503.11164) builds the first population of its search from such sensitivities; how is not known
    to us. The rule is ours, and is the seed of that search: s = S - level for the third of the units with the largest
    traces, S + level for the third with the smallest, S between; then all move together until the budget is met. With
    `mixed:M` a level is one kept weight of M, 1/M; unstructured it is `step`. Equal traces rank as they come in the
    model. What is a sample and what a window's loss is stands at `analysis.fisher.fisher_traces`.

    Attributes:
        groups: what is ranked: a `block`, or a `layer` (matrix).
        measure: `sum` of a unit's trace, or `mean` per weight; the same order where units are of one size.
        step: level of an unstructured plan.
        windows: calibration windows of the traces; None for all.
    """

    groups: Groups = "block"
    measure: Measure = "sum"
    step: float = 0.05
    windows: int | None = None
    version: int = 1

    def __post_init__(self) -> None:
        check_groups(self.groups)
        check_measure(self.measure)
        if not isinstance(self.step, int | float) or not 0 < self.step < 0.5:
            raise UsageError("step is a change of sparsity", got=self.step, allowed="0 < step < 0.5", fix="step=0.05")
        check_whole("windows", self.windows, or_null=True)

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        traces = sensitivities(context, layers, self.windows, self.groups, self.measure)
        level = self._level(context.pattern)
        change = [level * third for third in thirds(traces)]
        values = {
            name: sparsity - delta
            for unit, delta in zip(units(layers, self.groups), change, strict=True)
            for name in unit
        }
        return Profile(values, notes={"fisher_trace": traces})

    def _level(self, pattern: Pattern) -> float:
        return self.step if pattern.group is None else 1 / pattern.group


def sensitivities(
    context: Context, layers: LayerTable, windows: int | None, groups: Groups, measure: Measure
) -> list[float]:
    """Fisher trace of every unit, from the first calibration windows (all for None); taken once for a dense model."""
    inputs = first(context.calibration, windows)
    traces = context.once(
        ("fisher", windows, context.objective),
        lambda: fisher_traces(context.view, inputs, context.objective, context.progress),
    )
    return aggregated(traces, layers, groups, measure)


def thirds(values: list[float]) -> list[int]:
    """1 for the third with the largest values, -1 for that with the smallest, 0 between; rounded where uneven."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    count = round(len(values) / 3)
    found = [0] * len(values)
    for low in order[:count]:
        found[low] = -1
    for high in order[len(values) - count :]:
        found[high] = 1
    return found
