"""The nouns of the project: pattern, target, layer, plan. No torch here, so reports can import them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sparsify import schema
from sparsify.errors import PatternError, UsageError

WIDEST = 2**16
"""The largest M of a pattern: wider than the matrices of any model."""
_N_OF_M = re.compile(r"(\d+|mixed):(\d+)")


@dataclass(frozen=True)
class Pattern:
    """Where zeros may stand: anywhere, or keep N of every M consecutive inputs of a row.

    N:M always counts *kept* weights (the released Wanda and OWL code counts zeros).

    Attributes:
        group: M, or None for unstructured.
        kept: N, or None when each layer gets its own N (`mixed:M`).
    """

    group: int | None = None
    kept: int | None = None

    def __post_init__(self) -> None:
        if self.group is None:
            if self.kept is not None:
                raise PatternError("A pattern with N needs M", got=self)
        elif not 2 <= self.group <= WIDEST or (self.kept is not None and not 0 < self.kept <= self.group):
            raise PatternError(
                "Not an N:M pattern",
                got=str(self),
                allowed=f"1 <= N <= M and 2 <= M <= {WIDEST}, N counts kept weights",
                fix="pattern=2:4 keeps 2 of every 4 inputs",
            )

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Read `unstructured`, `2:4` (keep 2 of 4) or `mixed:8` (each layer its own N of 8)."""
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            fix = 'pattern=2:4 (in YAML in quotes: pattern: "2:4"), or pattern=unstructured'
            raise PatternError("A pattern is text", got=repr(text)[:80], fix=fix)
        if text == "unstructured":
            return cls()
        match = _N_OF_M.fullmatch(text)
        if match is None:
            raise PatternError(
                "Unknown sparsity pattern",
                got=repr(text)[:80],
                allowed="unstructured, N:M (keep N of M), mixed:M",
                fix="pattern=unstructured, or pattern=2:4 keeps 2 of every 4 inputs",
            )
        kept, group = match.groups()
        return cls(int(group), None if kept == "mixed" else int(kept))

    @property
    def sparsity(self) -> float | None:
        """The zero fraction that a fixed N:M implies; None where it is free."""
        return None if self.kept is None or self.group is None else 1 - self.kept / self.group

    def __str__(self) -> str:
        if self.group is None:
            return "unstructured"
        return f"{'mixed' if self.kept is None else self.kept}:{self.group}"


@dataclass(frozen=True)
class Target:
    """What one layer is asked for: a zero fraction and, for N:M, how many of how many to keep."""

    sparsity: float
    kept: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity <= 1.0:
            raise UsageError("A sparsity is a fraction of zeros", got=self.sparsity, allowed="0 <= sparsity <= 1")


@dataclass(frozen=True)
class LayerSpec:
    """One prunable matrix: full module name, block index, name inside the block, shape."""

    name: str
    block: int
    kind: str
    out_features: int
    in_features: int

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class LayerTable:
    """All prunable matrices of a model, in the order of the forward pass."""

    layers: tuple[LayerSpec, ...]

    def __iter__(self) -> Iterator[LayerSpec]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def num_blocks(self) -> int:
        return len({layer.block for layer in self.layers})

    @property
    def numel(self) -> int:
        return sum(layer.numel for layer in self.layers)

    def block_numels(self) -> list[int]:
        """Prunable weights of each block, in order."""
        numels = dict.fromkeys(sorted({layer.block for layer in self.layers}), 0)
        for layer in self.layers:
            numels[layer.block] += layer.numel
        return list(numels.values())

    def spread(self, by_block: list[float]) -> dict[str, float]:
        """Give each layer the value of its block."""
        position = {block: i for i, block in enumerate(sorted({layer.block for layer in self.layers}))}
        return {layer.name: by_block[position[layer.block]] for layer in self.layers}


@dataclass(frozen=True)
class Skipped:
    """A matrix of a block that is not pruned.

    Attributes:
        name: of the parameter.
        shape: as it is stored.
        reason: `router`, `convolution`, `embedding`, or what it belongs to.
    """

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Ledger:
    """What became of the budget, as parameter-weighted zero fractions.

    Attributes:
        wanted: what the user asked for.
        raw: mean of the allocator's rule before any correction.
        clipped: mean after clipping to the bounds and re-solving.
        rounded: mean after rounding to the pattern (equal to `clipped` for unstructured).
        num_clipped: layers held at a bound.
    """

    wanted: float
    raw: float
    clipped: float
    rounded: float
    num_clipped: int = 0


