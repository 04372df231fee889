"""What a person sees: progress with an ETA, a summary, one paragraph per error. Plain lines when not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sparsify.errors import SparsifyError
from sparsify.runs import identity, labels


def out() -> Console:
    """The console, as wide as the text when it is no terminal."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def say(text: str) -> None:
    """One line for the user."""
    out().print(text)


def warn(text: str) -> None:
    """One line about something that did not stop the run."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[yellow]warning:[/] {escape(text)}")


def fail(error: SparsifyError) -> None:
    """One red paragraph: what, got, allowed, fix."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]error:[/] [red]{escape(error.paragraph())}[/]"
    )


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner on a terminal, a line elsewhere."""
    console = out()
    if not console.is_terminal:
        console.print(f"  {text} ...")
        yield
        return
    with console.status(text):
        yield


@contextmanager
def bar(text: str, pause: float | None = None) -> Iterator[Callable[[int, int], None]]:
    """A progress callback (done, total): a bar with ETA on a terminal, a line every quarter elsewhere.

    With a `pause` a line is printed at once, and later ones are at least so many seconds apart: for work that may be
    short, or never call back.
    """
    console = out()
    if not console.is_terminal:
        if pause is not None:
            console.print(f"  {text} ...")
        yield _quarters(console, text, pause or 0.0)
        return
    columns = TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _quarters(console: Console, text: str, pause: float) -> Callable[[int, int], None]:
    begun = called = last = time.monotonic()
    counts: dict[int, tuple[float, int]] = {}

    def update(done: int, total: int) -> None:
        nonlocal called, last
        now = time.monotonic()
        start, before = counts.get(total, (begun, 0))
        if done <= before:  # counted anew: another trial of a search, or the pruning after a drift
            start = called
        counts[total], called = (start, done), now
        if 4 * done // total > 4 * (done - 1) // total and now - last >= pause:
            last = now
            left = (now - start) / done * (total - done)
            console.print(f"  {text}: block {done}/{total}, about {duration(left)} left")

    return update


def counted(number: int, thing: str) -> str:
    """`1 cell`, `2 cells`."""
    return f"{number} {thing}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """`8 s`, `3 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def cell_started(config: DictConfig, key: str) -> None:
    """The headline of a cell, once its data is ready."""
    label = escape(labels.describe(identity.plain(config)))
    say(f"[bold]{_place(config)}{label}[/] [dim]({config.scale} scale, {key})[/]")


def cell_finished(config: DictConfig, record: Mapping[str, Any], path: Path, fresh: bool) -> None:
    """A line in a sweep; a table and what to try next after a single cell."""
    took = f"in {duration(sum(record['seconds'].values()))}" if fresh else "already done"
    numbers = ", ".join(_summary(record["evaluations"]))
    say(f"  sparsity {record['sparsity']:.4f}, {numbers}, {took}{_eta(config)}")
    for trial in record["trials"]:
        say("  tried " + ", ".join(f"{name} {_number(value)}" for name, value in trial.items()))
    if _alone(config):
        if record["sparsity"]:
            out().print(_blocks(record))
        _next_steps(config, path)


def _summary(evaluations: Mapping[str, Any]) -> Iterator[str]:
    """`test perplexity 24.5 (sotu@512)`, and the mean over the tasks of each number of documents."""
    tasks: dict[int | None, list[float]] = {}
    for name, item in evaluations.items():
        if "task" in item:
            tasks.setdefault(item["limit"], []).append(item["value"])
        else:
            yield f"{name} {item['metric'].replace('_', ' ')} {item['value']:.4g} ({item['protocol']})"
    for limit, values in tasks.items():
        tasks_counted = counted(len(values), "task") + (f", first {limit} of each" if limit else "")
        yield f"accuracy {sum(values) / len(values):.2%} ({tasks_counted})"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _alone(config: DictConfig) -> bool:
    """Whether this is one cell and not part of a sweep."""
    return config.sweep.of is None and not (HydraConfig.initialized() and _sweeping())


def _place(config: DictConfig) -> str:
    if config.sweep.of is None:
        return ""
    return f"[{config.sweep.first + _job() + 1}/{config.sweep.of}] "


def _job() -> int:
    """Position in the sweep that Hydra runs; 0 for a single cell."""
    return int(HydraConfig.get().job.num) if HydraConfig.initialized() and _sweeping() else 0


def _sweeping() -> bool:
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def _eta(config: DictConfig) -> str:
    if config.sweep.of is None:
        return ""
    done = config.sweep.first + _job() + 1
    left = (time.time() - config.sweep.started) / done * (config.sweep.of - done)
    return f"; {config.sweep.of - done} to go, about {duration(left)}" if done < config.sweep.of else ""


def _blocks(record: Mapping[str, Any]) -> Table:
    """Sparsity and output error of each block's layers."""
    table = Table("block", "target", "zeros", "of weights", "mean error", "worst layer", box=None, pad_edge=False)
    blocks: dict[int, list[Mapping[str, Any]]] = {}
    for row in record["layers"]:
        blocks.setdefault(row["block"], []).append(row)
    for i, rows in blocks.items():
        zeros, numel = sum(r["zeros"] for r in rows), sum(r["numel"] for r in rows)
        target = sum(r["target"] * r["numel"] for r in rows) / numel
        worst = max(rows, key=lambda r: r["error"])
        kind = worst["name"].split(".")[-1]
        mean = sum(r["error"] for r in rows) / len(rows)
        table.add_row(
            str(i), f"{target:.4f}", f"{zeros:,}", f"{zeros / numel:.4f}", f"{mean:.3f}", f"{kind} {worst['error']:.3f}"
        )
    return table


def _next_steps(config: DictConfig, path: Path) -> None:
    say(f"record: {path}")
    say("next:")
    say("  python -m sparsify allocator=atp sparsity=0.7             search beta on held-out text, then prune")
    say("  python -m sparsify -m allocator=uniform,owl sparsity=0.6  a sweep; finished cells are skipped")
    say("  make table1                                               ATP's beta search as a table and figures")
