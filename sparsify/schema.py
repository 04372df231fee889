"""Plain data as dataclasses: what the types say is checked, with the place and the near matches in the message."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sparsify.errors import UsageError

T = TypeVar("T")


def load(kind: type[T], tree: Any, where: str) -> T:
    """A dataclass from what a YAML or JSON file holds, and the dataclasses inside it.

    Args:
        kind: the dataclass.
        tree: mappings, lists, text, numbers, booleans and null.
        where: names the file in messages.

    Raises:
        UsageError: a key that there is not, one that is missing, or a value of another type.
    """
    value: T = _load(kind, tree, where)
    return value


def load_each(tree: Any, where: str) -> dict[str, Mapping[str, Any]]:
    """Mappings by name.

    Raises:
        UsageError: something else.
    """
    loaded: dict[str, Mapping[str, Any]] = _load(dict[str, dict[str, Any]], tree, where)
    return loaded


def load_list(tree: Any, where: str) -> list[Mapping[str, Any]]:
    """Mappings in a row.

    Raises:
        UsageError: something else.
    """
    loaded: list[Mapping[str, Any]] = _load(list[dict[str, Any]], tree, where)
    return loaded


def _load(kind: Any, tree: Any, where: str) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return tree
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, tree, where)
    if origin in (Union, types.UnionType):
        return _union(get_args(kind), tree, where)
    if origin is Literal:
        return tree if tree in get_args(kind) else refuse(tree, where, ", ".join(map(repr, get_args(kind))))
    if origin in (list, tuple, Sequence):
        items = tree if isinstance(tree, list | tuple) else refuse(tree, where, "a list")
        inner = get_args(kind)[0]
        loaded = [_load(inner, item, f"{where}[{i}]") for i, item in enumerate(items)]
        return tuple(loaded) if origin is tuple else loaded
    if origin in (dict, Mapping):
        items = tree if isinstance(tree, Mapping) else refuse(tree, where, "a mapping")
        return {str(key): _load(get_args(kind)[1], value, f"{where}.{key}") for key, value in items.items()}
    return _plain(kind, tree, where)


def _plain(kind: Any, tree: Any, where: str) -> Any:
    if kind is float and isinstance(tree, int) and not isinstance(tree, bool):
        return float(tree)
    if kind is type(None) or kind is None:
        return None if tree is None else refuse(tree, where, "null")
    if (isinstance(tree, bool) and kind is not bool) or not isinstance(tree, kind):
        refuse(tree, where, {"str": "text", "int": "a whole number", "float": "a number"}.get(kind.__name__, kind))
    return tree


def _union(kinds: tuple[Any, ...], tree: Any, where: str) -> Any:
    refused: list[UsageError] = []
    for kind in sorted(kinds, key=lambda k: k is float):  # a whole number stays one where both are allowed
        try:
            return _load(kind, tree, where)
        except UsageError as error:
            refused.append(error)
    raise max(refused, key=lambda error: error.what.count(".") + error.what.count("["))


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _dataclass(kind: Any, tree: Any, where: str) -> Any:
    if not isinstance(tree, Mapping):
        refuse(tree, where, "a mapping")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in tree:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]}" if near else None
            raise UsageError(f"{where} has no key of that name", got=key, allowed=", ".join(fields), fix=fix)
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    if lacking := [n for n, f in fields.items() if n not in tree and (f.default, f.default_factory) == absent]:
        raise UsageError(f"{where} lacks {lacking[0]}", got=", ".join(map(str, tree)))
    values = {key: _load(_hints(kind)[key], value, f"{where}.{key}") for key, value in tree.items()}
    try:
        return kind(**values)
    except UsageError as error:  # of its own check, which does not know the place
        raise UsageError(f"{where}: {error.what}", got=error.got, allowed=error.allowed, fix=error.fix) from None


def refuse(tree: Any, where: str, allowed: object) -> Any:
    """Say that a value is of another kind than is allowed there.

    Raises:
        UsageError: always.
    """
    raise UsageError(f"{where} has the wrong kind of value", got=repr(tree)[:80], allowed=allowed)
