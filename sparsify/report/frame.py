"""Records as pandas frames: long rows, one per measurement, and from those the wide rows that tables query."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sparsify.errors import RecordError
from sparsify.runs import registry
from sparsify.runs.labels import is_text, text_label
from sparsify.runs.record import Record
from sparsify.types import Measurement

REQUIRED = ("key", "evaluation", "metric", "protocol", "value")
MEASUREMENT = ("evaluation", "metric", "protocol", "value", "text_sha256", "stderr", "n", "curve", "curve_stderr")
"""Columns of a long row that belong to the evaluation; all others describe the cell."""

GROUPS = ("pruner", "allocator", "method", "objective", "recovery", "quantiser")
"""Components of a cell, each a column of its config name and one for every parameter."""

INNER = {"allocator": "allocator", "source": "perturbation", "pruner": "pruner", "schedule": "schedule"}
"""Config groups of components inside others, by parameter; others are of the group they stand in."""


def long(records: Iterable[Record]) -> pd.DataFrame:
    """One self-describing row per finished cell and evaluation: what is published and what tables are made from.

    Columns: `key`, `scale`, `model`, `dtype`, `pattern`, `sparsity` (wanted), `achieved` (counted zeros), `seed`;
    `pruner`, `allocator`, `method` and whatever else there is of `GROUPS` by config name, every parameter as
    `allocator.beta`; `num_blocks` and
    `block_sparsity` (counted, first to last block, joined by `|`); `noted.<name>`, what the allocator noted as a
    number, by block (the chosen strength, r) or by two blocks (CKA); `seconds.<step>`; where and with what it ran; then
    `evaluation`, `metric`, `protocol`, `value`, the hash of the tokens, where they apply `stderr`, `n` (documents)
    and `curve` (values by block, joined by `|`) with its `curve_stderr`. Further measurements are rows
    `<evaluation>.<metric>`.
    """
    return pd.DataFrame([row for record in records if record.status == "done" for row in _rows(record)])


def _rows(record: Record) -> list[dict[str, Any]]:
    cell = _cell(record)
    rows = []
    for name, item in record.evaluations.items():
        result = item.result
        shared = {"protocol": result.protocol, "text_sha256": result.text.get("tokens_sha256", "")[:16]}
        rows.append(cell | {"evaluation": name} | shared | _measurement(result))
        for other in result.more:
            rows.append(cell | {"evaluation": f"{name}.{other.metric}"} | shared | _measurement(other))
    return rows


def _measurement(item: Measurement) -> dict[str, Any]:
    """Metric and value, and of the optional columns those that the measurement has."""
    row = {name: getattr(item, name) for name in ("metric", "value", "stderr", "n")}
    row |= {name: _joined(curve) for name in ("curve", "curve_stderr") if (curve := getattr(item, name)) is not None}
    return {name: value for name, value in row.items() if value is not None}


def _cell(record: Record) -> dict[str, Any]:
    science, execution = record.science, record.execution
    row: dict[str, Any] = {"key": record.key, "model": science["model"]["name"], "achieved": record.sparsity}
    row |= {name: science[name] for name in ("scale", "dtype", "pattern", "sparsity", "seed")}
    row |= {"part": science["part"]} if "part" in science else {}
    for group in (group for group in GROUPS if group in science):
        row |= _component(group, group, science[group])
    profile = block_profile(record)
    row |= _trials(record.trials)
    row |= _noted(record.notes)
    row["num_blocks"] = len(profile)
    row["block_sparsity"] = "|".join(f"{value:.5f}" for value in profile)
    row |= {f"seconds.{step}": round(value, 3) for step, value in record.seconds.items()}
    row["calibration"] = _describe(record.calibration)
    row["calibration_sha256"] = record.calibration.get("tokens_sha256", "")[:16]
    row |= {name: execution[name] for name in ("device", "commit", "finished")}
    row |= {name: execution["versions"][name] for name in ("torch", "transformers")}
    return row


def _component(column: str, group: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """A component by its config name and every parameter; a component inside is named in its parameter's column."""
    row = {column: registry.name_of(group, node)}
    for name, value in node.items():
        if is_text(value):
            row[f"{column}.{name}"] = text_label(value)
        elif isinstance(value, Mapping) and "_target_" in value:
            row |= _component(f"{column}.{name}", INNER.get(name, group), value)
        elif not name.startswith("_"):
            row[f"{column}.{name}"] = _scalar(value)
    return row


def _scalar(value: Any) -> Any:
    """A parameter as one CSV field: lists, and components by names of the user's, as JSON."""
    return json.dumps(value, sort_keys=True) if isinstance(value, Mapping | list) else value


