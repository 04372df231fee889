"""A finished table as Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sparsify.runs.records import write_atomically

More = Sequence[tuple[str, pd.DataFrame]]
"""Further tables of a file, each with its title."""


def markdown(frame: pd.DataFrame, title: str, notes: list[str], more: More = ()) -> str:
    """Title, table, further tables and footnotes."""
    lines = [line for heading, table in ((title, frame), *more) for line in (f"**{heading}**", "", _table(table), "")]
    return "\n".join([*lines, *(f"- {note}" for note in notes), ""])


def _table(frame: pd.DataFrame) -> str:
    flat = _flat(frame)
    return str(flat.to_markdown(index=False, disable_numparse=True, colalign=_aligned(flat)))


def latex(frame: pd.DataFrame, title: str, notes: list[str]) -> str:
    """A booktabs table with the notes as comments, ready for \\input."""
    shown = frame.map(_tex)
    shown.index = pd.MultiIndex.from_tuples([tuple(map(_tex, i)) for i in frame.index], names=frame.index.names)
    shown.columns = pd.MultiIndex.from_tuples([tuple(map(_tex, c)) for c in frame.columns])
    body = shown.style.to_latex(
        hrules=True,
        multicol_align="c",
        column_format="ll" + "r" * frame.shape[1],
        caption=_tex(title),
        position_float="centering",
        sparse_index=True,
    )
    return "".join(f"% {note}\n" for note in notes) + body


def write(
    folder: Path,
    name: str,
    frame: pd.DataFrame,
    long: pd.DataFrame,
    title: str,
    notes: list[str],
    more: More = (),
) -> list[Path]:
    """Write `<name>.md`, `.csv` (long rows) and `.tex`; returns the paths.

    Raises:
        RecordError: a file could not be written.
    """
    texts = {
        ".md": markdown(frame, title, notes, more),
        ".csv": long.to_csv(index=False, lineterminator="\n"),
        ".tex": "\n".join([latex(frame, title, notes), *(latex(table, heading, []) for heading, table in more)]),
    }
    for suffix, text in texts.items():
        write_atomically(folder / f"{name}{suffix}", text)
    return [folder / f"{name}{suffix}" for suffix in texts]


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """Index as columns, two header levels as one, a group of rows named once."""
    flat = frame.copy()
    flat.columns = pd.Index([" ".join(column).strip() for column in frame.columns])
    group = str(frame.index.names[0])
    flat = flat.reset_index()
    flat[group] = flat[group].where(flat[group] != flat[group].shift(), "")
    return flat


def _aligned(flat: pd.DataFrame) -> list[str]:
    return ["left", "left"] + ["right"] * (flat.shape[1] - 2)


TEX = {"&": r"\&", "%": r"\%", "_": r"\_", "β": r"$\beta$", "–": "--", "−": "$-$", "±": r"$\pm$"}


def _tex(text: str) -> str:
    for plain, escaped in TEX.items():
        text = text.replace(plain, escaped)
    return text
