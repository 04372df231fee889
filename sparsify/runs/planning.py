"""The cells of a table or a sweep, and what is known of each. Runs nothing and imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from sparsify.allocators.budget import check_one_kept
from sparsify.errors import UsageError
from sparsify.runs import identity, menu, registry, request
from sparsify.runs.identity import Config
from sparsify.runs.records import Store
from sparsify.types import Pattern


@dataclass(frozen=True)
class PlannedCell:
    """A cell of a sweep: how to ask for it, what it is, and where it stands.

    Attributes:
        overrides: that make it.
        config: composed and resolved.
        key: of the run.
        evaluation_keys: by name.
        state: `done`, `running`, `failed`, `missing`, or `illegal` where no weights could make it possible.
    """

    overrides: tuple[str, ...]
    config: Config
    key: str
    evaluation_keys: dict[str, str]
    state: str


@dataclass(frozen=True)
class Part:
    """One rectangular sweep of a table."""

    overrides: list[str]
    cells: list[PlannedCell]

    @property
    def missing(self) -> list[PlannedCell]:
        return [cell for cell in self.cells if cell.state in ("missing", "failed")]


def parts_of(table: str | None, overrides: Sequence[str]) -> list[Part]:
    """The sweeps of a table, or the one that the overrides describe; a cell that two of them have is the first's."""
    sweeps: list[list[str]] = registry.read(registry.find("table", table))["parts"] if table else [[]]
    parts, seen = [], set[tuple[str, ...]]()
    for sweep in sweeps:
        cells = {(cell.key, *cell.evaluation_keys.values()): cell for cell in cells_of([*sweep, *overrides])}
        parts.append(Part([*sweep, *overrides], [cell for key, cell in cells.items() if key not in seen]))
        seen |= set(cells)
    return parts


def distinct(parts: Sequence[Part]) -> list[Part]:
    """The parts without cells that add nothing: an earlier part has them with all that they measure.

    The key of a cell is that of its training too, so these are what a sweep runs. A cell that is done stays, if the
    earlier one is to be measured further.
    """
    seen: dict[str, list[PlannedCell]] = {}

    def adds(cell: PlannedCell) -> bool:
        earlier = seen.setdefault(cell.key, [])
        new = not any(_covers(other, cell) for other in earlier)
        earlier.append(cell)
        return new

    return [replace(part, cells=[cell for cell in part.cells if adds(cell)]) for part in parts]


def _covers(earlier: PlannedCell, cell: PlannedCell) -> bool:
    measured = cell.evaluation_keys.items() <= earlier.evaluation_keys.items()
    return measured and (cell.state != "done" or earlier.state == "done")


def cells_of(overrides: Sequence[str]) -> list[PlannedCell]:
    """Every cell of a sweep."""
    return [_planned(job) for job in grid(overrides)]


def grid(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """The jobs of a multirun: the preset's parameters, or what the command line has in their place, as a product."""
    fixed = [text for text in overrides if not menu.parsed(text).is_sweep_override()]
    preset = [f"{key}={value}" for key, value in menu.sweep_parameters(fixed).items()]
    choices = {menu.parsed(text).get_key_element(): _choices(text) for text in (*preset, *overrides)}
    return list(product(*choices.values()))


def _choices(override: str) -> list[str]:
    """`beta=0.1` and `beta=0.2` of `beta=0.1,0.2`."""
    parsed = menu.parsed(override)
    if not parsed.is_sweep_override():
        return [override]
    return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]


def _planned(job: tuple[str, ...]) -> PlannedCell:
    config = menu.compose(job)
    request.check(config)
    key, evaluations = identity.keys(config)
    return PlannedCell(job, config, key, evaluations, state_of(config, key, evaluations))


def state_of(config: Config, key: str, evaluations: dict[str, str]) -> str:
    """What the store knows of a cell, or `illegal` where its config alone refuses it."""
    state = Store(config["results"]).state(key, evaluations, kept=bool(config["keep"]))
    return "illegal" if state != "done" and illegal(config) else state


def illegal(config: Config) -> UsageError | None:
    """Why a cell cannot be, as far as its config tells, for a model with a known number of blocks."""
    blocks = config["model"].get("num_blocks")
    if not blocks:
        return None
    try:
        pattern = Pattern.parse(config["pattern"])
        sparsity = identity.sparsity_of(config)
        registry.check(config["allocator"], sparsity, blocks, pattern)
        check_one_kept(sparsity, pattern)
    except UsageError as error:
        return error
    return None
