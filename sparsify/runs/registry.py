"""Names to objects: a YAML in `configs/<group>/` is the registry entry of a component. No torch until it is built."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsify import paths
from sparsify.errors import UsageError
from sparsify.runs.construct import class_of, construct, located
from sparsify.runs.former_paths import FORMER_PATHS
from sparsify.types import Pattern

_FORMER_NAMES = {path: name for name, path in FORMER_PATHS.items()}

Spec = str | tuple[str, Mapping[str, Any]] | Any
"""A component as a user names it: `"owl"`, `("owl", {"M": 5})` or an object."""


def names(group: str) -> list[str]:
    """Every option of a config group, such as `allocator` or `model`."""
    folder = paths.configs() / group
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


RESERVED = ("_since_", "_reads_", "_check_")
"""What a component's YAML tells the planner about it, which must not import its code (and torch with it):

- `_since_: {field: former value}`: fields that came after the first results; while such a field has its former value a
  run's key is what it was before the field existed.
- `_reads_: {name: function}`: content from outside the config that its numbers depend on, made part of a run's identity
  under that name by `function(node)`.
- `_check_: function`: refuses, by `function(node, sparsity, num_blocks, pattern)`, what is impossible whatever the
  weights are.

Functions are named by import path and lie in modules without torch.
"""

COMPONENTS = ("pruner", "allocator", "method", "recovery", "quantiser", "objective", "perturbation", "schedule")
"""Groups in which a class has one YAML with its `_target_`; a variant stands on it by a defaults list."""


@cache
def components() -> dict[str, str]:
    """`allocator/atp` by import path, for every class that has a YAML of its own."""
    found: dict[str, str] = {}
    for group in COMPONENTS:
        for name in names(group):
            target = read(find(group, name)).get("_target_")
            if target is None:
                continue
            if target in found:
                first = found[target].partition("/")[2]
                raise UsageError(
                    "A component has one YAML with its _target_",
                    got=f"{target} in configs/{group}/{first}.yaml and {name}.yaml",
                    fix=f"`defaults: [{first}, _self_]` in {name}.yaml instead of its _target_",
                )
            found[target] = f"{group}/{name}"
    return found


@cache
def former_values(group: str) -> dict[str, dict[str, Any]]:
    """The `_since_` of a group's components that have one, by config name."""
    trees = {name: read(find(group, name)) for name in names(group)} if group in COMPONENTS else {}
    return {name: tree["_since_"] for name, tree in trees.items() if "_since_" in tree}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as OmegaConf reads it: 1e-3 is a number."""


_NUMBER = r"(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.[\d_]+(?:[eE][-+]?\d+)?|\.inf)"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(rf"^(?:[-+]?{_NUMBER}|\.nan)$"), list("-+0123456789.")
)


def read(file: Path) -> dict[str, Any]:
    """A YAML as plain data, interpolations as they stand."""
    tree = yaml.load(file.read_text(encoding="utf8"), _Loader)
    return tree if isinstance(tree, dict) else {}


def identify(target: str) -> str:
    """What a component is called in a run's identity, wherever its code lies: group and name.

    Classes without a YAML of their own (`Windows`, evaluators, kinds of model) go by the name of the class, classes of
    other packages by their import path.
    """
    own = components().get(target) or (target.rpartition(".")[2] if target.startswith("sparsify.") else target)
    return FORMER_PATHS.get(own, own)


def name_of(group: str, node: Mapping[str, Any]) -> str:
    """The config name of a component, from a composed config or from a record: `atp`."""
    target = str(node["_target_"])
    found = components().get(target) or _FORMER_NAMES.get(target, target)
    return found.partition("/")[2] if found.startswith(f"{group}/") else found.rpartition(".")[2]


def has(group: str, name: str) -> bool:
    """Whether a group has an option of that name."""
    inside = ".." not in name and not name.startswith("/")
    return inside and (paths.configs() / group / f"{name}.yaml").is_file()


def find(group: str, name: str) -> Path:
    """The YAML of an option.

    Raises:
        UsageError: no such option; the message has near matches and the whole list.
    """
    if not has(group, name):
        raise unknown(group, name)
    return paths.configs() / group / f"{name}.yaml"


def unknown(group: str, name: str) -> UsageError:
    """The error for a name that a group does not have."""
    options = names(group)
    near = suggest(name, options)
    fix = f"{group}={near[0]}" if near else f"pick one, or add configs/{group}/{name}.yaml"
    if group == "model":
        fix += "; any hub id, folder or GGUF file works too: model=org/name, model=./folder, model=./file.gguf"
    return UsageError(f"There is no {group} of that name", got=name, allowed=", ".join(options), fix=fix)


def suggest(name: str, options: list[str]) -> list[str]:
    """Up to three options that look like `name`."""
    return difflib.get_close_matches(name, options, n=3, cutoff=0.5)


def build(group: str, spec: Spec) -> Any:
    """The component that `spec` names; an object passes through.

    Raises:
        UsageError: unknown name or keyword, or a value the component refuses.
    """
    if isinstance(spec, str):
        spec = (spec, {})
    if not isinstance(spec, tuple):
        if isinstance(spec, type | list | dict) or spec is None:
            raise UsageError(
                f"A {group} is a name, a name with parameters, or an object",
                got=repr(spec),
                allowed=f'"{names(group)[0]}", ("{names(group)[0]}", {{...}}), or an instance',
            )
        return spec
    if len(spec) != 2 or not isinstance(spec[0], str) or not _is_options(spec[1]):
        allowed = f'("{names(group)[0]}", {{"parameter": value}})'
        raise UsageError(f"A {group} with parameters is a name and a mapping", got=repr(spec)[:80], allowed=allowed)
    name, options = spec
    config = composed(group, name)
    known = sorted(str(key) for key in config if not str(key).startswith("_") and key != "version")
    for key in options:
        if key == "version":
            raise refused_version(f"{name}.version", options[key])
        if key not in known:
            near = suggest(key, known)
            raise UsageError(
                f"{group} {name} has no parameter of that name",
                got=key,
                allowed=", ".join(known),
                fix=f"did you mean {near[0]}" if near else None,
            )
    try:
        merged = OmegaConf.merge(config, dict(options))
    except OmegaConfBaseException as error:
        got = f"{dict(options)!r}"[:200]
        allowed = "numbers, text, lists and mappings as the config has them"
        raise UsageError(f"The parameters of {group} {name} do not fit it", got=got, allowed=allowed) from error
    return make(merged, group)


def _is_options(options: Any) -> bool:
    return isinstance(options, Mapping) and all(isinstance(key, str) for key in options)


def composed(group: str, name: str) -> DictConfig:
    """An option's YAML with what its defaults list stands on, as Hydra would compose it.

    Entries of that list are options of the same group (`perplexity`) or components inside (`/group@place: name`).
    """
    own = OmegaConf.load(find(group, name))
    assert isinstance(own, DictConfig)
    config: Any = OmegaConf.create()
    for item in own.pop("defaults", ()):
        if isinstance(item, str):
            config = config if item == "_self_" else OmegaConf.merge(config, composed(group, item))
        else:
            ((key, inner),) = item.items()
            inner_group, _, place = str(key).removeprefix("/").partition("@")
            OmegaConf.update(config, place, composed(inner_group, inner))
    merged = OmegaConf.merge(config, own)
    assert isinstance(merged, DictConfig)
    return merged


def published(path: str, default: Any, *, _root_: DictConfig) -> Any:
    """What papers use for the model at hand, `allocator.parameter` under its `published`, else the default.

    A value may be given by pruner. Where an allocator's YAML stands alone (in the library) there is no model.
    """
    value = OmegaConf.select(_root_, f"model.published.{path}")
    if isinstance(value, DictConfig):
        value = value.get(name_of("pruner", _root_.pruner))
    return default if value is None else value


OmegaConf.register_new_resolver("published", published, replace=True)


def leaf_of(source: str) -> str:
    """What a model is called: a folder by its own name, a GGUF file without its ending, a hub id by itself."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.is_dir() else source


