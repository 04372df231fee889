"""The command line around Hydra: one clear paragraph for every mistake. No torch."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.markup import escape

from sparsify import paths
from sparsify.commands.advice import understand
from sparsify.commands.overrides import SWEEP, sorted_out, understood, unknown_flag
from sparsify.errors import HeldError, UnexpectedError, UsageError
from sparsify.runs import console, identity, planning, registry
from sparsify.runs.planning import Part


def launch(arguments: list[str]) -> int:
    """Run Hydra with these arguments and return the exit code; errors are printed as one paragraph.

    Args:
        arguments: what follows `python -m sparsify`.
    """
    # Hydra's own reporter would hide the exceptions that we translate.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    argv = sys.argv
    reported: list[Exception] = []
    try:
        flags, overrides = sorted_out(arguments)
        sys.argv = ["sparsify", *flags, *understood(overrides)]
        main = hydra.main(version_base="1.3", config_path=str(paths.configs()), config_name="config")
        main(_task(reported))()
    except KeyboardInterrupt:
        return interrupted()
    except Exception as error:
        return exit_code(error)
    finally:
        sys.argv = argv
    return max((understand(error).exit_code for error in reported), default=0)


def main(arguments: list[str]) -> int:
    """`python -m sparsify`: a cell, or a sweep, which is not over while cells of it are missing or held by others."""
    code = launch(arguments)
    if code or not set(SWEEP) & set(arguments) or any(a.startswith("hydra/sweeper") for a in arguments):
        return code
    flags, overrides = sorted_out(arguments)
    if set(flags) - set(SWEEP):
        return code

    def finish(table: str | None, swept: list[str]) -> int:
        parts = planning.parts_of(table, swept)
        refuse_nothing(parts)
        return unfinished(parts, table, swept)

    return command("", finish, overrides)


def refuse_nothing(parts: Sequence[Part]) -> None:
    """A sweep in which there is no cell to run did not do what was asked.

    Raises:
        UsageError: no cells, or none that can be.
    """
    cells = [cell for part in parts for cell in part.cells]
    if all(cell.state == "illegal" for cell in cells):
        raise UsageError(
            "This sweep has no cells that could be run",
            got=f"{console.counted(len(cells), 'cell')}, outside the bounds of their allocators"
            if cells
            else "0 cells",
            fix="values within the bounds" if cells else "a list of values, as in sparsity=0.5,0.6",
        )


def unfinished(parts: Sequence[Part], table: str | None, overrides: Sequence[str]) -> int:
    """Say how many cells of a sweep are not done; 1 if there are any.

    Also true where a launcher ran the cells elsewhere and only their records tell.
    """
    cells = [cell for part in planning.distinct(parts) for cell in part.cells]
    left = sum(cell.state in ("missing", "failed", "running") for cell in cells)
    if left:
        where = f"table={table}" if table else " ".join(overrides)
        console.say(
            f"[red]{console.counted(left, 'cell')} not finished[/]; see: python -m sparsify.plan {escape(where)}"
        )
    return int(left > 0)


def _task(reported: list[Exception]) -> Callable[[DictConfig], Any]:
    def task(config: DictConfig) -> Any:
        try:
            _refuse_preset(config)
            from sparsify.pipeline import run_cell

            return run_cell(identity.plain(config)).key
        except HeldError as error:
            if HydraConfig.get().mode == RunMode.RUN:
                raise
            console.say(f"  skipped: {error.paragraph()}")
            return None
        except Exception as error:
            # Not raised again: the other cells of a sweep go on, and the exit code comes from `reported`.
            report(error)
            reported.append(error)
            return None

    return task


def _refuse_preset(config: DictConfig) -> None:
    """A preset is a grid: alone it would run one cell that nobody asked for."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.RUN and hydra_config.sweeper.params:
        name = hydra_config.runtime.choices.get("experiment")
        raise UsageError(
            "An experiment is a sweep over many cells",
            got=f"experiment={name} without -m",
            fix=f"python -m sparsify -m experiment={name}",
        )


def command(usage: str, run: Callable[[str | None, list[str]], int], arguments: list[str]) -> int:
    """A command beside `python -m sparsify`: `--help`, `table=NAME` and overrides; errors as one paragraph."""
    if {"--help", "-h"} & set(arguments):
        console.out().print(usage, markup=False)
        return 0
    try:
        if dashed := [a for a in arguments if a.startswith("-") and a != "--"]:
            sweep = "what is named is a sweep already: leave it out"
            error = unknown_flag(dashed[0], "--help")
            raise UsageError(
                error.what, got=error.got, allowed="--help", fix=sweep if dashed[0] in SWEEP else error.fix
            )
        tables = [a.partition("=")[2] for a in arguments if a.startswith("table=")]
        overrides = [a for a in arguments if not a.startswith("table=")]
        if "" in tables:
            raise registry.unknown("table", "")
        return run(tables[-1] if tables else None, understood(overrides))
    except KeyboardInterrupt:
        return interrupted()
    except Exception as error:
        return exit_code(error)


INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def interrupted() -> int:
    """What Ctrl-C ends with: a line."""
    console.say("  stopped; finished cells are kept, the same command goes on")
    return INTERRUPTED


def exit_code(error: Exception) -> int:
    """Print an error and say how the process should end."""
    report(error)
    return understand(error).exit_code


def report(error: Exception) -> None:
    """One paragraph; a traceback only for what we did not foresee."""
    known = understand(error)
    console.fail(known)
    if isinstance(known, UnexpectedError):
        traceback.print_exception(error)