@dataclass(frozen=True)
class SparsityPlan:
    """A target for every layer, with the ledger and whatever a search tried on the way."""

    targets: Mapping[str, Target]
    ledger: Ledger
    trials: tuple[Mapping[str, float | None], ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    def sparsities(self) -> dict[str, float]:
        return {name: target.sparsity for name, target in self.targets.items()}

    def to_rows(self) -> list[dict[str, Any]]:
        """One JSON-ready row per layer."""
        return [{"name": name, **asdict(target)} for name, target in self.targets.items()]

    @classmethod
    def from_rows(cls, rows: list[dict[str, Any]], ledger: Mapping[str, Any]) -> SparsityPlan:
        """Rebuild a plan from `to_rows` and the ledger of a record."""
        targets = {row["name"]: Target(row["sparsity"], row.get("kept"), row.get("group")) for row in rows}
        return cls(targets, Ledger(**ledger))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number that was measured, with what else is known of it.

    Attributes:
        metric: what it is: `perplexity`, `acc`, ...
        value: the number.
        stderr: its standard error.
        n: documents it is a mean over.
        curve: values by block, first to last.
        curve_stderr: their standard errors.
    """

    metric: str
    value: float
    stderr: float | None = None
    n: int | None = None
    curve: list[float] | None = None
    curve_stderr: list[float] | None = None

    def to_json(self) -> dict[str, Any]:
        """What is known, as plain data."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Evaluation(Measurement):
    """What an evaluator found.

    Attributes:
        protocol: tag that numbers must share to be compared: `W2@2048`, `boolq@0-shot, first 20`.
        text: where the inputs came from.
        more: further measurements; a report shows them as rows of their own, `<evaluation>.<metric>`.
        details: whatever else the record should keep.
    """

    protocol: str
    text: Mapping[str, Any] = field(default_factory=dict)
    more: tuple[Measurement, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, the details beside the rest."""
        own = {key: value for key, value in super().to_json().items() if key not in ("more", "details", "text")}
        more = {"more": [measurement.to_json() for measurement in self.more]} if self.more else {}
        return own | ({"text": dict(self.text)} if self.text else {}) | more | dict(self.details)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any], where: str) -> Evaluation:
        """Read what `to_json` wrote.

        Raises:
            UsageError: it is something else.
        """
        own = {key: value for key, value in tree.items() if key in {f.name for f in fields(cls)} - {"details"}}
        details = {key: value for key, value in tree.items() if key not in own}
        return schema.load(cls, {**own, "details": details}, where)


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None, *, or_null: bool = False) -> None:
    """Refuse what is not a whole number from `least` to `most`, or null where that has a meaning.

    Raises:
        UsageError: something else.
    """
    if or_null and value is None:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        allowed = (f">= {least}" if most is None else f"{least} to {most}") + (", or null" if or_null else "")
        near = most if most is not None and whole and value > most else max(least, 1)
        raise UsageError(f"{name} is a whole number", got=str(value)[:80], allowed=allowed, fix=f"{name}={near}")


def check_seed(value: Any) -> None:
    """Refuse what is no seed for every generator that is given it: NumPy's take 32 bits.

    Raises:
        UsageError: something else.
    """
    check_whole("seed", value, 0, 2**32 - 1)


def check_sparsity(value: Any) -> float:
    """Return `value` as a float if it is a fraction of zeros below one.

    Raises:
        UsageError: outside [0, 1).
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not 0.0 <= number < 1.0:
        hint = f"sparsity={number / 100:g}" if 2 <= number < 100 else "sparsity=0.7"
        raise UsageError(
            "sparsity is the fraction of zeros over the linear weights of all blocks",
            got=str(value)[:80],
            allowed="0 <= sparsity < 1",
            fix=hint,
        )
    return without_noise(number)


def without_noise(number: float) -> float:
    """0.7 for 0.7000000000000001, which is what steps of 0.2 from 0.3 add up to; other numbers as they are."""
    short = float(f"{number:.12g}")
    return short if abs(short - number) <= 4 * math.ulp(number) else number
