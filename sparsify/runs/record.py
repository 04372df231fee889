"""A record: everything a cell leaves behind, as `results/runs/<key>/record.json` has it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from sparsify import schema
from sparsify.errors import RecordError
from sparsify.types import Evaluation

SCHEMA = 1
Status = Literal["running", "done", "failed"]


@dataclass(frozen=True)
class Recorded:
    """A finished evaluation.

    Attributes:
        key: of the evaluation, `identity.evaluation_keys`.
        result: what was measured.
    """

    key: str
    result: Evaluation


@dataclass(frozen=True)
class Superseded:
    """An evaluation that is no longer what its name means: other settings, or another text."""

    name: str
    evaluation: Recorded


@dataclass(frozen=True)
class Kept:
    """A model that was kept.

    Attributes:
        file: beside the record.
        sha256: of the file.
        bytes: its size.
    """

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Record:
    """A cell.

    Attributes:
        key: of the run.
        status: `running` until every evaluation asked for has been tried; `failed` if nothing is there.
        science: what the key is a hash of.
        execution: commit, versions, device, time, command: nothing of it is part of the key.
        sparsity: counted zeros over all prunable weights.
        ledger: what became of the budget (`types.Ledger`), with `achieved`.
        trials: what a search tried, in order.
        notes: of allocator, method and stages.
        plan: a row per layer (`SparsityPlan.to_rows`).
        skipped: a row per matrix of the blocks that is not pruned, with the reason.
        layers: a row per layer (`LayerResult.to_row`).
        calibration: where the calibration inputs came from.
        evaluations: by name.
        superseded: evaluations of other settings.
        seconds: by step and by evaluation.
        kept: the model, where it was kept.
        error: what failed, for a failed record.
        traceback: of it.
    """

    key: str
    status: Status
    science: dict[str, Any]
    execution: dict[str, Any]
    sparsity: float = 0.0
    ledger: dict[str, Any] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    plan: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, Recorded] = field(default_factory=dict)
    superseded: list[Superseded] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    kept: Kept | None = None
    error: str | None = None
    traceback: str | None = None

    @property
    def quantised(self) -> dict[str, Any]:
        """What a stage or the method noted of quantising: bits, size, zeros; empty where nothing was quantised."""
        notes = {name.removeprefix("quantiser."): value for name, value in self.notes.items()}
        return notes if "bits_per_weight" in notes else {}

    def to_json(self) -> dict[str, Any]:
        """Plain data; what does not apply is left out, of a failed record all that is empty."""
        tree = {f.name: getattr(self, f.name) for f in fields(self)}
        tree["evaluations"] = {name: _flat(item) for name, item in self.evaluations.items()}
        tree["superseded"] = [{"name": item.name, **_flat(item.evaluation)} for item in self.superseded]
        tree["kept"] = vars(self.kept) if self.kept else None
        empty: tuple[Any, ...] = (None, {}, [], 0.0) if self.status == "failed" else (None,)
        return {"schema": SCHEMA} | {key: x for key, x in tree.items() if x not in empty or key == "evaluations"}

    @classmethod
    def from_json(cls, tree: Any, where: str) -> Record:
        """Read what `to_json` wrote, in this version or an earlier one.

        Raises:
            UsageError: it is no record; the message says what is wrong with it.
            RecordError: it is one of a later version.
        """
        found = tree.get("schema") if isinstance(tree, Mapping) else None
        if isinstance(found, int) and found > SCHEMA:
            raise RecordError(
                "A later version of sparsify wrote this record", got=f"schema {found}", allowed=SCHEMA, fix="git pull"
            )
        if found != SCHEMA:
            schema.refuse(tree, where, f"a record of schema {SCHEMA}")
        plain = {key: value for key, value in tree.items() if key not in ("schema", "evaluations", "superseded")}
        evaluations = schema.load_each(tree.get("evaluations", {}), f"{where}.evaluations")
        record = schema.load(cls, plain, where)
        for name, item in evaluations.items():
            record.evaluations[name] = _recorded(item, f"{where}.evaluations.{name}")
        for i, item in enumerate(schema.load_list(tree.get("superseded", []), f"{where}.superseded")):
            rest = {key: value for key, value in item.items() if key != "name"}
            record.superseded.append(Superseded(str(item.get("name")), _recorded(rest, f"{where}.superseded[{i}]")))
        return record


def _flat(item: Recorded) -> dict[str, Any]:
    return {"key": item.key, **item.result.to_json()}


def _recorded(tree: Mapping[str, Any], where: str) -> Recorded:
    rest = {key: value for key, value in tree.items() if key != "key"}
    if not isinstance(tree.get("key"), str):
        schema.refuse(tree.get("key"), f"{where}.key", "text")
    return Recorded(tree["key"], Evaluation.from_json(rest, where))
