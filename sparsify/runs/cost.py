"""How long cells will take, by the finished ones of their kind. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsify.runs import registry
from sparsify.runs.identity import Config, sparsity_of
from sparsify.runs.record import Record

Kind = tuple[Any, ...]


@dataclass
class Costs:
    """Median seconds of pruning and of each evaluation, by ever rougher kinds of cells.

    Pruning by a rule, by a search of 30 trials and by one of 400 are different kinds; so are the evaluations. Where
    nothing of a kind has run, a cell's time is unknown rather than that of something else.

    Attributes:
        seconds: what finished cells took, by kind.
    """

    seconds: dict[Kind, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Costs:
        """Learn from finished records."""
        costs = cls()
        for record in records:
            took = record.seconds
            for kind in _prunings(record.science) if "prune" in took else ():
                costs.seconds.setdefault(kind, []).append(took["prune"])
            for name in record.evaluations:
                if name in took:
                    costs.seconds.setdefault(_evaluation(record.science, name), []).append(took[name])
        return costs

    def expected(self, config: Config, evaluations: Sequence[str]) -> float | None:
        """Seconds of a cell; None if nothing of its kind, or one of its evaluations, has run."""
        parts = [self._first(_prunings({**config, "sparsity": sparsity_of(config)}))]
        parts += [self._first([_evaluation(config, name)]) for name in evaluations]
        return None if None in parts else sum(part for part in parts if part is not None)

    def _first(self, kinds: Sequence[Kind]) -> float | None:
        return next((statistics.median(self.seconds[kind]) for kind in kinds if kind in self.seconds), None)


def _prunings(science: Mapping[str, Any]) -> list[Kind]:
    """Kinds of the pruning of a cell, the narrowest first: the same but for numbers; the same names; any pruner."""
    where = (science["model"]["name"], science["scale"], science["sparsity"] == 0)
    pruner = registry.name_of("pruner", science["pruner"])
    allocator = registry.name_of("allocator", science["allocator"])
    if not science["sparsity"]:
        return [where]
    efforts = _efforts(science["allocator"])
    return [(*where, pruner, allocator, efforts), (*where, allocator, efforts)]


def _evaluation(science: Mapping[str, Any], name: str) -> Kind:
    return science["model"]["name"], science["scale"], "evaluation", name


def _efforts(node: Mapping[str, Any]) -> Kind:
    """What of an allocator's parameters decides its cost: words and counts, but not fractions.

    A record has no fields that came after it, or that have their former value (`_since_`).
    """
    found: list[Any] = []
    since = node.get("_since_", {})
    for key, value in sorted(node.items()):
        if key == "_target_":
            found.append(registry.name_of("allocator", node))
        elif key.startswith("_") or (key in since and value == since[key]):
            continue
        elif isinstance(value, Mapping):
            found.append((key, _efforts(value)))
        elif not isinstance(value, float | list):
            found.append((key, value))
    return tuple(found)
