"""Overrides as people type them, made into what Hydra reads: paths without quotes, any hub id or folder as a model."""

from __future__ import annotations

import re
from pathlib import Path

from hydra.errors import HydraException

from sparsify import paths
from sparsify.errors import UsageError
from sparsify.runs import menu, registry


def understood(arguments: list[str]) -> list[str]:
    """Overrides as Hydra is to have them.

    Raises:
        UsageError: one of them would set what is no setting.
    """
    for argument in arguments:
        _refuse_registration(argument)
    read = [quoted(argument) for argument in expand_model(arguments)]
    for argument in read:
        if not argument.startswith("rows="):  # of a report, which is no setting of a cell
            _refuse_unreadable(argument)
    return read


SWEEP = ("-m", "--multirun")
FLAGS = (*SWEEP, "-h", "--help", "--hydra-help", "--version", "--resolve", "-r", "--run", "-sc", "--shell-completion")
VALUED = ("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir")
"""Flags of Hydra that a value follows."""


def sorted_out(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and overrides, wherever in the line they stand.

    Raises:
        UsageError: a flag that there is not.
    """
    flags: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        if flags and flags[-1] in VALUED:
            flags.append(argument)
        elif not argument.startswith("-"):
            overrides.append(argument)
        elif argument.partition("=")[0] in (*FLAGS, *VALUED):
            flags.append(argument)
        else:
            raise unknown_flag(argument, ", ".join((*SWEEP, "--cfg job", "--help", "and the others of Hydra")))
    return flags, overrides


def unknown_flag(argument: str, allowed: str) -> UsageError:
    """The error for a flag that a command does not have; settings have no dashes."""
    word = argument.strip("-")
    fix = f"settings have no dashes: {word if '=' in word else (word or 'sparsity') + '=<value>'}"
    return UsageError("There is no flag of that name", got=argument, allowed=allowed, fix=fix)


def _refuse_unreadable(argument: str) -> None:
    """What Hydra's grammar does not have, and values that its groups and folders cannot have."""
    key, equals, value = argument.partition("=")
    if not key.strip("+~ ") or not (equals or key.startswith("~")):
        raise UsageError("A setting is typed as key=value", got=argument, fix=_guessed(argument))
    try:
        override = menu.parsed(argument)
    except (HydraException, ValueError) as error:
        fix = (
            f"{key}={value.lstrip('= ')}"
            if value.startswith("=")
            else f"close every bracket and quote, or {_safe(argument)}"
        )
        raise UsageError("This setting cannot be read", got=argument, fix=fix) from error
    if override.is_delete() or override.is_sweep_override():
        return
    group = override.key_or_group
    if (paths.configs() / group).is_dir() and not isinstance(override.value(), str | list):
        allowed = ", ".join(registry.names(group))
        raise UsageError(
            f"A {group} is chosen by name", got=argument, allowed=allowed, fix=f"{key}=<name>, or leave it out"
        )
    if group == "results" and override.value() in (None, ""):
        raise UsageError("results is a folder", got=argument, fix="results=<folder>, or leave it out")


def _guessed(argument: str) -> str:
    """A setting for a bare word: the name of an option, if it is one."""
    for group in ("pruner", "allocator", "model", "scale", "eval", "experiment"):
        if argument in registry.names(group):
            return f"{group}={argument}"
    word = argument.strip("+~= ")
    return f"{word}=<value>" if word else "leave it out"


def _safe(argument: str) -> str:
    """An argument so quoted that a shell and Hydra both leave its value alone."""
    key, _, value = argument.partition("=")
    return f"""in a shell "{key}='{value.strip("'" + '"')}'" if the value is text"""


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
        part if re.fullmatch(r"[\w./*?:+-]*[A-Za-z/*?][\w./*?:+-]*", part, re.ASCII) else _quote(part)
        for part in values
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
