"""A cell in a few words: its names, and whatever differs from the defaults. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from omegaconf import OmegaConf

from sparsify.runs import menu, registry
from sparsify.runs.identity import Config, sparsity_of

PARTS = ("pruner", "allocator")
"""Components that are always named."""

OTHERS = ("method", "objective", "recovery", "quantiser")
"""Components that are named where they are not the default."""

SETTINGS = ("dtype", "calibration", "heldout", "seed")
"""Sections of plain settings that tell cells apart."""


def describe(config: Config) -> str:
    """`smollm2-135m, wanda + atp(beta=0.01), 70%, seed=3`: what differs from the defaults of the scale."""
    usual = menu.compose([f"scale={config['scale']}"])
    settings = [text for name in SETTINGS for text in _differing(name, config.get(name), usual.get(name))]
    settings += [f"{name}={_component(name, config)}" for name in OTHERS if _is_unusual(name, config, usual)]
    sparsity = sparsity_of(config)
    if sparsity == 0:
        return ", ".join([config["model"]["name"], "dense", *settings])
    pattern = "" if config["pattern"] == "unstructured" else f" {config['pattern']}"
    what = " + ".join(_component(name, config) for name in PARTS)
    return ", ".join([config["model"]["name"], what, f"{100 * sparsity:.4g}%{pattern}", *settings])


def _is_unusual(name: str, config: Config, usual: Config) -> bool:
    return config.get(name) is not None and config[name] != usual.get(name)


def _component(group: str, config: Config) -> str:
    node = config[group]
    name = registry.name_of(group, node)
    context = {key: config[key] for key in ("search", "model", "pruner") if key in config}
    context["tuning"] = menu.compose([f"scale={config['scale']}"]).get("tuning")
    return _with(name, _parameters(node, _default(group, name, json.dumps(context, sort_keys=True))))


def _with(name: str, parameters: Iterator[str]) -> str:
    inside = ", ".join(parameters)
    return f"{name}({inside})" if inside else name


@lru_cache(maxsize=256)
def _default(group: str, name: str, context: str) -> Mapping[str, Any]:
    """A component as its YAML has it under some model and scale."""
    if not registry.has(group, name):
        return {}
    tree = OmegaConf.create({**json.loads(context), "component": registry.composed(group, name)})
    resolved = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(resolved, dict)
    default: Mapping[str, Any] = resolved["component"]
    return default


def _parameters(node: Mapping[str, Any], default: Mapping[str, Any]) -> Iterator[str]:
    """`key=value` of every parameter that is not the default, components inside by name."""
    for key, value in node.items():
        if key.startswith("_") or key == "version" or value == default.get(key, value if value is None else None):
            continue
        inner = default.get(key)
        if is_text(value):
            yield f"{key}={text_label(value)}"
        elif isinstance(value, Mapping) and value.get("_target_") in registry.components():
            same = isinstance(inner, Mapping) and inner.get("_target_") == value["_target_"]
            name = registry.components()[value["_target_"]].partition("/")[2]
            usual = inner if same and isinstance(inner, Mapping) else _alone(value)
            yield f"{key}={_with(name, _parameters(value, usual))}"
        else:
            yield from _differing(key, value, inner)


def is_text(value: Any) -> bool:
    """Whether a parameter says which text something is trained on."""
    kinds = ({"parts"}, {"text", "split"}, {"samples", "greedy"})  # a mixture, of a corpus, written by the model
    return isinstance(value, Mapping) and any(kind <= set(value) for kind in kinds)


def text_label(spec: Mapping[str, Any]) -> str:
    """`alpaca_gpt4 train, 100 samples`: which text, and how much where it is not all; from a config or a record."""
    if "parts" in spec:
        return " + ".join(map(text_label, spec["parts"].values()))
    if "text" not in spec:
        return f"written by the dense model, {spec['samples']} samples"
    text = spec["text"]
    name = text.get("corpus", text.get("name")) if isinstance(text, Mapping) else text
    count = next((f", {spec[unit]} {unit}" for unit in ("samples", "windows") if spec.get(unit)), "")
    return f"{name} {spec['split']}{count}"


def _alone(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """The defaults of a component that stands where another one is usual."""
    group, _, name = registry.components().get(node["_target_"], "").partition("/")
    return _default(group, name, "{}") if name else {}


def _differing(key: str, value: Any, usual: Any) -> Iterator[str]:
    """`key=value` where they differ, the inner keys of a mapping."""
    if value == usual:
        return
    if isinstance(value, Mapping) and isinstance(usual, Mapping):
        if value.get("name") != usual.get("name"):  # a corpus says enough by its name
            yield f"{key}={value.get('name')}"
        else:
            for name, item in value.items():
                yield from _differing(f"{key}.{name}", item, usual.get(name))
    else:
        yield f"{key}={_short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, list | Mapping) else str(value)
