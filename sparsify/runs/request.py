"""What a config must have before anything is made of it: the parts of a cell and its plain values. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.errors import RecordError, UsageError
from sparsify.runs import registry
from sparsify.runs.identity import Config, sparsity_of
from sparsify.types import check_seed, check_whole

PARTS = {"model": "smollm2-135m", "method": "oneshot", "pruner": "wanda", "allocator": "uniform", "eval": "perplexity"}
"""Groups that a cell cannot be without, each with what is chosen by default."""
PLAIN = ("sparsity", "pattern", "seed", "batch_size", "keep", "device", "dtype", "results", "scale", "sweep")
"""Keys that every config has."""
WRITTEN = "sparsify.data.generated.Generated"
"""The text to train on that is read from nowhere."""


def check(config: Config) -> None:
    """Refuse a config that lacks a part of a cell, or whose plain values are of another kind.

    Raises:
        UsageError: the first thing that is wrong.
        RecordError: the results folder is a file.
    """
    for group, default in PARTS.items():
        if not isinstance(config.get(group), Mapping):
            got, allowed = config.get(group), ", ".join(registry.names(group))
            raise UsageError(
                f"A cell needs a {group}", got=f"{group}={_typed(got)}", allowed=allowed, fix=f"{group}={default}"
            )
    for part in ("calibration", "heldout", "test"):
        _check_windows(config.get(part), part)
    if config.get("tuning") is not None:  # most cells train nothing, and older ones know no such section
        _check_tuning(config["tuning"])
    _refuse_missing(config, "")
    if lacking := [key for key in PLAIN if key not in config]:
        raise UsageError(f"{lacking[0]} must be given", fix=f"{lacking[0]}=<value>")
    _check_sweep(config["sweep"])
    sparsity_of(config)
    check_seed(config["seed"])
    check_whole("batch_size", config["batch_size"], or_null=True)
    check_whole("model.num_blocks", config["model"].get("num_blocks"), or_null=True)
    if not isinstance(config["keep"], bool):
        raise UsageError("keep is true or false", got=_typed(config["keep"]), fix="keep=true")
    _check_text(config, "device", "auto", "auto, cpu, cuda, cuda:1, mps")
    _check_text(config, "dtype", "float32", "float32, float16, bfloat16")
    _check_text(config, "results", "results", "a folder, which need not be there yet")
    if Path(config["results"]).is_file():
        raise RecordError("results is a file, not a folder", got=config["results"], fix="results=<folder>")
    if config.get("part") is not None:
        _check_text(config, "part", "null", "language, vision, a module's name, or null for the decoder")
    _check_evaluations(config["eval"])


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)[:80]


def _check_windows(windows: Any, part: str) -> None:
    if not isinstance(windows, Mapping):
        fix = f"leave {part} out; its settings are {part}.windows, {part}.seqlen, ..."
        raise UsageError(f"{part} is a choice of windows", got=_typed(windows), fix=fix)
    if not isinstance(windows.get("text"), Mapping):
        allowed = ", ".join(registry.names("data"))
        fix = f"data@{part}.text=sotu, or data@{part}.text=file {part}.text.path=<file>"
        raise UsageError(f"{part} needs a text", got=_typed(windows.get("text")), allowed=allowed, fix=fix)


def _check_tuning(node: Any) -> None:
    """One text, or several, or one that the model writes."""
    several = isinstance(node, Mapping) and isinstance(node.get("parts"), Mapping)
    parts = {f"tuning.parts.{name}": part for name, part in node["parts"].items()} if several else {"tuning": node}
    for name, part in parts.items():
        if not isinstance(part, Mapping) or part.get("_target_") != WRITTEN:
            _check_windows(part, name)


def _check_text(config: Config, key: str, example: str, allowed: str) -> None:
    value = config[key]
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{key} is text", got=f"{key}={_typed(value)}", allowed=allowed, fix=f"{key}={example}")


def _check_sweep(sweep: Any) -> None:
    """What the sweep command fills in for the progress line."""
    fits = isinstance(sweep, Mapping) and all(isinstance(sweep.get(k), int | float) for k in ("first", "started"))
    if not fits or not isinstance(sweep.get("of"), int | None):
        raise UsageError("sweep is filled in by the sweep command", got=_typed(sweep), fix="leave sweep out")


def _check_evaluations(suite: Mapping[str, Any]) -> None:
    tasks = suite.get("tasks")
    for name, node in suite.items():
        if name in ("tasks", "limit") or isinstance(node, Mapping) or (node is None and name != "harness"):
            continue
        raise UsageError(f"eval.{name} is a component", got=_typed(node), fix=f"leave eval.{name} as its config has it")
    listed = tasks if isinstance(tasks, list | tuple) else [tasks]
    if tasks is not None and not all(isinstance(task, str) and task for task in listed):
        raise UsageError(
            "eval.tasks is a list of names", got=_typed(tasks), allowed="names of tasks", fix="eval.tasks=[boolq,rte]"
        )


def _refuse_missing(node: Any, path: str) -> None:
    if node == "???":
        raise UsageError(f"{path} must be given", fix=f"{path}=<value>")
    if isinstance(node, dict):
        for key in sorted(node, key=str):
            _refuse_missing(node[key], f"{path}.{key}".lstrip("."))
