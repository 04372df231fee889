"""How work tells what it is at: by the name of a phase and how much of it is done. No torch."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, in all): `("trial", 3, 8)`, and `("block", 12, 30)` of the pruning inside that trial.

A phase that contains others is announced with 0 done before they begin."""


def silent(phase: str, done: int, total: int) -> None:
    """The progress callback that says nothing."""
