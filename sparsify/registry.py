"""Names to objects: a YAML in `configs/<group>/` is the registry entry of a component. No torch until it is built."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from sparsify import paths
from sparsify.errors import SparsifyError, UsageError

Spec = str | tuple[str, Mapping[str, Any]] | Any
"""A component as a user names it: `"owl"`, `("owl", {"M": 5})` or an object."""


def names(group: str) -> list[str]:
    """Every option of a config group, such as `allocator` or `model`."""
    folder = paths.configs() / group
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


@cache
def _by_target(group: str) -> dict[str, str]:
    files = {name: OmegaConf.load(paths.configs() / group / f"{name}.yaml") for name in names(group)}
    return {str(tree.get("_target_")): name for name, tree in files.items() if isinstance(tree, DictConfig)}


def name_of(group: str, node: Mapping[str, Any]) -> str:
    """The config name of a resolved component: `atp` for `{_target_: ...Arithmetic, beta: 0.01}`."""
    target = str(node["_target_"])
    return _by_target(group).get(target, target.rsplit(".", 1)[-1])


def find(group: str, name: str) -> Path:
    """The YAML of an option.

    Raises:
        UsageError: no such option; the message has near matches and the whole list.
    """
    file = paths.configs() / group / f"{name}.yaml"
    if not file.is_file():
        raise unknown(group, name)
    return file


def unknown(group: str, name: str) -> UsageError:
    """The error for a name that a group does not have."""
    options = names(group)
    near = suggest(name, options)
    fix = f"{group}={near[0]}" if near else f"pick one, or add configs/{group}/{name}.yaml"
    if group == "model":
        fix += "; any hub id or folder works too: model=org/name or model=./folder"
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
    name, options = spec
    config = composed(group, name)
    known = sorted(str(key) for key in config if not str(key).startswith("_"))
    for key in options:
        if key not in known:
            near = suggest(key, known)
            raise UsageError(
                f"{group} {name} has no parameter of that name",
                got=key,
                allowed=", ".join(known),
                fix=f"did you mean {near[0]}" if near else None,
            )
    return make(OmegaConf.merge(config, dict(options)))


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


def make(config: Any) -> Any:
    """Instantiate a config node, letting our own errors through as they are.

    Raises:
        SparsifyError: what the component itself refused.
        UsageError: the keys do not fit the component.
    """
    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, SparsifyError):
                raise cause from None
            cause = cause.__cause__
        raise UsageError(
            f"The config of {config.get('_target_')} does not fit it", got=str(error.__cause__ or error)[:400]
        ) from error
