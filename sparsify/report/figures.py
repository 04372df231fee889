"""What every figure shares: style, colours, axes, and files that come out the same twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
"""Okabe and Ito: told apart by colour-blind readers and in grey."""
SIMILARITIES = {"cka": "linear CKA", "hsic": "normalised HSIC"}
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "figure.dpi": 200,
    "savefig.bbox": "tight",
    "pdf.fonttype": 42,
    "svg.hashsalt": "sparsify",
}


@contextmanager
def saved(
    folder: Path, name: str, width: float, height: float, panels: int, sharey: bool = True, rows: int = 1
) -> Iterator[tuple[list[Axes], list[Path]]]:
    """Axes to draw on, in a row or in several, saved as PNG and PDF when the block ends."""
    files = [folder / f"{name}.png", folder / f"{name}.pdf"]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, -(-panels // rows), figsize=(width, height), sharey=sharey, squeeze=False, layout="constrained"
        )
        yield list(axes.flat), files
        _save(figure, files)


def _save(figure: Figure, files: list[Path]) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        # No creation date: the same records give the same bytes.
        empty: dict[str, Any] = {"CreationDate": None} if file.suffix == ".pdf" else {"Software": None}
        figure.savefig(file, metadata=empty)
    plt.close(figure)


def log_axis(axes: Axes, which: str) -> None:
    """A log axis with plain numbers: 1, 2, 5 within two and a half decades, powers of ten beyond."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def cka_matrix(folder: Path, name: str, matrices: Mapping[str, Sequence[Sequence[float]]], title: str) -> list[Path]:
    """The similarity of the inputs of every two blocks as a heat map, first block top left, a panel for each measure.

    Shades run from the least similar pair, rounded down to a tenth, to one.
    """
    count = len(matrices)
    with saved(folder, name, 0.4 + 2.9 * count, 2.7, count, sharey=False) as (panels, files):
        for axes, (measure, values) in zip(panels, matrices.items(), strict=True):
            edges = 0.5, len(values) + 0.5
            lowest = math.floor(10 * min(map(min, values))) / 10
            image = axes.imshow(values, cmap="Blues", vmin=min(lowest, 0.9), vmax=1, extent=(*edges, *edges[::-1]))
            axes.figure.colorbar(image, ax=axes, label=SIMILARITIES.get(measure, measure))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
            axes.set(xlabel="input of block", ylabel="input of block", xlim=edges, ylim=edges[::-1])
            axes.spines[["top", "right"]].set_visible(True)
            axes.grid(False)
        panels[0].figure.suptitle(title, fontsize=8)
    return files
