"""Records as pandas frames: one wide row per cell for tables, long rows per measurement for publication."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from sparsify import registry

Record = Mapping[str, Any]


def wide(records: Iterable[Record]) -> pd.DataFrame:
    """One row per finished cell.

    Columns: `key`, `scale`, `model`, `pruner`, `allocator`, `method`, `pattern`, `sparsity` (wanted), `achieved`,
    `seed`; every parameter of a component as `allocator.beta`; every evaluation's value under its name (`test`)
    and its protocol as `test.protocol`; `seconds.<step>`.
    """
    return pd.DataFrame([_wide_row(record) for record in records])


def _wide_row(record: Record) -> dict[str, Any]:
    science = record["science"]
    row: dict[str, Any] = {
        "key": record["key"],
        "scale": science["scale"],
        "model": science["model"]["name"],
        "dtype": science["dtype"],
        "pattern": science["pattern"],
        "sparsity": science["sparsity"],
        "achieved": record["sparsity"],
        "seed": science["seed"],
    }
    for group in ("pruner", "allocator", "method"):
        row[group] = registry.name_of(group, science[group])
        row |= {f"{group}.{k}": v for k, v in science[group].items() if not k.startswith("_")}
    for name, item in record["evaluations"].items():
        row[name] = item["value"]
        row[f"{name}.protocol"] = item["protocol"]
    row |= {f"seconds.{step}": value for step, value in record["seconds"].items()}
    row["num_blocks"] = len({layer["block"] for layer in record["layers"]})
    return row


def long(records: Iterable[Record]) -> pd.DataFrame:
    """One row per cell and evaluation, self-describing: what is committed under `results/published`."""
    rows = []
    for record in records:
        base = {k: v for k, v in _wide_row(record).items() if not isinstance(v, dict)}
        names = set(record["evaluations"])
        base = {k: v for k, v in base.items() if k.split(".")[0] not in names}
        for name, item in record["evaluations"].items():
            text = item.get("text", {})
            rows.append(
                {
                    **base,
                    "evaluation": name,
                    "metric": item["metric"],
                    "protocol": item["protocol"],
                    "value": item["value"],
                    "text_sha256": text.get("tokens_sha256", "")[:16],
                    "calibration_sha256": record["calibration"].get("tokens_sha256", "")[:16],
                    "device": record["execution"]["device"],
                    "commit": record["execution"]["commit"],
                    "torch": record["execution"]["versions"]["torch"],
                    "transformers": record["execution"]["versions"]["transformers"],
                }
            )
    return pd.DataFrame(rows)


def block_profile(record: Record) -> list[float]:
    """Counted sparsity of each block."""
    zeros: dict[int, int] = {}
    numel: dict[int, int] = {}
    for layer in record["layers"]:
        zeros[layer["block"]] = zeros.get(layer["block"], 0) + layer["zeros"]
        numel[layer["block"]] = numel.get(layer["block"], 0) + layer["numel"]
    return [zeros[b] / numel[b] for b in sorted(zeros)]
