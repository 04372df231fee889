"""Plain data as dataclasses: what the types say is checked, with the place and the near matches in the message."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sparsify.errors import UsageError

T = TypeVar("T")
WORDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}


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
    if kind is Any or _made(kind, tree):
        return tree
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, tree, where)
    if origin in (Union, types.UnionType):
        return _union(get_args(kind), tree, where)
    if origin is Literal:
        return tree if tree in get_args(kind) else _refuse_option(tree, where, get_args(kind))
    if origin in (list, tuple, Sequence):
        items = tree if isinstance(tree, list | tuple) else refuse(tree, where, "a list")
        inner = get_args(kind)[0]
        loaded = [_load(inner, item, f"{where}[{i}]") for i, item in enumerate(items)]
        return tuple(loaded) if origin is tuple else loaded
    if origin in (dict, Mapping):
        items = tree if isinstance(tree, Mapping) else refuse(tree, where, "a mapping")
        return {str(key): _load(get_args(kind)[1], value, f"{where}.{key}") for key, value in items.items()}
    return _plain(kind, tree, where)


def _made(kind: Any, tree: Any) -> bool:
    """Whether a component is there already, as an object."""
    return isinstance(kind, type) and kind.__module__ != "builtins" and isinstance(tree, kind)


def _plain(kind: Any, tree: Any, where: str) -> Any:
    if kind is float and isinstance(tree, int) and not isinstance(tree, bool):
        return float(tree) if abs(tree) < sys.float_info.max else refuse(str(tree), where, "a number")
    if kind is type(None) or kind is None:
        return None if tree is None else refuse(tree, where, "null")
    if kind is int and isinstance(tree, int) and abs(tree) >= 2**63:
        refuse(str(tree), where, "a whole number of 64 bits")
    if (isinstance(tree, bool) and kind is not bool) or not isinstance(tree, kind):
        refuse(tree, where, WORDS.get(kind.__name__, f"a component ({kind.__name__}), which is chosen by name"))
    return tree


def _union(kinds: tuple[Any, ...], tree: Any, where: str) -> Any:
    refused: list[UsageError] = []
    for kind in sorted(kinds, key=lambda k: k is float):  # a whole number stays one where both are allowed
        try:
            return _load(kind, tree, where)
        except UsageError as error:
            refused.append(error)
    # Of several that refuse the value itself, each says what it would have taken; what lies deeper was nearly right.
    deepest = max(refused, key=lambda error: error.what.count(".") + error.what.count("["))
    here = [error for error in refused if error.what.partition(" ")[0] == where]
    if deepest not in here:
        raise deepest
    fix = next((error.fix for error in here if error.fix), None)
    return refuse(tree, where, " or ".join(str(error.allowed) for error in here), fix)


def _refuse_option(tree: Any, where: str, options: Sequence[Any]) -> Any:
    near = difflib.get_close_matches(str(tree), [str(option) for option in options], n=1, cutoff=0.5)
    fix = f"{where}={near[0]}" if near else None
    raise UsageError(f"{where} has no such value", got=repr(tree)[:80], allowed=", ".join(map(str, options)), fix=fix)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _dataclass(kind: Any, tree: Any, where: str) -> Any:
    values = values_of(kind, tree, where)
    try:
        return kind(**values)
    except UsageError as error:  # of its own check, which does not know the place
        raise UsageError(f"{where}: {error.what}", got=error.got, allowed=error.allowed, fix=error.fix) from None


def values_of(kind: Any, tree: Any, where: str) -> dict[str, Any]:
    """What a dataclass is made of, checked against the types of its fields; objects that fit stay as they are.

    Raises:
        UsageError: as for `load`.
    """
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
    return {key: _load(_hints(kind)[key], value, f"{where}.{key}") for key, value in tree.items()}


def refuse(tree: Any, where: str, allowed: object, fix: str | None = None) -> Any:
    """Say that a value is of another kind than is allowed there.

    Raises:
        UsageError: always.
    """
    raise UsageError(f"{where} has the wrong kind of value", got=repr(tree)[:80], allowed=allowed, fix=fix)
