"""Errors of Hydra and of the machine in our words: what was typed, what would have been right. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from sparsify import paths
from sparsify.errors import SparsifyError, UnexpectedError, UsageError
from sparsify.runs import registry


def understand(error: BaseException) -> SparsifyError:
    """The same error in our words: what, got, allowed, fix."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SparsifyError):
            return cause
        cause = cause.__cause__
    if isinstance(error, MissingConfigException):
        return _unknown_option(error)
    if isinstance(error, ConfigCompositionException | OverrideParseException | HydraException | OmegaConfBaseException):
        return _unknown_key(error)
    if isinstance(error, OSError) and error.filename is not None:
        return SparsifyError(
            "A file or folder cannot be used",
            got=f"{error.filename}: {error.strerror}",
            fix="set results=<a folder that can be written>, or look at the path",
        )
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return SparsifyError(
            "The device ran out of memory",
            got=str(error).splitlines()[0] if str(error) else None,
            fix="batch_size=1, or a smaller model",
        )
    return UnexpectedError(f"Unexpected {type(error).__name__}", got=error, fix="the traceback below says where")


def _unknown_option(error: MissingConfigException) -> SparsifyError:
    group, _, name = (error.missing_cfg_file or "").partition("/")
    if group == "hydra":
        return UsageError("Hydra has no such option", got=error.missing_cfg_file)
    if (paths.configs() / group).is_dir():
        return registry.unknown(group, name)
    return UsageError("There is no such config", got=error.missing_cfg_file)


def _unknown_key(error: BaseException) -> SparsifyError:
    """A typo in an override: near matches and the file that owns the group."""
    text = " ".join(str(e) for e in (error, error.__cause__) if e is not None)
    match = re.search(r"Could not override '([^']+)'", text) or re.search(r"full_key: ([\w.@/-]+)", text)
    if match is None:
        return _not_understood(" ".join(text.split()))
    key = match.group(1)
    if "Cannot merge" in text:
        fix = f"leave {key} as its config has it: python -m sparsify --cfg job"
        return UsageError(f"The value of {key} is of another kind", got=text.partition(" Cannot")[0], fix=fix)
    if inner := re.search(rf"is not in struct\s+full_key: ({re.escape(key)}\.[\w.]+)", text):
        key = inner.group(1)
    if "MandatoryMissing" in text or "Missing mandatory" in text or "mandatory value" in text:
        return UsageError(f"{key} must be given", fix=f"{key}=<value>")
    if "@" in key:
        return _nothing_there(key)
    if places := _places_of(key):
        return UsageError(f"A {key} is chosen in its place within another component", got=key, fix=" or ".join(places))
    if swaps := _of_another_component(key):
        return UsageError("The component chosen there has no such parameter", got=key, fix=" or ".join(swaps))
    known = _known_keys()
    own, last = key.split(".")[0], key.rsplit(".", 1)[-1]
    same = [k for k in known if k.startswith(f"{own}.") and k.endswith(f".{last}") and k != key]
    near = same or registry.suggest(key, known) or registry.suggest(last, known)
    fix = f"did you mean {near[0]}" if near else "python -m sparsify --cfg job shows every key"
    owner = key.split(".")[0]
    where = f"; see configs/{owner}/" if (paths.configs() / owner).is_dir() else "; see configs/config.yaml"
    return UsageError("There is no config key of that name", got=key, allowed=", ".join(near) or None, fix=fix + where)


def _not_understood(text: str) -> SparsifyError:
    """What Hydra says of a line, with what to do about it."""
    fixes = {
        "add --multirun": "add -m, which runs one cell after the other",
        "Could not delete": "leave it out: there is nothing of that name",
        "Could not append": "leave the + out",
    }
    fix = next(
        (fix for said, fix in fixes.items() if said in text), "python -m sparsify --help shows what can be typed"
    )
    return UsageError("The command line was not understood", got=text[:400], fix=fix)


def _placed(owner: str) -> list[tuple[str, str, str]]:
    """Components within components of a group: the option that has one, the group of what goes there, the place."""
    texts = {option: registry.find(owner, option).read_text() for option in registry.names(owner)}
    return [(x, group, place) for x, text in texts.items() for group, place in re.findall(r"- /(\w+)@([\w.]+):", text)]


def _nothing_there(key: str) -> SparsifyError:
    """A component was put into a place (`allocator@allocator.inner`) that the chosen options do not have."""
    group, _, place = key.lstrip("+").partition("@")
    owner, _, name = place.partition(".")
    options = [option for option, *there in _placed(owner) if there == [group, name]]
    allowed = ", ".join(f"{owner}={x}" for x in options) or None
    return UsageError(
        f"Nothing that is chosen has a place {place}",
        got=key,
        allowed=allowed and f"with {allowed}",
        fix=f"{owner}={options[0]} {key}=<name>" if allowed else "python -m sparsify --cfg job shows every place",
    )


def _places_of(group: str) -> list[str]:
    """What to type for a group (`perturbation`) whose components only stand within others."""
    owners = sorted(p.name for p in paths.configs().iterdir() if p.is_dir())
    found = [(owner, *placed) for owner in owners for placed in _placed(owner)]
    return [f"{owner}={x} {group}@{owner}.{place}=<name>" for owner, x, there, place in found if there == group]


def _of_another_component(key: str) -> list[str]:
    """What to choose so that a component (`allocator`), or the one in a place of it (`allocator.source`), has a key."""
    owner, _, rest = key.lstrip("+").partition(".")
    place, _, name = rest.rpartition(".")
    if place:
        groups = sorted({group for _, group, there in _placed(owner) if there == place})
        return [f"{g}@{owner}.{place}={x}, then {key}=<value>" for g in groups for x in _with_parameter(g, name)]
    own = [f"{owner}={option}, then {key}=<value>" for option in _with_parameter(owner, name)]
    within = [(option, f"{owner}.{at}.{name}") for option, _, at in _placed(owner)]
    return own or [f"{owner}={option} {swap}" for option, inner in within for swap in _of_another_component(inner)]


def _with_parameter(group: str, name: str) -> list[str]:
    """Options of a group whose YAML has a parameter of that name."""
    has = re.compile(rf"^{re.escape(name)}:", re.MULTILINE)
    return [option for option in registry.names(group) if has.search(registry.find(group, option).read_text())]


def _settings(tree: Mapping[str, Any]) -> list[str]:
    """Keys of a YAML that may be set, and those one level below."""
    own = {
        str(k): v for k, v in tree.items() if not str(k).startswith("_") and k not in ("defaults", "hydra", "version")
    }
    inner = [f"{k}.{name}" for k, v in own.items() if isinstance(v, Mapping) for name in _settings(v)]
    return [*own, *inner]


def _known_keys() -> list[str]:
    """Groups, top-level keys and the parameters inside groups."""
    groups = [p.name for p in paths.configs().iterdir() if p.is_dir()]
    keys = set(groups)
    for file in paths.configs().rglob("*.yaml"):
        group = file.relative_to(paths.configs()).parts[0]
        if group not in ("hydra", "table", "experiment"):
            top = group in ("config.yaml", "scale")
            keys |= {name if top else f"{group}.{name}" for name in _settings(registry.read(file))}
    return sorted(keys)
