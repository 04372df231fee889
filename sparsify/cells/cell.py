"""A cell before anything is loaded: its config checked, its parts made, its keys known."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.allocators.budget import check_one_kept
from sparsify.data.windows import Windows
from sparsify.errors import UsageError
from sparsify.evaluation.base import Evaluator
from sparsify.model.sources import ModelSource, parse_dtype, pick_device
from sparsify.recipe import Recipe
from sparsify.runs import identity, registry, request
from sparsify.runs.identity import Config
from sparsify.runs.records import Store
from sparsify.runs.tracking import Tracker

STAGES = ("recovery", "quantiser")
"""What may follow pruning, in this order."""


@dataclass(frozen=True)
class Cell:
    """A validated config: its identity and the objects it names. Nothing is loaded yet.

    Attributes:
        config: composed and resolved.
        key: of the run.
        science: what the key is a hash of.
        evaluation_keys: by name.
        recipe: how to prune.
        source: of the model.
        calibration: what statistics are taken on.
        heldout: what searches score on.
        evaluators: by name.
        tracker: where finished records are shown.
        store: where its record lies.
    """

    config: Config
    key: str
    science: dict[str, Any]
    evaluation_keys: dict[str, str]
    recipe: Recipe
    source: ModelSource
    calibration: Windows
    heldout: Windows
    evaluators: dict[str, Evaluator]
    tracker: Tracker
    store: Store

    @property
    def folder(self) -> Path:
        """Where the record and what belongs to it lie."""
        return self.store.folder(self.key)

    @classmethod
    def of(cls, config: Config) -> "Cell":
        """Build every part, so that a bad value is refused before a weight is read.

        Raises:
            SparsifyError: the first thing that is wrong.
        """
        request.check(config)
        recipe = _recipe(config)
        if blocks := config["model"].get("num_blocks"):
            registry.check(config["allocator"], recipe.sparsity, blocks, recipe.pattern)
        check_one_kept(recipe.sparsity, recipe.pattern)
        pick_device(config["device"])
        parse_dtype(config["dtype"])
        parts = {name: registry.make(config[name], name) for name in ("model", "calibration", "heldout", "test")}
        evaluators = {name: _evaluator(config, name, node) for name, node in identity.evaluations(config).items()}
        _check_shapes(recipe, evaluators)
        key, evaluation_keys = identity.keys(config)
        return cls(
            config=config,
            key=key,
            science=identity.science(config),
            evaluation_keys=evaluation_keys,
            recipe=recipe,
            source=parts["model"],
            calibration=parts["calibration"],
            heldout=parts["heldout"],
            evaluators=evaluators,
            tracker=registry.make(config["logger"], "logger"),
            store=Store(config["results"]),
        )


def _check_shapes(recipe: Recipe, evaluators: Mapping[str, Any]) -> None:
    """Refuse to compare, matrix by matrix, with a dense model whose matrices are larger."""
    comparing = [name for name, evaluator in evaluators.items() if getattr(evaluator, "reads_dense", False)]
    if comparing and recipe.sparsity and not recipe.method.keeps_shapes:
        raise UsageError(
            f"eval.{comparing[0]} puts dense weights into the pruned model, whose matrices are smaller",
            got=f"it, after {type(recipe.method).__name__}",
            allowed="evaluations of the model alone",
            fix="eval=perplexity",
        )


def _evaluator(config: Config, name: str, node: Config) -> Any:
    """One evaluation; a task's settings stand in `eval` itself."""
    return registry.make(node, f"eval.{name}" if name in config["eval"] else "eval")


def _recipe(config: Config) -> Recipe:
    objective = config.get("objective")
    return Recipe.of(
        registry.make(config["pruner"], "pruner"),
        registry.make(config["allocator"], "allocator"),
        registry.make(config["method"], "method"),
        config["pattern"],
        identity.sparsity_of(config),
        objective=registry.make(objective, "objective") if objective else None,
        stages={name: registry.make(config[name], name) for name in STAGES if config.get(name)},
    )
