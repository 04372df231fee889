"""Theorem 3.5 of ATP on a real model: swap the sparsities of neighbouring blocks and see which order is better.

    python experiments/atp/adjacent_swaps.py
    python experiments/atp/adjacent_swaps.py --gap 0.1      pairs at 0.05 below and above their mean
    python experiments/atp/adjacent_swaps.py calibration.windows=4 calibration.seqlen=256 heldout.seqlen=256  # smaller
    python experiments/atp/adjacent_swaps.py scale=paper calibration.windows=16 heldout.windows=8             # one GPU

The profile is ATP's at beta = 0.008 and 70%, pruned by Wanda; any override of `python -m sparsify` changes that.
`method.regime=dense` takes the statistics of the unpruned model: a screening, not the papers' setting. Errors and
perplexity are those of the held-out text. Writes a row per pair to <results>/tables and prints what came out.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import swaps
import torch

from sparsify.allocators.budget import as_is_plan
from sparsify.analysis.error_growth import Growth, error_growth
from sparsify.cells.bench import Bench, bench_of
from sparsify.cells.cell import Cell
from sparsify.commands import cli
from sparsify.errors import UsageError
from sparsify.methods.base import Job
from sparsify.progress import Progress
from sparsify.runs import console, menu
from sparsify.types import LayerTable, SparsityPlan

DEFAULTS = ["allocator=atp", "allocator.beta=0.008", "sparsity=0.7"]
Profile = tuple[float, ...]


@dataclass
class Lab:
    """A model that is pruned by one profile after another; each is measured once."""

    cell: Cell
    bench: Bench
    growths: dict[Profile, Growth] = field(default_factory=dict)
    perplexities: dict[Profile, float] = field(default_factory=dict)

    @classmethod
    def of(cls, overrides: list[str]) -> Lab:
        cell = Cell.of(menu.compose([*DEFAULTS, *cli.understood(overrides)]))
        return cls(cell, bench_of(cell))

    @property
    def table(self) -> LayerTable:
        return self.bench.view.table

    @property
    def job(self) -> Job:
        """Pruning as the cell has it."""
        seed, recipe = self.cell.config["seed"], self.cell.recipe
        return Job(
            view=self.bench.view,
            pruner=recipe.pruner,
            allocator=recipe.allocator,
            pattern=recipe.pattern,
            sparsity=recipe.sparsity,
            calibration=self.bench.inputs(self.cell.calibration, seed),
            heldout=self.bench.inputs(self.cell.heldout, seed),
            objective=recipe.objective,
            batch_size=self.cell.config["batch_size"],
        )

    def profile(self) -> Profile:
        """Sparsity by block, as the cell's allocator has it."""
        plan = self.job.plan(self.cell.recipe.sparsity)
        by_block = {layer.block: plan.targets[layer.name].sparsity for layer in self.table}
        return tuple(by_block[block] for block in sorted(by_block))

    def measure(self, profile: Profile) -> None:
        """Prune by a profile, measure, and make the model dense again."""
        if profile in self.growths:
            return
        job, view = self.job, self.bench.view
        try:
            job.prune(self._plan(profile), regime=self.cell.config["method"]["regime"])
            self.growths[profile] = error_growth(view, self.bench.dense, job.heldout, batch_size=job.batch_size)
            self.perplexities[profile] = job.score()
        finally:
            self.bench.restore()

    def _plan(self, profile: Profile) -> SparsityPlan:
        return as_is_plan(self.table, self.table.spread(list(profile)), self.cell.recipe.sparsity)


def pairs_of(profile: Profile, gap: float | None) -> list[int]:
    """First blocks of the pairs that have two orders.

    Raises:
        UsageError: there is none.
    """
    pairs = [k for k in range(len(profile) - 1) if gap or profile[k] != profile[k + 1]]
    if not pairs:
        raise UsageError(
            "All blocks have the same sparsity, so there is nothing to swap",
            got=f"sparsity {profile[0]:g} in {len(profile)} blocks",
            fix="--gap 0.1, or allocator=atp allocator.beta=0.008",
        )
    return pairs


