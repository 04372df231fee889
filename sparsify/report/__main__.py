"""`python -m sparsify.report table=table1`: Markdown, CSV, LaTeX and figures from the records. Runs no model."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from sparsify import cli, console, plan
from sparsify.errors import SparsifyError, UsageError
from sparsify.records import Store
from sparsify.report import compare, figures, frame, table, write


def report(name: str, overrides: list[str]) -> list[Path]:
    """Write a table and its figures from whatever records exist; returns the files.

    Args:
        name: a file of `configs/table`.
        overrides: the Hydra overrides that the sweep was run with (model, scale, ...).

    Raises:
        SparsifyError: no cell of this table has finished.
    """
    layout = plan.table_config(name)
    cells = [cell for part in plan.parts_of(name, overrides) for cell in part.cells if cell.state != "illegal"]
    records = _records(cells)
    if not records:
        raise SparsifyError(f"No cell of {name} has finished yet", got=f"0 of {len(cells)} records", fix=f"make {name}")
    config = cells[0].config
    stem = f"{name}_{str(config.model.name).replace('/', '-')}_{config.scale}"
    folder = Path(config.results)
    title = f"{layout.title} — {config.model.name}, {config.scale} scale"
    wide = frame.wide(records.values())
    notes = [*layout.notes, *_footer(wide, records, cells, layout)]
    make = _comparison if layout.get("layout") == "compare" else _perplexities
    return make(layout, folder, stem, title, notes, wide, records, cells)


def _records(cells: list[plan.PlannedCell]) -> dict[str, frame.Record]:
    """Finished records by key."""
    store = Store(cells[0].config.results)
    found = {cell.key: store.read(cell.key) for cell in cells if cell.state == "done"}
    return {key: record for key, record in found.items() if record is not None}


def _perplexities(
    layout: DictConfig,
    folder: Path,
    stem: str,
    title: str,
    notes: list[str],
    wide: pd.DataFrame,
    records: dict[str, frame.Record],
    cells: list[plan.PlannedCell],
) -> list[Path]:
    found = table.entries(layout, wide, *_axes_of(cells))
    paper = table.paper_numbers(layout)
    models = _paper_models(layout, paper, str(cells[0].config.model.name))
    shown = table.grid_frame(found, paper, models)
    protocol = str(wide[f"{layout.value}.protocol"].iloc[0])
    files = write.write(folder / "tables", stem, shown, frame.long(records.values()), title, notes)
    files += figures.dot_plot(folder / "tables", stem, found, title, protocol)
    suffix = stem.partition("_")[2]
    if "beta_curve" in layout.figures and not wide[wide["allocator"] == "atp"].empty:
        files += figures.beta_curve(folder / "figures", f"beta_curve_{suffix}", wide, layout.value, protocol)
    if "layer_profile" in layout.figures:
        files += figures.layer_profile(folder / "figures", f"layer_profile_{suffix}", found, records)
    return files


def _comparison(
    layout: DictConfig,
    folder: Path,
    stem: str,
    title: str,
    notes: list[str],
    wide: pd.DataFrame,
    records: dict[str, frame.Record],
    cells: list[plan.PlannedCell],
) -> list[Path]:
    shown = compare.compared(layout, wide)
    return write.write(folder / "tables", stem, shown, frame.long(records.values()), title, notes)


def _axes_of(cells: list[plan.PlannedCell]) -> tuple[list[str], list[float]]:
    """Row groups and columns: the pruners and sparsities of the sweeps, dense aside."""
    from sparsify import registry

    sparse = [cell.config for cell in cells if cell.config.sparsity]
    pruners = list(dict.fromkeys(registry.name_of("pruner", config.pruner) for config in sparse))
    return pruners, sorted({float(config.sparsity) for config in sparse})


def _paper_models(layout: DictConfig, paper: pd.DataFrame, model: str) -> list[str]:
    """The paper columns: this very model's if the papers have it, else those the layout shows for orientation."""
    return [model] if model in set(paper["model"]) else list(layout.paper_models)


def _footer(
    wide: pd.DataFrame, records: dict[str, frame.Record], cells: list[plan.PlannedCell], layout: DictConfig
) -> list[str]:
    """What a reader must know about these numbers, from the records themselves."""
    protocol = ", ".join(sorted(wide[f"{layout.value}.protocol"].dropna().unique()))
    first: Any = next(iter(records.values()))
    texts = Counter(_text(r["calibration"]) for r in records.values())
    devices = ", ".join(sorted({r["execution"]["device"] for r in records.values()}))
    commits = ", ".join(sorted({_short(r["execution"]["commit"]) for r in records.values()}))
    return [
        f"Protocol {protocol}; {first['science']['dtype']}; calibration: {', '.join(texts)}.",
        f"{len(records)} of {len(cells)} cells finished; {devices}; commit {commits}.",
    ]


def _short(commit: str) -> str:
    """Twelve digits, and whether the checkout had changes."""
    digits, dash, dirty = commit.partition("-")
    return digits[:12] + dash + dirty


def _text(provenance: dict[str, Any]) -> str:
    if "corpus" not in provenance:
        return str(provenance["source"])
    sizes = f"{provenance['windows']} x {provenance['seqlen']} tokens"
    return f"{provenance['corpus']} {provenance['split']} ({provenance['sampler']} sampler), {sizes}"


def main(arguments: list[str]) -> int:
    """Print the table and the paths of the files."""
    try:
        name, overrides = plan.split_table(arguments)
        if name is None:
            raise UsageError("Which table?", fix="python -m sparsify.report table=table1")
        files = report(name, overrides)
        console.out().print(files[0].read_text(encoding="utf8"), markup=False)
        for file in files:
            console.say(f"wrote {file}")
    except Exception as error:
        return cli.exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
