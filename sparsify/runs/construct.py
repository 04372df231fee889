"""Components from the values of a config: classes that may be built, and values that fit their fields. No torch."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from sparsify import schema
from sparsify.errors import UsageError


def located(function: str) -> Any:
    """The function of that import path."""
    module, _, name = function.rpartition(".")
    return getattr(import_module(module), name)


def class_of(target: str) -> type[Any]:
    """The class of a `_target_`, which may name anything that can be imported: components and nothing else are built.

    Raises:
        UsageError: a class of another package (those that `SPARSIFY_COMPONENTS` lists are one's own), or no class.
    """
    own = ("sparsify", *filter(None, os.environ.get("SPARSIFY_COMPONENTS", "").split(",")))
    found = None
    if target.split(".")[0] in own:
        with suppress(ImportError, AttributeError):
            found = located(target)
    if not isinstance(found, type) or found.__module__.split(".")[0] not in own:
        raise UsageError(
            "Only components are built from configs",
            got=f"_target_: {target}",
            allowed=f"classes of {', '.join(own)}",
            fix="SPARSIFY_COMPONENTS=<your package> in the environment, for components of your own",
        )
    return found


def construct(kind: type[Any], values: dict[str, Any], where: str) -> Any:
    """An object of a class from the values of its place in the config, which are what its fields say.

    Raises:
        SparsifyError: what the class itself refused.
        UsageError: a value that must be given, or one that does not fit.
    """
    if missing := [key for key, value in values.items() if value == "???"]:
        raise UsageError(f"{missing[0]} must be given", got=kind.__name__, fix=f"{where}.{missing[0]}=<value>")
    if dataclasses.is_dataclass(kind):
        values = _checked(kind, values, where)
    try:
        return kind(**values)
    except TypeError as error:
        got = f"{kind.__name__}: {error}"
        raise UsageError(
            f"The values of {where} do not fit it", got=got, fix=f"leave {where}'s parameters out"
        ) from error


def _checked(kind: type[Any], values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values, if they are what the fields of the dataclass say; where one is not, its default is the fix."""
    try:
        fitting = schema.values_of(kind, values, where)
        for key, value in fitting.items():
            _refuse_infinite(value, f"{where}.{key}")
    except UsageError as error:
        if error.fix is not None:
            raise
        fix = _default_of(kind, values, where, error)
        raise UsageError(error.what, got=error.got, allowed=error.allowed, fix=fix) from None
    return fitting


def _default_of(kind: type[Any], values: dict[str, Any], where: str, error: UsageError) -> str:
    """What to type instead of the value that was refused: the whole number that it is, or the default."""
    name = re.split(r"[ .\[]", error.what.removeprefix(f"{where}."))[0]
    given = values.get(name)
    if "a whole number" in str(error.allowed) and isinstance(given, float) and given.is_integer() and given < 2**63:
        return f"{where}.{name}={int(given)}"
    default = {field.name: field.default for field in dataclasses.fields(kind)}.get(name)
    if default is None or default is dataclasses.MISSING:
        return f"leave {where}.{name} as its config has it"
    return f"{where}.{name}={str(default).lower() if isinstance(default, bool) else default}"


def _refuse_infinite(value: Any, where: str) -> None:
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        _refuse_infinite(inner, where)
    if isinstance(value, float) and not math.isfinite(value):
        schema.refuse(value, where, "a finite number")
