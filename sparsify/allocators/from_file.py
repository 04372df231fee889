"""An allocation that somebody has made: ours (`python -m sparsify.export`), a list, or a release of another project."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsify.allocators.base import Allocator
from sparsify.allocators.budget import weighted_mean
from sparsify.allocators.profile import Profile, by_block
from sparsify.errors import DataError, UsageError
from sparsify.types import LayerTable

if TYPE_CHECKING:
    from sparsify.allocators.context import Context

VALUES = ("sparsity", "kept", "levels", "alpha")
MISMATCH = 0.02
"""How far the mean of a file may be from the budget before it is taken for a file of something else."""

Numbers = Mapping[str, float] | Sequence[float]


@dataclass(frozen=True)
class FromFile(Allocator):
    """Sparsities by layer name, or in a list of one a block or one a matrix, moved together until the budget is met.

    Files: JSON (a mapping, a list, or what `python -m sparsify.export` writes), NumPy's .npy, or text with a line
    `layer: number` or `number` each.

    Attributes:
        file: path.
        values: what its numbers are: `sparsity`; `kept`, the share that stays (DLP's `ratios/*.json`); `levels`,
            EvoPress' text files: each of `level` weights more (or less) than the budget; `alpha`, AlphaPruning's
            `alpha_peak.npy`: power-law exponents, mapped to sparsities as `allocator=alphapruning` does.
        level: weights that a level of EvoPress stands for, as its database was made.
        tau: of AlphaPruning's mapping.
    """

    file: str
    values: Literal["sparsity", "kept", "levels", "alpha"] = "sparsity"
    level: int | None = None
    tau: float = 0.3
    version: int = 1

    def __post_init__(self) -> None:
        if self.values not in VALUES:
            raise UsageError("Unknown kind of values", got=self.values, allowed=", ".join(VALUES))
        if self.values == "levels" and not (isinstance(self.level, int) and self.level > 0):
            raise UsageError(
                "A level of EvoPress is a number of weights, which its files do not say",
                got=f"level={self.level}",
                fix="allocator.level=<weights>, as the level database was made",
            )

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        numbers = by_layer(read(self.file), layers, self.file)
        if self.values == "alpha":
            return self._from_exponents(layers, numbers, sparsity)
        if self.values == "levels":
            assert self.level is not None
            size = {layer.name: layer.numel for layer in layers}
            numbers = {name: sparsity + level * self.level / size[name] for name, level in numbers.items()}
        elif self.values == "kept":
            numbers = {name: 1 - share for name, share in numbers.items()}
        self._check_mean(numbers, layers, sparsity)
        return Profile(numbers, high=1.0)

    def _from_exponents(self, layers: LayerTable, alphas: Mapping[str, float], sparsity: float) -> Profile:
        from sparsify.allocators.budget import scale
        from sparsify.allocators.spectral import block_means, spectral_profile

        signal = block_means(layers, dict(alphas))
        return Profile(
            spectral_profile(layers, signal, self.tau, sparsity), adjust=scale, notes={"alpha": dict(alphas)}
        )

    def _check_mean(self, numbers: Mapping[str, float], layers: LayerTable, sparsity: float) -> None:
        mean = weighted_mean([numbers[layer.name] for layer in layers], [layer.numel for layer in layers])
        if abs(mean - sparsity) > MISMATCH:
            other = "kept" if self.values == "sparsity" and abs(1 - mean - sparsity) <= MISMATCH else None
            raise UsageError(
                "The allocation is one for another sparsity",
                got=f"a mean of {mean:.4f} over the weights in {self.file}, sparsity={sparsity:g}",
                fix=f"allocator.values={other}" if other else f"sparsity={mean:.3g}",
            )


def content(node: Mapping[str, Any]) -> str:
    """SHA-256 of the file, which stands for its path in a run's identity."""
    return hashlib.sha256(_bytes(node["file"])).hexdigest()


def _bytes(file: str) -> bytes:
    try:
        return Path(file).expanduser().read_bytes()
    except OSError as error:
        raise DataError(
            "The allocation cannot be read", got=f"{file}: {error.strerror}", fix="allocator.file=<an existing file>"
        ) from error


def read(file: str) -> Numbers:
    """The numbers of a file, by layer name or in order.

    Raises:
        DataError: there is no such file, or it is none of the known kinds.
    """
    data = _bytes(file)
    try:
        if file.endswith(".npy"):
            return _array(file)
        if file.endswith(".json"):
            return _json(json.loads(data))
        return _lines(data.decode("utf8"))
    except (ValueError, TypeError) as error:
        raise DataError(
            "The allocation is none of the known kinds",
            got=f"{file}: {error}",
            allowed="JSON {layer: number} or [number], .npy, or lines `layer: number`",
        ) from error


def _array(file: str) -> list[float]:
    import numpy as np

    return [float(x) for x in np.load(Path(file).expanduser(), allow_pickle=False).ravel()]


def _json(tree: Any) -> Numbers:
    if isinstance(tree, Mapping):
        tree = tree.get("layers", tree)
    if isinstance(tree, Mapping):
        if all(str(key).isdigit() for key in tree):  # blocks by number
            return [float(tree[key]) for key in sorted(tree, key=int)]
        return {str(name): float(value) for name, value in tree.items()}
    return [float(value) for value in tree]


def _lines(text: str) -> Numbers:
    rows = [line.rpartition(":") for line in text.splitlines() if line.strip()]
    if all(colon for _, colon, _ in rows):
        return {name.strip(): float(value) for name, _, value in rows}
    return [float(value) for _, _, value in rows]


def by_layer(numbers: Numbers, layers: LayerTable, file: str) -> dict[str, float]:
    """A number for every layer.

    Raises:
        DataError: other layers, or a list that is neither one a block nor one a matrix.
    """
    names = [layer.name for layer in layers]
    if isinstance(numbers, Mapping):
        if odd := sorted(set(names) ^ set(numbers)):
            raise DataError(
                "The allocation is one for other layers",
                got=f"{len(numbers)} layers in {file}, {odd[0]} on one side only",
                allowed=f"the {len(names)} layers of this model, {names[0]} to {names[-1]}",
            )
        return {name: numbers[name] for name in names}
    if len(numbers) == len(names):
        return dict(zip(names, numbers, strict=True))
    if len(numbers) == layers.num_blocks:
        return dict(by_block(layers, list(numbers)).values)
    raise DataError(
        "The allocation is one for another model",
        got=f"{len(numbers)} numbers in {file}",
        allowed=f"{layers.num_blocks} (one a block) or {len(names)} (one a matrix)",
    )
