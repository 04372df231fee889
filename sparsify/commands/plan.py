"""`python -m sparsify.plan table=table1`: what is done, running, failed or missing, and how long the rest takes.

Runs nothing and imports no torch.
"""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape
from rich.table import Table

from sparsify import paths
from sparsify.commands import cli
from sparsify.errors import SparsifyError, UsageError
from sparsify.runs import console, identity, registry
from sparsify.runs.records import Store


@dataclass(frozen=True)
class PlannedCell:
    """A cell of a sweep: how to ask for it, what it is, and where it stands."""

    overrides: tuple[str, ...]
    config: DictConfig
    key: str
    state: str


@dataclass(frozen=True)
class Part:
    """One rectangular sweep of a table."""

    overrides: list[str]
    cells: list[PlannedCell]

    @property
    def missing(self) -> list[PlannedCell]:
        return [cell for cell in self.cells if cell.state in ("missing", "failed")]


def table_config(name: str) -> DictConfig:
    """The layout of a table: its parts, rows, columns and figures."""
    config = OmegaConf.load(registry.find("table", name))
    assert isinstance(config, DictConfig)
    return config


def split_table(arguments: list[str]) -> tuple[str | None, list[str]]:
    """`table=NAME` and the rest, the rest with hub ids expanded."""
    names = [a.partition("=")[2] for a in arguments if a.startswith("table=")]
    rest = [a for a in arguments if not a.startswith("table=")]
    return (names[-1] if names else None), cli.understood(rest)


def parts_of(table: str | None, overrides: list[str]) -> list[Part]:
    """The sweeps of a table, or the one sweep that the overrides describe."""
    # Unresolved: an interpolation in a part is Hydra's to resolve, in the cell's config.
    sweeps = OmegaConf.to_container(table_config(table).parts, resolve=False) if table else [[]]
    assert isinstance(sweeps, list)
    return [Part([*sweep, *overrides], cells_of([*sweep, *overrides])) for sweep in sweeps]


def cells_of(overrides: list[str]) -> list[PlannedCell]:
    """Every cell of a sweep, composed as Hydra would."""
    with initialize_config_dir(str(paths.configs()), version_base="1.3", job_name="plan"):
        jobs = grid(overrides)
        compositions: dict[tuple[str, ...], DictConfig] = {}
        return [_planned(job, compositions) for job in jobs]


def grid(overrides: list[str]) -> list[list[str]]:
    """The jobs of a multirun: the presets' parameters, then the command line, as a product."""
    parser = OverridesParser.create()
    fixed = [
        text
        for text, parsed in zip(overrides, parser.parse_overrides(overrides), strict=True)
        if not parsed.is_sweep_override()
    ]
    hydra_config = compose("config", fixed, return_hydra_config=True)
    preset = [f"{key}={value}" for key, value in (hydra_config.hydra.sweeper.params or {}).items()]
    return BasicSweeper.split_arguments(parser.parse_overrides(preset + overrides), None)[0]


def _planned(job: list[str], compositions: dict[tuple[str, ...], DictConfig]) -> PlannedCell:
    config = _compose(job, compositions)
    key = identity.run_key(identity.plain(config))
    return PlannedCell(tuple(job), config, key, state_of(config, key))


def _compose(job: list[str], compositions: dict[tuple[str, ...], DictConfig]) -> DictConfig:
    """Compose a job; jobs that differ in plain values only share one composition, which is the slow part."""
    parsed = OverridesParser.create().parse_overrides(job)
    plain = [o for o in parsed if o.type is OverrideType.CHANGE and not _is_group(o)]
    groups = tuple(text for text, o in zip(job, parsed, strict=True) if o not in plain)
    if groups not in compositions:
        compositions[groups] = compose("config", list(groups))
    config = copy.deepcopy(compositions[groups])
    for override in plain:
        OmegaConf.update(config, override.key_or_group, override.value())
    return config


def _is_group(override: Override) -> bool:
    return override.package is not None or (paths.configs() / override.key_or_group).is_dir()


def state_of(config: DictConfig, key: str) -> str:
    """`done`, `running`, `failed`, `missing`, or `illegal` where the bounds refuse it without any weights."""
    state = Store(config.results).state(key, identity.evaluation_keys(identity.plain(config)))
    return "illegal" if state != "done" and illegal(config) else state


def illegal(config: DictConfig) -> SparsifyError | None:
    """Why a cell cannot be, as far as its config tells: the allocator's bounds for a known number of blocks."""
    if not config.model.get("num_blocks"):
        return None
    try:
        tree = identity.plain(config)
        registry.check(tree["allocator"], identity.sparsity_of(tree), config.model.num_blocks)
    except UsageError as error:
        return error
    return None


def expected_seconds(cells: Iterable[PlannedCell], results: str) -> float | None:
    """Seconds the cells will take by the finished ones most like them; None if nothing like them has run."""
    known = [record for record in Store(results) if record["status"] == "done"]
    total = 0.0
    for cell in cells:
        seconds = _like(cell.config, known)
        if seconds is None:
            return None
        total += seconds
    return total


def _like(config: DictConfig, records: list[dict[str, Any]]) -> float | None:
    """Median seconds of records of the same model and scale, and of the same pruner if there are any."""
    same = [
        r
        for r in records
        if r["science"]["model"]["name"] == config.model.name and r["science"]["scale"] == config.scale
    ]
    closer = [r for r in same if r["science"]["pruner"]["_target_"] == config.pruner._target_ and r["sparsity"]]
    chosen = closer or same
    return statistics.median(sum(r["seconds"].values()) for r in chosen) if chosen else None


def show(parts: list[Part], table: str | None) -> None:
    """Print counts, what is left, and the expected time."""
    cells = [cell for part in parts for cell in part.cells]
    counts = Counter(cell.state for cell in cells)
    summary = ", ".join(f"{counts[s]} {s}" for s in ("done", "running", "failed", "missing", "illegal") if counts[s])
    console.say(f"[bold]{table or 'sweep'}[/]: {console.counted(len(cells), 'cell')}: {summary or 'none'}")
    left = [cell for part in parts for cell in part.missing]
    if left:
        grid_table = Table("state", "cell", "key", box=None, pad_edge=False)
        for cell in left:
            grid_table.add_row(cell.state, escape(console.describe(cell.config)), cell.key)
        console.out().print(grid_table)
        seconds = expected_seconds(left, left[0].config.results)
        time = "unknown until one like them has run" if seconds is None else f"about {console.duration(seconds)}"
        console.say(f"{len(left)} to run, {time} on one device")


def main(arguments: list[str]) -> int:
    """Print the plan; 0 unless the request itself is wrong."""
    try:
        table, overrides = split_table(arguments)
        show(parts_of(table, overrides), table)
    except Exception as error:
        return cli.exit_code(error)
    return 0