def _trials(trials: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What a search tried, in order: held-out perplexities, seconds since its start, and evaluations if a trial is
    many of them; joined by `|`.
    """
    timed = [t for t in trials if t.get("seconds") is not None]
    if not timed:
        return {}
    losses = (math.inf if t["heldout_perplexity"] is None else t["heldout_perplexity"] for t in timed)
    counts = [t["evaluations"] for t in timed if t.get("evaluations") is not None]
    counted = {"trials.evaluations": _joined(counts)} if len(counts) == len(timed) else {}
    return counted | {
        "trials.heldout": _joined(losses),
        "trials.seconds": "|".join(f"{t['seconds']:.3f}" for t in timed),
    }


def _noted(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Of what an allocator noted the numbers, lists and matrices of numbers (rows joined by `;`).

    What it noted layer by layer stays in the record.
    """
    row: dict[str, Any] = {}
    for name, noted in notes.items():
        if isinstance(noted, int | float):
            row[f"noted.{name}"] = float(f"{noted:.6g}")
        elif _are_numbers(noted):
            row[f"noted.{name}"] = _joined(noted)
        elif isinstance(noted, list) and all(_are_numbers(line) for line in noted):
            row[f"noted.{name}"] = ";".join(_joined(line) for line in noted)
    return row


def _are_numbers(noted: Any) -> bool:
    return isinstance(noted, list) and all(isinstance(x, int | float) for x in noted)


def _joined(values: Iterable[float]) -> str:
    return "|".join(f"{x:.6g}" for x in values)


def block_profile(record: Record) -> list[float]:
    """Counted sparsity of each block."""
    zeros: dict[int, int] = {}
    numel: dict[int, int] = {}
    for layer in record.layers:
        zeros[layer["block"]] = zeros.get(layer["block"], 0) + layer["zeros"]
        numel[layer["block"]] = numel.get(layer["block"], 0) + layer["numel"]
    return [zeros[b] / numel[b] for b in sorted(zeros)]


def _describe(provenance: Mapping[str, Any]) -> str:
    if "corpus" not in provenance:
        return str(provenance["source"])
    sizes = f"{provenance['windows']} x {provenance['seqlen']} tokens"
    return f"{provenance['corpus']} {provenance['split']} ({provenance['sampler']} sampler), {sizes}"


def read_long(file: Path) -> pd.DataFrame:
    """Long rows from a published CSV.

    Raises:
        RecordError: not such a file.
    """
    try:
        rows = pd.read_csv(file, dtype={"key": str, "block_sparsity": str})
    except (OSError, ValueError) as error:
        raise RecordError("Published rows cannot be read", got=f"{file}: {error}") from error
    missing = sorted({*REQUIRED} - set(rows))
    if missing:
        raise RecordError("Published rows lack columns", got=f"{file}: no {', '.join(missing)}")
    parameters = [c for c in map(str, rows) if c.startswith(tuple(f"{group}." for group in GROUPS))]
    return rows.assign(**{column: rows[column].map(_as_written) for column in parameters})


def _as_written(value: Any) -> Any:
    """A parameter that shares its column with text (`auto`) is a number again."""
    if not isinstance(value, str):
        return value
    try:
        return float(value) if any(c in value for c in ".en") else int(value)
    except ValueError:
        return value


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per cell: its description, every evaluation's value under its name (`test`), and `test.protocol`.

    Where a measurement has them, also `boolq.stderr`, `boolq.n` and `error_growth.absolute.curve`. Parameters that came
    after a cell was run have their former value (`_since_`).
    """
    shared = [column for column in rows if column not in MEASUREMENT]
    cells = rows.drop_duplicates("key")[shared].set_index("key", drop=False)
    measured: dict[str, pd.Series] = {}
    for name, part in rows.groupby("evaluation"):
        by_key = part.set_index("key")
        measured |= {str(name): by_key["value"], f"{name}.protocol": by_key["protocol"]}
        for extra in ("stderr", "n", "curve", "curve_stderr"):
            if extra in by_key and by_key[extra].notna().any():
                measured[f"{name}.{extra}"] = by_key[extra]
    whole = pd.concat([_with_former_values(cells), pd.DataFrame(measured, index=cells.index)], axis=1)
    return whole.reset_index(drop=True)


def _with_former_values(cells: pd.DataFrame) -> pd.DataFrame:
    """Fill parameters that a record does not have, because its cell was run with their former value or before them."""
    filled = cells.copy()
    for column in map(str, cells):
        for name, fields in registry.former_values(_group_of(column)).items():
            for field, value in fields.items():
                lacking = cells[column].eq(name) & cells.get(f"{column}.{field}", pd.Series(index=cells.index)).isna()
                filled.loc[lacking, f"{column}.{field}"] = value
    return filled


def _group_of(column: str) -> str:
    """The config group of a component's column: `pruner` for `allocator.pruner`."""
    group, *places = column.split(".")
    return next((INNER[place] for place in reversed(places) if place in INNER), group)


def profiles(cells: pd.DataFrame) -> dict[str, list[float]]:
    """Counted sparsity by block of every cell that has it, by key."""
    known = cells[cells["block_sparsity"].notna()]
    return {row["key"]: [float(x) for x in str(row["block_sparsity"]).split("|")] for _, row in known.iterrows()}


def similarities(cells: pd.DataFrame) -> dict[str, list[list[float]]]:
    """How similar the inputs of every two blocks are, by measure: what the first cell that allocated by it noted."""
    if "noted.similarity" not in cells:
        return {}
    noted = cells[cells["noted.similarity"].notna()].drop_duplicates("allocator.measure")
    return {
        row["allocator.measure"]: [[float(x) for x in line.split("|")] for line in row["noted.similarity"].split(";")]
        for _, row in noted.iterrows()
    }
