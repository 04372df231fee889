"""`python -m sparsify.sweep table=table1`: run the missing cells of a table, part by part, in one process.

Also the filters that any `python -m sparsify -m ...` puts in front of its launcher.
"""

from __future__ import annotations

import sys
import time

from hydra_filter_sweeper import AbstractFilter

from sparsify import cli, console, identity, plan
from sparsify.records import Store


class Done(AbstractFilter):
    """Drops cells whose record has every evaluation asked for."""

    def filter(self) -> bool:
        return _state(self) == "done"

    def reason(self) -> str:
        return "done"


class InFlight(AbstractFilter):
    """Drops cells that a living process holds."""

    def filter(self) -> bool:
        return _state(self) == "running"

    def reason(self) -> str:
        return "another process works on it"


class Illegal(AbstractFilter):
    """Drops cells outside the allocator's bounds; said aloud unless a table's grid asked for them."""

    def filter(self) -> bool:
        error = plan.illegal(self.config)
        if error is not None and self.config.sweep.of is None:
            console.warn(f"skipped: {error.paragraph()}")
        return error is not None

    def reason(self) -> str:
        return "outside the allocator's bounds"


def _state(given: AbstractFilter) -> str:
    config = given.config
    return Store(config.results).state(identity.run_key(config), identity.evaluation_keys(config))


def run(table: str | None, overrides: list[str]) -> int:
    """Run what is missing; the exit code of the worst part.

    Args:
        table: a name under `configs/table`, or None for the one sweep of the overrides.
        overrides: Hydra overrides added to every part.
    """
    parts = plan.parts_of(table, overrides)
    plan.show(parts, table)
    total = sum(len(part.missing) for part in parts)
    code, first, started = 0, 0, time.time()
    for part in parts:
        if part.missing:
            progress = [f"sweep.of={total}", f"sweep.first={first}", f"sweep.started={started}"]
            code = max(code, cli.launch(["-m", *part.overrides, *progress]))
            first += len(part.missing)
    if code:
        console.say(f"[red]some cells failed[/]; see them with: python -m sparsify.plan table={table or '...'}")
    return code


def main(arguments: list[str]) -> int:
    try:
        return run(*plan.split_table(arguments))
    except Exception as error:
        return cli.exit_code(error, [])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
