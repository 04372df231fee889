"""What a person sees: progress with an ETA, a summary, one paragraph per error. Plain lines when not a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from sparsify.errors import SparsifyError
from sparsify.progress import Progress
from sparsify.runs import labels
from sparsify.runs.identity import Config
from sparsify.runs.record import Record


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
def progress(text: str, pause: float | None = None) -> Iterator[Progress]:
    """A progress callback (phase, done, total): a bar on a terminal, a line every quarter of a phase elsewhere.

    With a `pause` a line is printed at once, and later ones are at least so many seconds apart: for work that may be
    short, or never call back.
    """
    console = out()
    if not console.is_terminal:
        if pause is not None:
            console.print(f"  {text} ...")
        yield _Lines(console, text, pause or 0.0)
        return
    columns = TextColumn("  {task.description}"), BarColumn(), TimeRemainingColumn()
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task(text, total=None)
        phases = _Phases()

        def update(phase: str, done: int, total: int) -> None:
            phases.note(phase, done, total)
            outer_done, outer_total = phases.at[phases.outermost]
            bars.update(task, description=f"{text}: {phases}", completed=outer_done, total=outer_total)

        yield update


class _Phases:
    """What work is at: `trial 3 of 8, block 12 of 30`, the outer phase first.

    Attributes:
        at: done and in all, by phase, outermost first.
        begun: when each began.
    """

    def __init__(self) -> None:
        self.at: dict[str, tuple[int, int]] = {}
        self.begun: dict[str, float] = {}
        self.called = time.monotonic()

    def note(self, phase: str, done: int, total: int) -> bool:
        """A phase goes on, those inside it are over; whether another quarter of it is done."""
        now, names = time.monotonic(), list(self.at)
        before, whole = self.at.get(phase, (0, total))
        for inner in names[names.index(phase) + 1 :] if phase in names else ():
            del self.at[inner]
        if phase not in names and names and self.at[names[0]][0] >= self.at[names[0]][1]:
            self.at.clear()  # what came before is done: this is no part of it
        if phase not in self.at or done < before or whole != total:  # counted anew
            self.begun[phase], before = self.called, 0
        self.at[phase], self.called = (done, total), now
        return done > 0 and 4 * done // total > 4 * before // total

    @property
    def outermost(self) -> str:
        return next(iter(self.at))

    def left(self) -> float | None:
        """Seconds that the outermost phase will still take; None before any of it is done."""
        done, total = self.at[self.outermost]
        return (self.called - self.begun[self.outermost]) / done * (total - done) if done else None

    def __str__(self) -> str:
        """Outer phases by the number that is at work, the innermost by what is done."""
        *outer, (inner, (done, total)) = self.at.items()
        words = [f"{name} {min(count + 1, whole)} of {whole}" for name, (count, whole) in outer]
        return ", ".join([*words, f"{inner} {done} of {total}"])


PATIENCE = 20.0
"""Seconds without a line after which one about an inner phase is welcome."""


class _Lines:
    """A line for every quarter of the outermost phase, and some about those inside it if that takes long."""

    def __init__(self, console: Console, text: str, pause: float) -> None:
        self.console, self.text, self.pause = console, text, pause
        self.phases = _Phases()
        self.printed = time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        quarter = self.phases.note(phase, done, total)
        wait = self.pause if phase == self.phases.outermost else max(self.pause, PATIENCE)
        if quarter and self.phases.called - self.printed >= wait:
            self.printed = self.phases.called
            left = self.phases.left()
            about = "" if left is None else f", about {duration(left)} left"
            self.console.print(f"  {self.text}: {self.phases}{about}")


def counted(number: int, thing: str) -> str:
    """`1 cell`, `2 cells`."""
    return f"{number} {thing}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """`8 s`, `3 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def cell_started(config: Config, key: str) -> None:
    """The headline of a cell, once its model is ready."""
    label = escape(labels.describe(config))
    say(f"[bold]{_place(config)}{label}[/] [dim]({config['scale']} scale, {key})[/]")


def cell_finished(config: Config, record: Record, path: Path, fresh: bool) -> None:
    """A line in a sweep; a table and what to try next after a single cell."""
    took = f"in {duration(sum(record.seconds.values()))}" if fresh else "already done"
    numbers = ", ".join([*_size(record), *_summary(record)])
    say(f"  sparsity {record.sparsity:.4f}, {numbers}, {took}{_eta(config)}")
    if record.skipped:
        say(f"  not pruned: {_skipped(record)}")
    for trial in record.trials:
        say("  tried " + ", ".join(f"{name} {_number(value)}" for name, value in trial.items()))
    if _alone(config):
        if record.sparsity:
            out().print(_blocks(record))
        _next_steps(record, path)


def _size(record: Record) -> Iterator[str]:
    """`3.25 bits a weight`, of a quantised model."""
    if record.quantised:
        yield f"{record.quantised['bits_per_weight']:.4g} bits a weight"


def _summary(record: Record) -> Iterator[str]:
    """`test perplexity 24.5 (sotu@512)`, and the mean over the tasks of each number of documents."""
    tasks: dict[int | None, list[float]] = {}
    for name, item in record.evaluations.items():
        result = item.result
        if "task" in result.details:
            tasks.setdefault(result.details["limit"], []).append(result.value)
        else:
            yield f"{name} {result.metric.replace('_', ' ')} {result.value:.4g} ({result.protocol})"
    for limit, values in tasks.items():
        tasks_counted = counted(len(values), "task") + (f", first {limit} of each" if limit else "")
        yield f"accuracy {sum(values) / len(values):.2%} ({tasks_counted})"


def _skipped(record: Record) -> str:
    """`30 routers (0.2% of the blocks' matrices)`, by reason."""
    sizes: dict[str, list[int]] = {}
    for row in record.skipped:
        sizes.setdefault(row["reason"], []).append(math.prod(row["shape"]))
    whole = sum(row["numel"] for row in record.layers) + sum(sum(numels) for numels in sizes.values())
    return ", ".join(
        f"{counted(len(numels), reason)} ({sum(numels) / whole:.1%} of the blocks' matrices)"
        for reason, numels in sizes.items()
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _alone(config: Config) -> bool:
    """Whether this is one cell and not part of a sweep."""
    return config["sweep"]["of"] is None and not (HydraConfig.initialized() and _sweeping())


def _place(config: Config) -> str:
    sweep = config["sweep"]
    return "" if sweep["of"] is None else f"[{sweep['first'] + _job() + 1}/{sweep['of']}] "


def _job() -> int:
    """Position in the sweep that Hydra runs; 0 for a single cell."""
    return int(HydraConfig.get().job.num) if HydraConfig.initialized() and _sweeping() else 0


def _sweeping() -> bool:
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def _eta(config: Config) -> str:
    sweep = config["sweep"]
    if sweep["of"] is None:
        return ""
    done = sweep["first"] + _job() + 1
    left = (time.time() - sweep["started"]) / done * (sweep["of"] - done)
    return f"; {sweep['of'] - done} to go, about {duration(left)}" if done < sweep["of"] else ""


def _blocks(record: Record) -> Table:
    """Sparsity and output error of each block's layers."""
    table = Table("block", "target", "zeros", "of weights", "mean error", "worst layer", box=None, pad_edge=False)
    blocks: dict[int, list[Mapping[str, Any]]] = {}
    for row in record.layers:
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


def _next_steps(record: Record, path: Path) -> None:
    say(f"record: {path}")
    say("next:")
    if record.kept:
        opens = "sparsify.load" if "own_format" in record.notes else "plain transformers"
        say(f"  python -m sparsify.export {record.key} --to pruned        a folder that {opens} opens")
    say("  python -m sparsify allocator=atp sparsity=0.7             search beta on held-out text, then prune")
    say("  python -m sparsify -m allocator=uniform,owl sparsity=0.6  a sweep; finished cells are skipped")
    say("  make table1                                               ATP's beta search as a table and figures")