def rows_of(lab: Lab, profile: Profile, gap: float | None, done: Progress) -> pd.DataFrame:
    """A row per pair: every measure in ascending and in descending order."""
    rows = []
    pairs = pairs_of(profile, gap)
    for count, block in enumerate(pairs, start=1):
        row: dict[str, float] = {"block": block + 1}
        for name, order in zip(("ascending", "descending"), swaps.orders(profile, block, gap), strict=True):
            lab.measure(order)
            growth = lab.growths[order]
            row |= {f"{key}, {name}": value for key, value in swaps.summed_errors(growth, block).items()}
            row[f"perplexity, {name}"] = lab.perplexities[order]
            row |= {f"own {k}, {name}": float(growth.own_median[block + k].mean()) for k in (0, 1)}
            row |= {f"sparsity {k}, {name}": order[block + k] for k in (0, 1)}
        rows.append(row)
        done("pair", count, len(pairs))
    return pd.DataFrame(rows)


def verdicts(rows: pd.DataFrame) -> list[swaps.Verdict]:
    """One per measure, in the order of the columns."""
    names = [column.removesuffix(", ascending") for column in rows if column.endswith(", ascending")]
    measures = [name for name in names if not name.startswith(("own", "sparsity"))]
    return [
        swaps.verdict(name, rows[f"{name}, ascending"].tolist(), rows[f"{name}, descending"].tolist())
        for name in measures
    ]


def paragraph(lab: Lab, rows: pd.DataFrame) -> str:
    """What came out, for a reader of the paper."""
    lines = [f"{len(rows)} pairs of neighbouring blocks; the theorem wants the ascending order to be the better one."]
    for v in verdicts(rows):
        share = f"{v.wins / v.pairs:.0%}, 95% interval {v.low:.0%} to {v.high:.0%}"
        lines.append(f"  {v.measure:<22} lower in {v.wins:>2} of {v.pairs} ({share}); swapped {v.change:+.2%} (median)")
    for error in ("absolute", "absolute_median"):
        fit = swaps.fit_recursion(lab.growths, error)
        lines.append(
            f"  E_(i+1) = c E_i + a_(i+1) + b s_(i+1), {error}: c = {fit.c:.3f}, b = {fit.b:.3g}, "
            f"explains {fit.explained:.0%} of what differs between profiles"
        )
    factors = torch.stack([growth.amplification() for growth in lab.growths.values()]).mean(0)
    lines.append(
        f"  c by block, measured (median token): {factors.min():.2f} to {factors.max():.2f}, median "
        f"{factors.median():.3f}, above 1 in {int((factors > 1).sum())} of {len(factors)} blocks"
    )
    first = rows["own 0, descending"] - rows["own 0, ascending"]
    second = rows["own 1, ascending"] - rows["own 1, descending"]
    lines.append(
        f"  a block's own error rises with its sparsity in {int((first > 0).sum() + (second > 0).sum())} "
        f"of {2 * len(rows)} comparisons"
    )
    # The gain of Theorem 3.5 with every block's own f: (1 + c) (f_k(high) - f_k(low)) less that of block k + 1.
    predicted = (1 + factors[torch.tensor(rows["block"]) - 1].numpy()) * first - second > 0
    found = rows["pair absolute_median, ascending"] < rows["pair absolute_median, descending"]
    lines.append(
        f"  with these c and own errors the recursion wants the ascending order in {int(predicted.sum())} pairs and is "
        f"right in {int((predicted == found).sum())} of {len(rows)} (median token)"
    )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Measure, write the rows, print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gap", type=float, help="difference within a pair around its mean, instead of the profile's")
    parser.add_argument("overrides", nargs="*", help="as of python -m sparsify")
    options = parser.parse_args(arguments)
    try:
        lab = Lab.of(options.overrides)
        profile = lab.profile()
        with console.progress("swapping") as progress:
            rows = rows_of(lab, profile, options.gap, progress)
        config = lab.cell.config
        name = f"adjacent_swaps_{config['model']['name'].replace('/', '-')}_{config['scale']}_{lab.cell.key}"
        file = Path(config["results"]) / "tables" / (name + (f"_gap{options.gap:g}" if options.gap else "") + ".csv")
        file.parent.mkdir(parents=True, exist_ok=True)
        rows.to_csv(file, index=False, lineterminator="\n")
        console.out().print(paragraph(lab, rows), markup=False)
        console.say(f"wrote {file}")
    except Exception as error:
        return cli.exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
