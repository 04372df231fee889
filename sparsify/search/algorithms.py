"""Black-box minimisers over a `Space`. Each calls the objective at most `trials` times; the caller keeps the log."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparsify.errors import UsageError
from sparsify.search.spaces import Space

Objective = Callable[[Float[ndarray, " dim"]], float]
Algorithm = Callable[[Objective, Space, int, np.random.Generator], None]


def grid(objective: Objective, space: Space, trials: int, rng: np.random.Generator) -> None:
    """Every point of the space's grid, in order (ATP's Algorithm 1 on its betas).

    Raises:
        UsageError: the space has no grid, or one of more points than there are trials.
    """
    if space.grid is None:
        raise UsageError("A grid search needs a space of one parameter", allowed="space=beta", fix="algorithm=random")
    if len(space.grid) > trials:
        raise UsageError(
            "The grid has more points than the search may try",
            got=f"trials={trials}",
            allowed=f">= {len(space.grid)}",
            fix=f"allocator.trials={len(space.grid)}, or a larger allocator.step",
        )
    for point in space.grid:
        objective(point)


def golden(objective: Objective, space: Space, trials: int, rng: np.random.Generator) -> None:
    """Golden-section search of the first coordinate, for a curve with one valley.

    Raises:
        UsageError: the space has more than one dimension.
    """
    if space.dim != 1:
        raise UsageError("Golden-section search varies one number", got=f"{space.dim} of them", allowed="space=beta")
    ratio = (math.sqrt(5) - 1) / 2
    low, high = float(space.low[0]), float(space.high[0])
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = objective(np.array([left])), objective(np.array([right]))
    for _ in range(trials - 2):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = objective(np.array([left]))
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = objective(np.array([right]))


def random(objective: Objective, space: Space, trials: int, rng: np.random.Generator) -> None:
    """The starts, then uniform draws from the box."""
    for point in space.starts[:trials]:
        objective(point)
    for _ in range(trials - len(space.starts)):
        objective(rng.uniform(space.low, space.high))


def tpe(objective: Objective, space: Space, trials: int, rng: np.random.Generator) -> None:
    """Optuna's tree-structured Parzen estimator, one variable per coordinate, told the starts first.

    Raises:
        UsageError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UsageError("algorithm=tpe needs Optuna", fix="pip install 'layerwise-sparsify[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=int(rng.integers(2**31))))
    names = [f"x{i}" for i in range(space.dim)]
    for start in np.clip(space.starts, space.low, space.high):
        study.enqueue_trial(dict(zip(names, start.tolist(), strict=True)))

    def measured(trial: optuna.Trial) -> float:
        bounds = zip(names, space.low, space.high, strict=True)
        return objective(np.array([trial.suggest_float(name, low, high) for name, low, high in bounds]))

    study.optimize(measured, n_trials=trials)


def evolution(objective: Objective, space: Space, trials: int, rng: np.random.Generator) -> None:
    """(1+1) evolution: one to three random moves of normal length from the best point; the length adapts to success.

    The length grows by a quarter after a success and shrinks so that one success in five keeps it (Rechenberg's rule).
    """
    losses = [objective(point) for point in space.starts[:trials]]
    best = int(np.argmin(losses))
    point, loss = space.starts[best], losses[best]
    length = 1.0
    for _ in range(trials - len(losses)):
        chosen = rng.integers(len(space.moves), size=int(rng.integers(1, 4)))
        child = point + length * rng.normal(size=len(chosen)) @ space.moves[chosen]
        found = objective(child)
        if found < loss:
            point, loss, length = child, found, length * 1.25
        else:
            length = max(length * 1.25 ** (-1 / 4), 0.03)


ALGORITHMS: dict[str, Algorithm] = {
    "grid": grid,
    "golden": golden,
    "random": random,
    "tpe": tpe,
    "evolution": evolution,
}
