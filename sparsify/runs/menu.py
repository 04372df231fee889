"""Composing the menu of `configs/` as Hydra does, in milliseconds where Hydra takes a tenth of a second.

A plan composes hundreds of cells. What is here is the part of Hydra's rules that the menu uses: groups and packages, a
defaults list in an option, `override` in a preset, choices and values from the command line, interpolations by
OmegaConf. Anything else goes to Hydra itself, errors included; a test holds the two equal on every preset.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import OmegaConf

from sparsify import paths
from sparsify.errors import UsageError
from sparsify.runs import registry
from sparsify.runs.identity import plain

Tree = dict[str, Any]
Place = tuple[str, str]
"""A config group and the package its option goes to: `("data", "calibration.text")`."""


class _Unusual(Exception):
    """Something that is left to Hydra."""


def compose(overrides: Sequence[str]) -> Tree:
    """The config of one cell, resolved; equal to what `python -m sparsify <overrides>` runs. Not to be written to.

    Raises:
        HydraException: an override that does not fit the menu.
    """
    try:
        choices, values = _sorted_out(overrides)
        return _resolved(choices, values)
    except _Unusual:
        with initialize_config_dir(str(paths.configs()), version_base="1.3", job_name="plan"):
            return plain(hydra_compose("config", list(overrides)))


def sweep_parameters(overrides: Sequence[str]) -> dict[str, str]:
    """What the chosen experiment sweeps over: override keys and their sweeps, interpolations resolved."""
    try:
        merged = _merged(*_sorted_out(overrides))
        config = OmegaConf.create(merged)
        parameters = OmegaConf.select(config, "hydra.sweeper.params")
        resolved = OmegaConf.to_container(parameters, resolve=True) if parameters else {}
    except _Unusual:
        with initialize_config_dir(str(paths.configs()), version_base="1.3", job_name="plan"):
            parameters = hydra_compose("config", list(overrides), return_hydra_config=True).hydra.sweeper.params
        resolved = OmegaConf.to_container(parameters, resolve=True) if parameters else {}
    assert isinstance(resolved, dict)
    return {str(key): str(value) for key, value in resolved.items()}


@lru_cache(maxsize=4096)
def parsed(override: str) -> Override:
    """An override by Hydra's grammar.

    Raises:
        OverrideParseException: it has none.
    """
    return OverridesParser.create().parse_overrides([override])[0]


Values = tuple[tuple[str, str], ...]
"""Overrides of plain values: key, and the override as it was typed."""


def _sorted_out(overrides: Sequence[str]) -> tuple[tuple[tuple[Place, str], ...], Values]:
    """Choices of options and values of keys, in the order they were given."""
    choices: dict[Place, str] = {}
    values: list[tuple[str, str]] = []
    for text in overrides:
        override = parsed(text)
        key = override.key_or_group
        if override.is_sweep_override() or override.is_delete() or key.startswith("hydra"):
            raise _Unusual
        option = override.value()
        if override.package is None and not (paths.configs() / key).is_dir():
            values.append((key, text))
        elif override.type is OverrideType.CHANGE and (option is None or isinstance(option, str)):
            choices[key, key if override.package is None else override.package] = option or ""
        else:
            raise _Unusual
    return tuple(choices.items()), tuple(values)


@lru_cache(maxsize=256)
def _resolved(choices: tuple[tuple[Place, str], ...], values: Values) -> Tree:
    """The config of these choices and values. Values that nothing reads share one resolved config, the slow part."""
    names = _read_keys(choices)
    early = tuple(value for value in values if _is_read(value, names))
    config = _resolved_before(choices, early)
    for key, text in (value for value in values if value not in early):
        config = _with(config, key, parsed(text))
    return config


@lru_cache(maxsize=256)
def _resolved_before(choices: tuple[tuple[Place, str], ...], values: Values) -> Tree:
    merged = {key: value for key, value in _merged(choices, values).items() if key not in ("hydra", "defaults")}
    resolved = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _merged(choices: tuple[tuple[Place, str], ...], values: Values) -> Tree:
    """All chosen options laid over each other, then the values; interpolations as they stand."""
    composition = _Composition(dict(choices))
    config = composition.tree()
    if unused := [place for place, _ in choices if place not in composition.used]:
        raise _Unusual(unused)
    for key, text in values:
        config = _with(config, key, parsed(text))
    return config


@dataclass
class _Composition:
    """The defaults tree of `configs/config.yaml` with some places chosen otherwise.

    Attributes:
        chosen: options by place: from the command line, then from the `override` entries of presets.
        used: places that some defaults list has.
    """

    chosen: dict[Place, str]
    used: set[Place] = field(default_factory=set)

    def tree(self) -> Tree:
        root = _read("", "config")
        self._follow_presets(root.content["defaults"])
        config: Tree = {}
        for package, content in self._expand(root, "", ""):
            _merge(_at(config, package), content)
        return config

    def _follow_presets(self, defaults: Sequence[Any]) -> None:
        """Note what presets override; the last in the list has the first say, after the command line."""
        for item in reversed(defaults):
            if isinstance(item, Mapping) and (place := _place(item, "")):
                option = self.chosen.get(place, _option(item))
                if option and not _absent(item, place[0], option) and (file := _read(place[0], option)).everywhere:
                    self._note_overrides(file.content.get("defaults", ()))

    def _note_overrides(self, defaults: Sequence[Any]) -> None:
        for item in defaults:
            key = str(next(iter(item))) if isinstance(item, Mapping) else ""
            if key.startswith("override "):
                group, _, package = key.removeprefix("override ").strip().removeprefix("/").partition("@")
                self.chosen.setdefault((group, package or group), _option(item) or "")

    def _expand(self, file: "_File", group: str, package: str) -> Iterator[tuple[str, Tree]]:
        """Contents with their packages, in the order in which they are laid over each other."""
        defaults = list(file.content.get("defaults", ()))
        for item in defaults if "_self_" in defaults else [*defaults, "_self_"]:
            if item == "_self_":
                yield package, {key: value for key, value in file.content.items() if key != "defaults"}
            elif isinstance(item, str):
                yield from self._expand(_read(group, item), group, package)
            elif place := _place(item, package):
                yield from self._expand_option(item, place)

    def _expand_option(self, item: Mapping[str, Any], place: Place) -> Iterator[tuple[str, Tree]]:
        self.used.add(place)
        option = self.chosen.get(place, _option(item))
        if option and not _absent(item, place[0], option):
            file = _read(place[0], option)
            yield from self._expand(file, place[0], "" if file.everywhere else place[1])


def _place(item: Mapping[str, Any], parent: str) -> Place | None:
    """Where an entry of a defaults list goes; None for an `override`, which only changes another entry."""
    key = str(next(iter(item))).removeprefix("optional ")
    if key.startswith("override "):
        return None
    group, _, package = key.removeprefix("/").partition("@")
    return group, ".".join(part for part in (parent, package or group) if part)


def _option(item: Mapping[str, Any]) -> str | None:
    option: str | None = next(iter(item.values()))
    return option


def _absent(item: Mapping[str, Any], group: str, option: str) -> bool:
    """Whether an `optional` entry names what is not there."""
    return str(next(iter(item))).startswith("optional ") and not registry.has(group, option)


@dataclass(frozen=True)
class _File:
    """A YAML of the menu; `everywhere` if its keys are of the whole config and not of its group's place."""

    content: Tree
    everywhere: bool


