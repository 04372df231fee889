"""Overrides as people type them, made into what Hydra reads: paths without quotes, any hub id or folder as a model."""

from __future__ import annotations

import re
from pathlib import Path

from sparsify import paths
from sparsify.errors import UsageError
from sparsify.runs import registry


def understood(arguments: list[str]) -> list[str]:
    """Overrides as Hydra is to have them.

    Raises:
        UsageError: one of them would set what is no setting.
    """
    for argument in arguments:
        _refuse_registration(argument)
    return [quoted(argument) for argument in expand_model(arguments)]


def _refuse_registration(argument: str) -> None:
    """What a YAML says of its component (`_target_`, `_since_`, `version`), or where it lies, is not for a command."""
    key, _, value = argument.partition("=")
    if "_target_" in argument and key.lstrip("+~").startswith("hydra"):  # built by Hydra itself, whatever it names
        raise UsageError("Hydra's own parts are chosen by name", got=argument, fix="hydra/launcher=<name>")
    group = key.lstrip("+~").partition("@")[0]
    if (".." in value or value.startswith("/")) and group != "model" and (paths.configs() / group).is_dir():
        raise registry.unknown(group, value)
    owner, _, last = key.lstrip("+~").rpartition(".")
    if last == "version" and owner:
        raise registry.refused_version(key.lstrip("+~"), value)
    if re.fullmatch(r"_\w+_", last):
        raise UsageError("Components are chosen by name", got=argument, fix=f"{owner or 'pruner'}=<name>")


PATHS = ("model.id", "results")
"""Keys whose values are paths, as `calibration.text.path` is."""


def quoted(argument: str) -> str:
    """A path as Hydra is to read it: in quotes where its characters mean something in Hydra's grammar.

    `a.txt,b.txt` stays a sweep over two paths, unless there is a file of that very name.
    """
    key, equals, value = argument.partition("=")
    if not equals or not (key.lstrip("+") in PATHS or key.endswith((".path", ".file"))) or value[:1] in ("'", '"', ""):
        return argument
    values = [value] if Path(value).expanduser().exists() else value.split(",")
    return f"{key}=" + ",".join(
        part if re.fullmatch(r"[\w./*?:+-]+", part, re.ASCII) else _quote(part) for part in values
    )


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def expand_model(arguments: list[str]) -> list[str]:
    """Turn `model=org/name`, `model=./folder`, `model=./file.gguf`, and sweeps over such, into the generic models.

    Named models stay.

    Raises:
        UsageError: a sweep over models of more than one of these kinds.
    """
    expanded = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        values = [value] if Path(value).expanduser().exists() else value.split(",")
        kinds: dict[str, list[str]] = {}
        for part in values:
            kinds.setdefault(_kind(part), []).append(part)
        if key != "model" or list(kinds) == [NAMED]:
            expanded.append(argument)
        elif len(kinds) > 1:
            raise UsageError(
                "A sweep is over named models, over ids and folders, or over GGUF files, not over several of these",
                got=argument,
                fix=" and ".join("model=" + ",".join(parts) for parts in kinds.values()) + ", one sweep each",
            )
        else:
            (kind,) = kinds
            expanded += [f"model={kind}", f"{GENERIC[kind]}=" + ",".join(_quote(_absolute(part)) for part in values)]
    return expanded


NAMED = "named"
GENERIC = {"hub": "model.id", "gguf": "model.file"}
"""Models that are not named one by one, and the key that says which one is meant."""


def _absolute(source: str) -> str:
    """A folder or file by its whole path, a hub id as it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _kind(value: str) -> str:
    if not value or value in registry.names("model") or value.startswith("shape/"):
        return NAMED
    if value.endswith(".gguf"):
        return "gguf"
    folder = Path(value).expanduser().is_dir()
    return "hub" if folder or re.fullmatch(r"[\w.-]+/[\w.-]+", value) else NAMED
