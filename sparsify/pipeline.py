"""One cell, from config to record: load, calibrate, allocate, prune, evaluate, record. Read this file first."""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from sparsify.data.windows import TokenWindows, Windows
from sparsify.errors import RecordError, SparsifyError, UsageError
from sparsify.evaluation.base import Evaluator, Subject
from sparsify.model.blocks import BlockView
from sparsify.model.sources import Loaded, parse_dtype, pick_device
from sparsify.model.walk import default_batch_size
from sparsify.recipe import PruneResult, Recipe, prune_model
from sparsify.runs import console, identity, provenance, registry
from sparsify.runs.records import Store
from sparsify.runs.tracking import Tracker
from sparsify.types import check_whole


@dataclass(frozen=True)
class Cell:
    """A validated config: its identity and the objects it names. Nothing is loaded yet."""

    key: str
    science: dict[str, Any]
    evaluation_keys: dict[str, str]
    recipe: Recipe
    calibration: Windows
    heldout: Windows
    evaluators: dict[str, Evaluator]
    tracker: Tracker
    config: DictConfig

    @classmethod
    def of(cls, config: DictConfig) -> "Cell":
        """Build every part, so that a bad value is refused before a weight is read.

        Raises:
            SparsifyError: the first thing that is wrong.
        """
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        if missing:
            raise UsageError(f"{missing[0]} must be given", fix=f"{missing[0]}=<value>")
        tree = identity.plain(config)
        check_whole("seed", config.seed, 0)
        check_whole("batch_size", config.batch_size, or_null=True)
        recipe = Recipe.of(
            registry.make(config.pruner),
            registry.make(config.allocator),
            registry.make(config.method),
            config.pattern,
            config.sparsity,
        )
        if config.model.get("num_blocks"):
            registry.check(tree["allocator"], recipe.sparsity, config.model.num_blocks)
        pick_device(config.device)
        parse_dtype(config.dtype)
        return cls(
            key=identity.run_key(tree),
            science=identity.science(tree),
            evaluation_keys=identity.evaluation_keys(tree),
            recipe=recipe,
            calibration=registry.make(config.calibration),
            heldout=registry.make(config.heldout),
            evaluators={name: registry.make(node) for name, node in identity.evaluations(tree).items()},
            tracker=registry.make(config.logger),
            config=config,
        )


@dataclass
class Bench:
    """A dense model kept between the cells of a process: restored from a copy, never loaded twice.

    `memo` holds what allocators have asked about it.
    """

    loaded: Loaded
    view: BlockView
    dense: dict[str, torch.Tensor]
    memo: dict[Any, Any] = field(default_factory=dict)
    cuts: dict[str, TokenWindows] = field(default_factory=dict)

    def cut(self, windows: Windows, seed: int) -> TokenWindows:
        """Tokens of a window spec, cut once per process."""
        name = f"{windows!r}:{seed}"
        if name not in self.cuts:
            self.cuts[name] = windows.cut(self.loaded.tokenizer, seed)
        return self.cuts[name]

    def subject(self, config: DictConfig) -> Subject:
        """The model as it stands, for the evaluators."""
        return Subject(
            self.loaded.model,
            self.loaded.tokenizer,
            lambda windows: self.cut(windows, config.seed),
            self.dense,
            config.batch_size,
        )


@lru_cache(maxsize=1)
def bench(model: str, dtype: str, device: str) -> Bench:
    """Load a model (its config as JSON, so that it can be a cache key)."""
    source = registry.make(OmegaConf.create(json.loads(model)))
    with console.status(f"loading {source.name} ({dtype}, {device})"):
        loaded = source.load(dtype, device)
    view = BlockView(loaded.model)
    return Bench(loaded, view, view.snapshot())


def run_cell(config: DictConfig) -> dict[str, Any]:
    """Run a cell unless its record is complete, and return the record.

    Raises:
        SparsifyError: what went wrong; a failed record is left behind unless there is a good one.
    """
    cell = Cell.of(config)
    store = Store(config.results)
    if store.complete(cell.key, cell.evaluation_keys):
        return _finish(cell, store, fresh=False)
    with store.lease(cell.key):
        if store.complete(cell.key, cell.evaluation_keys):  # finished by another process meanwhile
            return _finish(cell, store, fresh=False)
        try:
            _work(cell, store)
        except Exception as error:
            _record_failure(cell, store, error)
            raise
    return _finish(cell, store, fresh=True)


def _work(cell: Cell, store: Store) -> None:
    """Prune, then evaluate what the record does not have yet; the record is written after every step."""
    config, start = cell.config, time.perf_counter()
    model = json.dumps(OmegaConf.to_container(config.model, resolve=True), sort_keys=True)
    stand = bench(model, config.dtype, pick_device(config.device))
    stand.view.restore(stand.dense)
    calibration = stand.cut(cell.calibration, config.seed)
    console.cell_started(config, cell.key)
    seconds = {"load": time.perf_counter() - start}
    with console.bar("pruning") as progress, _clock(stand.view.device, seconds, "prune"):
        result = _prune(cell, stand, calibration, progress)
    record = _new_record(cell, stand, result, calibration, seconds)
    old = store.read(cell.key)
    record["evaluations"], record["superseded"] = _carried_over(old, cell)
    store.write(cell.key, record)
    failed = _evaluate(cell, stand, store, record)
    if failed:
        raise _one_error(failed)
    store.write(cell.key, {**record, "status": "done"})