@cache
def _read(group: str, option: str) -> _File:
    try:
        file = registry.find(group, option) if group else paths.configs() / f"{option}.yaml"
    except UsageError:
        raise _Unusual(group, option) from None
    first = file.read_text(encoding="utf8").partition("\n")[0]
    return _File(registry.read(file), "@package _global_" in first)


def _at(config: Tree, package: str) -> Tree:
    for part in package.split(".") if package else ():
        config = config.setdefault(part, {})
    return config


def _merge(config: Tree, other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), dict):
            _merge(config[key], value)
        else:
            config[key] = copy.deepcopy(value)


def _with(config: Tree, key: str, override: Override) -> Tree:
    """The config with a value set, where the override's kind (plain, `+`, `++`) allows it; the rest is Hydra's to say.

    Shares with the former whatever the value is not part of.
    """
    first, _, rest = key.partition(".")
    if rest:
        if not isinstance(config.get(first), dict):
            raise _Unusual(key)
        return {**config, first: _with(config[first], rest, override)}
    if (override.type is OverrideType.CHANGE) != (first in config) and override.type is not OverrideType.FORCE_ADD:
        raise _Unusual(key)
    value = override.value()
    if isinstance(value, Mapping) and isinstance(config.get(first), dict):
        merged = copy.deepcopy(config[first])
        _merge(merged, value)
        value = merged
    return {**config, first: value}


@lru_cache(maxsize=256)
def _read_keys(choices: tuple[tuple[Place, str], ...]) -> frozenset[str]:
    """Dotted names that interpolations of these options read."""
    inside = " ".join(re.findall(r"\$\{([^{}]*)\}", json.dumps(_merged(choices, ()))))
    names = set(re.findall(r"[A-Za-z_][\w.]*", inside))
    return frozenset(names | ({"model.published", "pruner"} if "published" in names else set()))


def _is_read(value: tuple[str, str], names: frozenset[str]) -> bool:
    key, text = value
    return "${" in text or any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for name in names)
