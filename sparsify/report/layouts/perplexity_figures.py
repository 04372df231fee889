"""Figures of a table of perplexities: its dot plot, perplexity against beta, sparsity by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from sparsify.allocators.arithmetic import legal_maximum
from sparsify.report import figures
from sparsify.report.layouts.entries import Entry
from sparsify.report.select import pick, where


def dot_plot(folder: Path, name: str, entries: Sequence[Entry], title: str, protocol: str) -> list[Path]:
    """One dot per table entry on a log axis, one panel per pruner, one colour per sparsity, dense as a line."""
    pruners = list(dict.fromkeys(e.pruner for e in entries if e.pruner))
    labels = list(dict.fromkeys(e.label for e in entries if e.pruner))
    sparsities = sorted({e.sparsity for e in entries if e.pruner})
    dense = next((e.value for e in entries if not e.pruner), None)
    size = 1.6 + 2.2 * len(pruners), 0.8 + 0.28 * len(labels)
    with figures.saved(folder, name, *size, len(pruners)) as (panels, files):
        for axes, pruner in zip(panels, pruners, strict=True):
            for colour, sparsity in zip(figures.COLOURS, sparsities, strict=False):
                dots = [
                    (e.value, labels.index(e.label))
                    for e in entries
                    if e.pruner == pruner and e.sparsity == sparsity and e.value is not None
                ]
                axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color=colour, label=f"{sparsity:.0%}")
            if dense is not None:
                axes.axvline(dense, color="0.4", linestyle=":", linewidth=1, label="dense")
            figures.log_axis(axes, "x")
            axes.set(title=pruner, xlabel=f"perplexity ({protocol})", yticks=range(len(labels)))
            axes.tick_params(axis="x", rotation=45)
        panels[0].set_yticklabels(labels)
        panels[0].set_ylim(len(labels) - 0.5, -0.5)
        panels[-1].legend(title="sparsity", loc="center left", bbox_to_anchor=(1, 0.5))
        panels[0].figure.suptitle(title, fontsize=8)
    return files


def beta_curve(folder: Path, name: str, cells: pd.DataFrame, value: str, protocol: str) -> list[Path]:
    """Perplexity against beta, one panel per pruner, one line per sparsity.

    Uniform is a dashed line of the same colour, the legal maximum of beta a tick mark on top; a ring marks the best
    beta by test perplexity, a square the best by held-out text.
    """
    curve = where(cells, {"allocator": "atp"})
    pruners = [p for p in cells["pruner"].unique() if p in set(curve["pruner"])]
    width, count = 1.4 + 2.7 * len(pruners), max(len(pruners), 1)
    with figures.saved(folder, name, width, 2.6, count, sharey=False) as (panels, files):
        for axes, pruner in zip(panels, pruners, strict=False):
            rows = where(curve, {"pruner": pruner})
            for colour, sparsity in zip(figures.COLOURS, sorted(rows["sparsity"].unique()), strict=False):
                _beta_line(
                    axes,
                    where(rows, {"sparsity": sparsity}),
                    where(cells, {"pruner": pruner, "sparsity": sparsity, "allocator": "uniform"}),
                    value,
                    colour,
                )
            figures.log_axis(axes, "y")
            axes.set(title=pruner, xlabel="β (sparsity added per block)")
        panels[0].set_ylabel(f"perplexity ({protocol})")
        _beta_legend(panels[-1])
    return files


def _beta_line(axes: Axes, rows: pd.DataFrame, uniform: pd.DataFrame, value: str, colour: str) -> None:
    rows = rows.assign(beta=rows["allocator.beta"].astype(float)).sort_values("beta")
    sparsity = float(rows["sparsity"].iloc[0])
    axes.plot(rows["beta"], rows[value], "o-", color=colour, label=f"{sparsity:.0%}")
    if not uniform.empty:
        axes.axhline(uniform[value].iloc[0], color=colour, linestyle="--", linewidth=0.9)
    limit = legal_maximum(sparsity, int(rows["num_blocks"].iloc[0]))
    axes.axvline(limit, color=colour, linestyle=":", linewidth=0.9)
    for rule, marker in ((value, "o"), ("heldout", "s")):
        best = pick(rows, rule)
        if best is not None:
            axes.plot(best["beta"], best[value], marker, markersize=8, markerfacecolor="none", color=colour)


def _beta_legend(axes: Axes) -> None:
    grey: Mapping[str, Any] = {"color": "0.3", "linewidth": 0.9}
    axes.plot([], [], "--", label="uniform", **grey)
    axes.plot([], [], ":", label="legal maximum", **grey)
    axes.plot([], [], "o", markersize=8, markerfacecolor="none", color="0.3", label="best by test")
    axes.plot([], [], "s", markersize=8, markerfacecolor="none", color="0.3", label="best by held-out")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def layer_profile(folder: Path, name: str, entries: Sequence[Entry], profiles: Mapping[str, list[float]]) -> list[Path]:
    """Counted sparsity of each block under every allocation, for the first pruner.

    A few allocations are lines of one panel per sparsity; more than there are colours get a panel each. Sparsities at
    which fewer allocations have run than at others are left out.
    """
    pruner = next((e.pruner for e in entries if e.pruner), "")
    chosen = [e for e in entries if e.pruner == pruner and e.key in profiles]
    counts = Counter(e.sparsity for e in chosen)
    sparsities = sorted(s for s in counts if counts[s] == max(counts.values()))
    chosen = [e for e in chosen if e.sparsity in sparsities]
    if len({e.label for e in chosen}) > len(figures.COLOURS):
        return _profile_per_panel(folder, name, chosen, profiles)
    with figures.saved(folder, name, 1.6 + 2.2 * len(sparsities), 2.4, max(len(sparsities), 1)) as (panels, files):
        for axes, sparsity in zip(panels, sparsities, strict=False):
            for colour, entry in zip(figures.COLOURS, [e for e in chosen if e.sparsity == sparsity], strict=False):
                profile = profiles[entry.key]
                label = f"{entry.label}" + (f" ({entry.note})" if entry.note and len(sparsities) == 1 else "")
                axes.plot(range(1, len(profile) + 1), profile, "o-", markersize=2, color=colour, label=label)
            axes.set(title=f"{pruner}, {sparsity:.0%}", xlabel="block")
        panels[0].set_ylabel("sparsity (counted zeros)")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return files


def _profile_per_panel(
    folder: Path, name: str, chosen: list[Entry], profiles: Mapping[str, list[float]], columns: int = 5
) -> list[Path]:
    """Small multiples: one allocation each, one line per sparsity, and in grey what the others do at that sparsity."""
    labels = list(dict.fromkeys(e.label for e in chosen))
    sparsities = sorted({e.sparsity for e in chosen})
    rows = -(-len(labels) // columns)
    count = rows * columns
    with figures.saved(folder, name, 0.6 + 1.45 * columns, 0.7 + 1.25 * rows, count, rows=rows) as (panels, files):
        for axes, label in zip(panels, labels, strict=False):
            for entry in chosen if len(sparsities) == 1 else ():
                _profile_line(axes, profiles[entry.key], color="0.85", linewidth=0.6)
            for entry in (e for e in chosen if e.label == label):
                colour = figures.COLOURS[sparsities.index(entry.sparsity) % len(figures.COLOURS)]
                axes.axhline(entry.sparsity, color=colour, linestyle=":", linewidth=0.7)
                _profile_line(axes, profiles[entry.key], color=colour, label=f"{entry.sparsity:.0%}")
            axes.set_title(_panel_title(label, [e for e in chosen if e.label == label]), fontsize=7)
        for axes in panels[len(labels) :]:
            axes.set_axis_off()
        for axes in panels[-columns:]:
            axes.set_xlabel("block")
        for axes in panels[::columns]:
            axes.set_ylabel("sparsity")
        panels[columns - 1].legend(title=chosen[0].pruner, loc="center left", bbox_to_anchor=(1, 0.5))
    return files


def _profile_line(axes: Axes, profile: list[float], **style: Any) -> None:
    axes.plot(range(1, len(profile) + 1), profile, **style)


def _panel_title(label: str, entries: list[Entry]) -> str:
    """The allocation, with the hyper-parameter that was selected where there is just one."""
    return f"{label}\n({entries[0].note})" if len(entries) == 1 and entries[0].note else label