def _evaluate(cell: Cell, stand: Bench, store: Store, record: dict[str, Any]) -> dict[str, Exception]:
    """Add what the record does not have yet, writing it after each; one that fails does not stop the others."""
    subject, failed = stand.subject(cell.config), {}
    for name, evaluator in cell.evaluators.items():
        if name in record["evaluations"]:
            continue
        try:
            clock = _clock(stand.view.device, record["seconds"], name)
            with console.bar(f"evaluating {name}", pause=20.0) as progress, clock:
                measured = evaluator.evaluate(replace(subject, progress=progress))
        except Exception as error:
            failed[name] = error
            continue
        record["evaluations"][name] = {"key": cell.evaluation_keys[name], **measured}
        store.write(cell.key, record)
    return failed


def _one_error(failed: dict[str, Exception]) -> Exception:
    """The error of a cell whose evaluations failed: what they all say, or a summary."""
    first = next(iter(failed.values()))
    said = {name: f"{type(error).__name__}: {' '.join(str(error).split())}" for name, error in failed.items()}
    if len(set(said.values())) == 1:
        return first
    summary = SparsifyError(
        f"{len(failed)} evaluations failed",
        got="; ".join(f"{name}: {text}" for name, text in said.items()),
        fix="the same command again, once these are repaired: what has been measured is kept",
    )
    summary.__cause__ = first
    return summary


def _prune(cell: Cell, stand: Bench, calibration: TokenWindows, progress: Callable[[int, int], None]) -> PruneResult:
    heldout = stand.cut(cell.heldout, cell.config.seed)
    return prune_model(
        stand.view,
        calibration.tokens,
        cell.recipe,
        heldout=heldout.tokens,
        batch_size=cell.config.batch_size,
        dense=stand.dense,
        memo=stand.memo,
        seed=cell.config.seed,
        progress=progress,
    )


def _new_record(
    cell: Cell, stand: Bench, result: PruneResult, calibration: TokenWindows, seconds: dict[str, float]
) -> dict[str, Any]:
    return {
        "status": "running",
        "science": cell.science,
        "sparsity": result.sparsity,
        "ledger": {**asdict(result.plan.ledger), "achieved": result.sparsity},
        "trials": [dict(trial) for trial in result.plan.trials],
        "notes": dict(result.plan.notes),
        "plan": result.plan.to_rows(),
        "layers": result.to_rows(),
        "calibration": calibration.provenance,
        "evaluations": {},
        "seconds": seconds,
        "execution": provenance.execution(cell.config)
        | {
            "windows_per_forward": cell.config.batch_size
            or default_batch_size(stand.view.device, calibration.tokens.shape[1]),
            "model_commit": getattr(stand.loaded.model.config, "_commit_hash", None),
        },
    }


def _carried_over(old: dict[str, Any] | None, cell: Cell) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluations of an earlier run of this cell: those still meant by their name, and those of other settings.

    A setting that comes back (no limit after a limited look) finds its old result among the superseded ones.
    """
    current = (old or {}).get("evaluations", {})
    valid = {name: item for name, item in current.items() if cell.evaluation_keys.get(name, item["key"]) == item["key"]}
    superseded = []
    for item in [{"name": n, **x} for n, x in current.items() if n not in valid] + (old or {}).get("superseded", []):
        name = item["name"]
        if name not in valid and cell.evaluation_keys.get(name) == item["key"]:
            valid[name] = {key: value for key, value in item.items() if key != "name"}
        else:
            superseded.append(item)
    return valid, superseded


def _record_failure(cell: Cell, store: Store, error: Exception) -> None:
    """Say in the store what failed, unless that would replace results or the store is what failed."""
    if isinstance(error, RecordError):
        return
    old = store.read(cell.key) or {}
    if old.get("evaluations"):
        store.write(cell.key, {**old, "status": "done"})  # complete for what it has; what failed is still missing
        return
    message = error.paragraph() if isinstance(error, SparsifyError) else f"{type(error).__name__}: {error}"
    store.write(
        cell.key,
        {
            "status": "failed",
            "science": cell.science,
            "error": message,
            "traceback": "".join(traceback.format_exception(error)),
            "evaluations": {},
            "execution": provenance.execution(cell.config),
        },
    )


def _finish(cell: Cell, store: Store, fresh: bool) -> dict[str, Any]:
    record = store.read(cell.key)
    assert record is not None
    console.cell_finished(cell.config, record, store.folder(cell.key) / "record.json", fresh)
    if fresh:
        cell.tracker.log(record)
    return record


class _clock:
    """Wall seconds of a block of work, the device's queue included."""

    def __init__(self, device: torch.device, seconds: dict[str, float], name: str) -> None:
        self.device, self.seconds, self.name = device, seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[self.name] = time.perf_counter() - self.start
