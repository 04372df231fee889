"""What makes two runs the same run: a hash of the science, not of machines, batch sizes or loggers. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparsify import benchmarks, paths, registry
from sparsify.types import Pattern, check_sparsity

SCIENCE = (
    "scale",
    "model",
    "dtype",
    "calibration",
    "heldout",
    "method",
    "pruner",
    "allocator",
    "pattern",
    "sparsity",
    "seed",
)
"""Config sections that a run's numbers depend on; everything else is how and where it runs."""


NUMERICS = 1
"""Raised whenever loading, sampling, the block walk or its statistics move numbers; components have a `version`."""


def science(config: DictConfig) -> dict[str, Any]:
    """The resolved science of a cell, with its texts and local weights by content."""
    tree: dict[str, Any] = {
        key: OmegaConf.to_container(config[key], resolve=True) if OmegaConf.is_config(config[key]) else config[key]
        for key in SCIENCE
    }
    tree["numerics"] = NUMERICS
    tree["sparsity"] = sparsity_of(config)
    tree["model"] = _model_identity(tree["model"])
    for part in ("calibration", "heldout"):
        tree[part] = _text_identity(tree[part], tree["model"])
    return tree


def sparsity_of(config: DictConfig) -> float:
    """The wanted sparsity; an N:M pattern implies one where none is given.

    Raises:
        UsageError: there is none, or it is no fraction below one.
    """
    implied = Pattern.parse(config.pattern).sparsity
    return check_sparsity(implied if config.sparsity is None else config.sparsity)


def run_key(config: DictConfig) -> str:
    """Name of the cell's folder under `results/runs`."""
    return digest(science(config))


def evaluations(config: DictConfig) -> dict[str, DictConfig]:
    """The evaluators of a cell by name; each of `eval.tasks` is one, made from the template `eval.harness`.

    So every task has its own key, is saved when it ends, and an interrupted evaluation goes on where it stopped.
    """
    nodes = {str(name): node for name, node in config.eval.items() if OmegaConf.is_dict(node) and name != "harness"}
    for task in config.eval.get("tasks", None) or ():
        node = OmegaConf.to_container(config.eval.harness, resolve=True)
        assert isinstance(node, dict)
        nodes[str(task)] = OmegaConf.create({**node, "task": str(task)})
    return nodes


def evaluation_keys(config: DictConfig) -> dict[str, str]:
    """A key per evaluation, so that adding one runs only that one."""
    run = science(config)
    keys = {}
    for name, node in evaluations(config).items():
        tree = OmegaConf.to_container(node, resolve=True)
        assert isinstance(tree, dict)
        if "windows" in tree:
            tree["windows"] = _text_identity(tree["windows"], run["model"])
        if "task" in tree:
            tree["rows"] = benchmarks.fingerprint(tree["task"])
        keys[name] = digest({"run": run, "evaluation": tree})
    return keys


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
    return float(tree) if isinstance(tree, int) and not isinstance(tree, bool) else tree


def _text_identity(node: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """A window spec with the corpus replaced by its fingerprint."""
    rest = {key: value for key, value in node.items() if key != "text"}
    if str(model["_target_"]).endswith("ShapeModel"):
        return rest | {"text": "random token ids"}
    return rest | {
        "text": _fingerprint(
            json.dumps(node["text"], sort_keys=True), node["split"], str(paths.data()), str(paths.assets())
        )
    }


@cache
def _fingerprint(corpus: str, split: str, data: str, assets: str) -> dict[str, str]:
    """Cached per place the text may be found in: `data` and `assets` are part of the cache key only."""
    found: dict[str, str] = registry.make(OmegaConf.create(json.loads(corpus))).fingerprint(split)
    # Where the text was found is in the record; the same bytes are the same science wherever they lie.
    return {key: value for key, value in found.items() if key != "source" or "sha256" not in found}


DESCRIPTIVE = ("num_blocks", "gated", "package", "setup", "published")
"""Keys of a model that say how to get or treat it, not which weights it has."""


def _model_identity(node: dict[str, Any]) -> dict[str, Any]:
    """The model config; a local folder is named by a hash of its files instead of by its path."""
    node = {key: value for key, value in node.items() if key not in DESCRIPTIVE}
    folder = Path(str(node.get("id", "")))
    if node.get("id") and folder.is_dir():
        return {**node, "id": folder.name, "revision": _folder_hash(folder.resolve())}
    return node


@cache
def _folder_hash(folder: Path) -> str:
    """Names, sizes and 32 evenly spaced samples of every config, tokenizer and weight file."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".model", ".txt"):
            size = file.stat().st_size
            total.update(f"{file.name}:{size}:".encode())
            with open(file, "rb") as handle:
                for part in range(32):
                    handle.seek(size * part // 32)
                    total.update(handle.read(1 << 16))
    return total.hexdigest()[:40]
