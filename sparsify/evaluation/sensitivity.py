"""How sensitive blocks and matrices are, as evaluations: what foretells it, and the damage of pruning each alone."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from sparsify.allocators.profile import Profile
from sparsify.analysis.fisher import fisher_traces
from sparsify.analysis.sensitivity import pruning_damage
from sparsify.analysis.units import Groups, Measure, aggregated, check_groups
from sparsify.data.inputs import first
from sparsify.data.windows import Windows
from sparsify.errors import UsageError
from sparsify.evaluation.base import Subject
from sparsify.model.objective import NextToken
from sparsify.pruners.base import Pruner
from sparsify.pruners.wanda import Wanda
from sparsify.search.ranks import RankProxy
from sparsify.types import Evaluation, LayerTable, Measurement, Pattern, Target, check_whole


@dataclass(frozen=True)
class FisherTraces:
    """Trace of the empirical Fisher information of the model as it stands, by block and by matrix.

    Source: MSP (arXiv 2503.11164); what it is of stands at `analysis.fisher.fisher_traces`.

    Attributes:
        windows: which text.
        limit: windows of the text that are used; None for all.
    """

    windows: Windows
    limit: int | None = None
    version: int = 1

    def __post_init__(self) -> None:
        check_whole("limit", self.limit, or_null=True)

    def check(self, subject: Subject) -> None:
        """The text is there, and the model can read its windows."""
        subject.check(self.windows)

    def evaluate(self, subject: Subject) -> Evaluation:
        """`trace` of all prunable weights; under `more` curves by block of `sum` and `mean` per weight, and
        `sum.<kind>` and `mean.<kind>` of the matrices of each kind, in the order of the blocks.
        """
        inputs = first(subject.inputs(self.windows), self.limit)
        traces = fisher_traces(subject.view, inputs, NextToken(), subject.progress)
        return Evaluation(
            metric="trace",
            value=sum(traces.values()),
            protocol=f"{self.windows.protocol}, first {len(inputs)}",
            text=inputs.provenance,
            more=tuple(sums_and_means(traces, subject.view.table)),
        )


@dataclass(frozen=True)
class MarginalCosts:
    """What one zero more costs in every matrix where the model stands pruned alike: `equimarginal`'s first step.

    Uniform unstructured Wanda by `RankProxy.settle`, then `marginal_costs`, on one text: rise of its loss in nats per
    prediction for one zero more, to first order.

    Attributes:
        windows: which text.
        sparsity: of every matrix.
        band: weights around the threshold that are priced, as a fraction of a row.
        limit: windows of the text that are used; None for all.
    """

    windows: Windows
    sparsity: float
    band: float = 0.04
    limit: int | None = None
    version: int = 1

    def __post_init__(self) -> None:
        check_whole("limit", self.limit, or_null=True)
        if not 0 < self.sparsity < 1 or not 0 < self.band < 1:
            got = f"sparsity={self.sparsity}, band={self.band}"
            raise UsageError("sparsity and band are fractions", got=got, allowed="0 < sparsity < 1, 0 < band < 1")

    def check(self, subject: Subject) -> None:
        """The text is there, and the model can read its windows."""
        subject.check(self.windows)

    def evaluate(self, subject: Subject) -> Evaluation:
        """`marginal_cost`, the mean over all weights; under `more` what `FisherTraces` has: `mean` is the cost of a
        zero, `sum` that times the unit's weights.
        """
        inputs, view = first(subject.inputs(self.windows), self.limit), subject.view
        subject.progress("settling", 0, 2)
        with RankProxy(view, view.snapshot(), inputs, NextToken()).closing() as proxy:
            proxy.settle({layer.name: Target(self.sparsity) for layer in view.table})
            subject.progress("pricing", 1, 2)
            costs = proxy.marginal_costs(inputs, self.band)
        sums = {layer.name: costs[layer.name] * layer.numel for layer in view.table}
        return Evaluation(
            metric="marginal_cost",
            value=sum(sums.values()) / view.table.numel,
            protocol=f"{self.windows.protocol}, first {len(inputs)}",
            text=inputs.provenance,
            more=tuple(sums_and_means(sums, view.table)),
        )


@dataclass(frozen=True)
class PruningDamage:
    """Rise of the loss on held-out text when one block, or one matrix, alone is pruned.

    Source: the validation of MSP (arXiv 2503.11164), as far as it is known; what is pruned how is ours.

    Attributes:
        windows: text that statistics are taken on.
        text: text whose loss counts.
        sparsity: of the pruned unit; what an N:M implies.
        pattern: `unstructured` or N:M.
        pruner: how.
        groups: a unit is a `block` or a `layer` (matrix).
        limit: windows of `text` that are used; None for all.
    """

    windows: Windows
    text: Windows
    sparsity: float
    pattern: str = "unstructured"
    pruner: Pruner = field(default_factory=Wanda)
    groups: Groups = "block"
    limit: int | None = None
    version: int = 1

    def __post_init__(self) -> None:
        check_groups(self.groups)
        check_whole("limit", self.limit, or_null=True)
        if not 0 < self.sparsity < 1:
            raise UsageError("A pruned unit has some zeros", got=self.sparsity, allowed="0 < sparsity < 1")
        pattern = Pattern.parse(self.pattern)
        implied = self.sparsity if pattern.group is None else pattern.sparsity
        if implied is None or not math.isclose(self.sparsity, implied):
            allowed = "unstructured, or N:M at the sparsity that it implies"
            raise UsageError("A pattern has a sparsity", got=f"{self.pattern} at {self.sparsity}", allowed=allowed)

    def check(self, subject: Subject) -> None:
        """Both texts are there, and the model can read their windows."""
        subject.check(self.windows)
        subject.check(self.text)

    def evaluate(self, subject: Subject) -> Evaluation:
        """`damage`, mean over units, in nats per prediction: a curve by block, or, of matrices, a curve of each kind
        under `more`; standard errors are over windows.
        """
        table, text = subject.view.table, first(subject.inputs(self.text), self.limit)
        damage = pruning_damage(
            subject.view,
            subject.inputs(self.windows),
            text,
            self.pruner,
            self._targets(table),
            groups=self.groups,
            batch_size=subject.batch_size,
            progress=subject.progress,
        )
        whole = _curve("damage", damage).to_json() if self.groups == "block" else {"metric": "damage"}
        return Evaluation(
            **(whole | {"value": float(damage.mean())}),
            protocol=f"{self.text.protocol}, first {len(text)}",
            text=text.provenance,
            more=tuple(_by_kind(damage, table)) if self.groups == "layer" else (),
        )

    def _targets(self, table: LayerTable) -> Mapping[str, Target]:
        """The same for every matrix; refused where the pattern does not fit one."""
        uniform = Profile({layer.name: self.sparsity for layer in table})
        return uniform.fitted(table, self.sparsity, Pattern.parse(self.pattern)).targets


def sums_and_means(sums: Mapping[str, float], table: LayerTable) -> Iterator[Measurement]:
    """Curves of sums over weights and of means per weight: by block, and by the matrices of each kind."""
    measures: tuple[Measure, ...] = ("sum", "mean")
    for measure in measures:
        yield _values(measure, aggregated(sums, table, "block", measure))
        by_layer = aggregated(sums, table, "layer", measure)
        for kind, places in kinds(table).items():
            yield _values(f"{measure}.{kind}", [by_layer[i] for i in places])


def kinds(table: LayerTable) -> dict[str, list[int]]:
    """Positions of the matrices of each kind (`mlp.up_proj`), in the order of the blocks."""
    places: dict[str, list[int]] = {}
    for i, layer in enumerate(table):
        places.setdefault(layer.kind, []).append(i)
    return places


def _by_kind(damage: Float[Tensor, "layers windows"], table: LayerTable) -> Iterator[Measurement]:
    for kind, places in kinds(table).items():
        yield _curve(kind, damage[places])


def _curve(metric: str, values: Float[Tensor, "units windows"]) -> Measurement:
    """Means over windows, with their standard errors where there are windows enough to tell."""
    curve, windows = values.mean(1).tolist(), values.shape[1]
    errors = (values.std(1) / windows**0.5).tolist() if windows > 1 else None
    return Measurement(metric=metric, value=curve[-1], curve=curve, curve_stderr=errors)


def _values(metric: str, curve: list[float]) -> Measurement:
    return Measurement(metric=metric, value=curve[-1], curve=curve)