OmegaConf.register_new_resolver("leaf_of", leaf_of, replace=True)


def check(node: Any, sparsity: float, num_blocks: int, pattern: Pattern | None = None) -> None:
    """Let a component and all components inside it refuse, by their `_check_`, what no weights could make possible.

    Raises:
        UsageError: with the legal range in the message.
    """
    for inner in node.values() if isinstance(node, Mapping) else ():
        check(inner, sparsity, num_blocks, pattern)
    if isinstance(node, Mapping) and "_check_" in node:
        located(node["_check_"])(node, sparsity, num_blocks, pattern or Pattern())


def make(config: Any, where: str = "") -> Any:
    """The component of a config node, every value checked against the type of its field.

    Args:
        config: the node, composed.
        where: its place in the config (`allocator`), for messages.

    Raises:
        SparsifyError: what the component itself refused.
        UsageError: the keys or values do not fit the component, or its version is not that of its code.
    """
    node: Any = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    if not isinstance(node, Mapping) or "_target_" not in node:
        fix = f"leave {where} out, or choose one by name"
        raise UsageError(f"{where or 'A component'} is chosen by name", got=repr(node)[:80], fix=fix)
    return _made(node, where or name_of("", node))


def _made(node: Any, where: str) -> Any:
    """A node with all components inside it built, innermost first."""
    if isinstance(node, list):
        return [_made(item, f"{where}[{i}]") for i, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    if "_target_" not in node:
        return {key: _made(value, f"{where}.{key}") for key, value in node.items()}
    kind = class_of(str(node["_target_"]))
    version = getattr(kind, "version", None)
    if node.get("version", version) != version:
        raise refused_version(f"{where}.version", node["version"], version)
    values = {key: _made(node[key], f"{where}.{key}") for key in node if key not in ("_target_", *RESERVED)}
    return construct(kind, values, where)


def refused_version(key: str, got: Any, allowed: Any = None) -> UsageError:
    """The error for a version that somebody wants to set."""
    return UsageError(
        "A version says which code made a number; it is raised with the code and is no setting",
        got=f"{key}={got}",
        allowed=allowed,
        fix=f"leave {key} out",
    )
