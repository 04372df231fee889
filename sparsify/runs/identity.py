"""What makes two runs the same run: a hash of the science, not of machines, batch sizes or loggers. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparsify import paths
from sparsify.errors import UsageError
from sparsify.runs import content, registry
from sparsify.runs.construct import located
from sparsify.types import Pattern, check_sparsity, without_noise

Config = Mapping[str, Any]
"""A composed config with everything resolved, as plain data."""

SCIENCE = (
    "scale",
    "model",
    "part",
    "dtype",
    "calibration",
    "heldout",
    "objective",
    "method",
    "pruner",
    "allocator",
    "pattern",
    "sparsity",
    "recovery",
    "quantiser",
    "seed",
)
"""Config sections that a run's numbers depend on; everything else is how and where it runs. Those that are null are
left out, so that a new section (or a new stage that is off) moves no key."""

NUMERICS = 1
"""Raised whenever loading, sampling, the block walk or its statistics move numbers; components have a `version`."""


def plain(config: DictConfig) -> dict[str, Any]:
    """A composed config as plain data, interpolations resolved."""
    tree = OmegaConf.to_container(config, resolve=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def science(config: Config) -> dict[str, Any]:
    """What the run's key is a hash of: the science of a cell, with its texts and local weights by content.

    Components stand there by group and name, without fields that came later (`_since_`) and have their former value.
    """
    tree = {key: config[key] for key in SCIENCE if config.get(key) is not None}
    tree |= {"numerics": NUMERICS, "sparsity": sparsity_of(config), "model": _model_identity(config["model"])}
    return {key: _identity(value, tree["model"]) for key, value in tree.items()}


def sparsity_of(config: Config) -> float:
    """The wanted sparsity; an N:M pattern implies one where none is given.

    Raises:
        UsageError: there is none, or it is no fraction below one.
    """
    pattern = Pattern.parse(config["pattern"])
    if config["sparsity"] is None and pattern.sparsity is None:
        raise UsageError("This pattern needs a sparsity", got=str(pattern), fix="sparsity=0.75")
    return check_sparsity(pattern.sparsity if config["sparsity"] is None else config["sparsity"])


def run_key(config: Config) -> str:
    """Name of the cell's folder under `results/runs`."""
    return digest(science(config))


def evaluations(config: Config) -> dict[str, Config]:
    """The evaluators of a cell by name; each of `eval.tasks` is one, made from the template `eval.harness`.

    So every task has its own key, is saved when it ends, and an interrupted evaluation goes on where it stopped.
    """
    suite = config["eval"]
    nodes = {str(name): node for name, node in suite.items() if isinstance(node, Mapping) and name != "harness"}
    tasks = suite.get("tasks") or ()
    tasks = tasks.split(",") if isinstance(tasks, str) else tasks  # eval.tasks=boolq, as the harness' own --tasks
    return nodes | {str(task): {**suite["harness"], "task": str(task)} for task in tasks}


def evaluation_keys(config: Config) -> dict[str, str]:
    """A key per evaluation, so that adding one runs only that one."""
    return keys(config)[1]


def keys(config: Config) -> tuple[str, dict[str, str]]:
    """The key of the run, and those of its evaluations by name."""
    run = science(config)
    return digest(run), {
        name: digest({"run": run, "evaluation": _identity(node, run["model"])})
        for name, node in evaluations(config).items()
    }


def digest(tree: Any) -> str:
    """16 hexadecimal digits of a JSON-like tree."""
    text = json.dumps(_canonical(tree), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(tree: Any) -> Any:
    """Numbers as floats, so that 5 and 5.0 are one value."""
    if isinstance(tree, Mapping):
        return {key: _canonical(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_canonical(value) for value in tree]
    if isinstance(tree, bool) or not isinstance(tree, int | float):
        return tree
    return without_noise(float(tree))


def _identity(node: Any, model: Config) -> Any:
    """A part of the science with its components by name and whatever they read from elsewhere by content."""
    if isinstance(node, list):
        return [_identity(item, model) for item in node]
    if not isinstance(node, Mapping):
        return node
    since = node.get("_since_", {})
    tree = {
        key: _identity(value, model)
        for key, value in node.items()
        if key not in registry.RESERVED and not (key in since and _canonical(since[key]) == _canonical(value))
    }
    if "_target_" in node:
        tree["_target_"] = registry.identify(node["_target_"])  # a name; of old components the one in `former_paths`
    if "text" in node and "split" in node:
        tree["text"] = _text_identity(node, model)
    return tree | {name: located(function)(node) for name, function in node.get("_reads_", {}).items()}


def _text_identity(windows: Config, model: Config) -> Any:
    """The fingerprint of the corpus that windows are cut from."""
    if str(model["_target_"]).endswith("ShapeModel"):
        return "random token ids"
    corpus = json.dumps(windows["text"], sort_keys=True)
    return _fingerprint(corpus, windows["split"], str(paths.data()), str(paths.assets()))


@cache
def _fingerprint(corpus: str, split: str, data: str, assets: str) -> dict[str, str]:
    """Cached per place the text may be found in: `data` and `assets` are part of the cache key only."""
    known: dict[str, str] = registry.make(json.loads(corpus)).fingerprint(split)
    # Where the text was found is in the record; the same bytes are the same science wherever they lie.
    return {key: value for key, value in known.items() if key != "source" or "sha256" not in known}


DESCRIPTIVE = ("num_blocks", "gated", "package", "setup", "published")
"""Keys of a model that say how to get or treat it, not which weights it has."""


def _model_identity(node: Config) -> dict[str, Any]:
    """The model config; a local folder or file is named by a hash of its content instead of by its path."""
    tree = {key: value for key, value in node.items() if key not in DESCRIPTIVE}
    folder = Path(str(tree.get("id", "")))
    if tree.get("id") and folder.is_dir():
        return {**tree, "id": folder.name, "revision": content.folder_hash(folder.resolve())}
    file = Path(str(tree.get("file", ""))).expanduser()
    if "file" in tree and tree["sha256"] is None and file.is_file():
        return {**tree, "file": file.name, "sha256": content.file_hash(file)}
    return tree
