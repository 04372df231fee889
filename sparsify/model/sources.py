"""Loading a model: a GGUF from a package, a hub id or folder, or random weights of a given shape."""

import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from filelock import FileLock
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from sparsify import paths
from sparsify.errors import DataError, SparsifyError, UsageError
from sparsify.model.pretrained import first_line, pretrained, quiet, tokenizer_of

NOTE, WEIGHTS = "converted.json", "model.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, without gradients, and its tokenizer (None for random weights)."""

    model: nn.Module
    tokenizer: Any


@runtime_checkable
class ModelSource(Protocol):
    """Something that can become a model.

    Attributes:
        name: short name for records and tables.
        num_blocks: decoder blocks if known beforehand, so that limits can be checked before any work.
    """

    @property
    def name(self) -> str: ...
    @property
    def num_blocks(self) -> int | None: ...

    def load(self, dtype: str, device: str) -> Loaded: ...


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of that name.

    Raises:
        UsageError: not one of float32, float16, bfloat16.
    """
    if not isinstance(name, str) or name not in DTYPES:
        raise UsageError("Unknown dtype", got=repr(name), allowed=", ".join(DTYPES), fix="dtype=float32")
    return DTYPES[name]


def pick_device(name: str) -> str:
    """`auto` is the first accelerator, else the CPU.

    Raises:
        UsageError: not a device torch can use here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if not isinstance(name, str):  # torch takes None for the CPU
            raise TypeError(f"a device is text, and this is {type(name).__name__}")
        if torch.empty(0, device=name).is_meta:
            raise TypeError("a meta device has no numbers")
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UsageError(
            "This device is not available", got=name, allowed="auto, cpu, cuda, mps", fix="device=auto"
        ) from error
    return name


@dataclass(frozen=True)
class HubModel:
    """Any decoder language model of the hub, or a local folder in its format.

    Attributes:
        id: hub id (`org/name`) or folder.
        revision: pinned commit; ignored for folders.
        gated: whether the hub asks for an accepted licence and a token.
        published: hyper-parameters that papers give for this model, by allocator; the YAMLs of allocators take theirs
            from here (`registry.published`).
    """

    name: str
    id: str
    revision: str | None = None
    num_blocks: int | None = None
    gated: bool = False
    published: Mapping[str, Any] | None = field(default=None, hash=False)

    def load(self, dtype: str, device: str) -> Loaded:
        """Load weights in `dtype` straight to `device`.

        Raises:
            DataError: neither a folder nor reachable on the hub.
        """
        torch_dtype, where = parse_dtype(dtype), pick_device(device)
        try:
            with paths.quiet_hub():
                model = pretrained(self.id, torch_dtype, where, self.revision)
                tokenizer = tokenizer_of(self.id, self.revision)
        except SparsifyError:
            raise
        except Exception as error:  # whatever transformers and its readers of files raise about this folder
            raise self._not_loaded(error) from error
        return _finish(model, tokenizer)

    def _not_loaded(self, error: Exception) -> DataError:
        token = " and a token (hf auth login) with the licence accepted" if self.gated else ""
        local = Path(self.id).is_dir()
        return DataError(
            f"The model {self.name} could not be loaded",
            got=f"{self.id}: {type(error).__name__}: {first_line(error)}",
            allowed=f"a folder with config.json, tokenizer and weights, or a hub id{token}",
            fix="check that the folder's files are whole: download or save the model again"
            if local
            else "check the spelling, or run without the hub: model=smollm2-135m",
        )


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file shipped by Python packages, dequantised once into a safetensors folder.

    Attributes:
        file: path below `assets`; or the paths of its parts, in order, where it is too large for one package.
        sha256: of the (joined) file; a different file is refused.
        package: the requirement that ships it, for the message when it is not the pinned file.
        setup: the command that installs it, for the messages.
    """

    name: str
    file: str | list[str]
    sha256: str
    package: str
    num_blocks: int | None = None
    setup: str = "make setup"

    def load(self, dtype: str, device: str) -> Loaded:
        """Convert if needed (20 to 60 s, once), check the hash, load.

        Raises:
            DataError: the package is not installed or its file is not the pinned one.
        """
        torch_dtype, where = parse_dtype(dtype), pick_device(device)
        folder = self._converted()
        return _finish(pretrained(str(folder), torch_dtype, where), tokenizer_of(str(folder)))

    def _converted(self) -> Path:
        """The converted folder; where one is whole nothing is written, so that it may be another user's."""
        name = f"{self.name}-{self.sha256[:12]}"
        if whole := next((place / name for place in paths.caches() if _intact(place / name)), None):
            return whole
        folder = paths.cache() / name
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not _intact(folder):
                    if folder.exists():
                        warnings.warn(f"{folder} is damaged; converting it again", stacklevel=2)
                    self._convert(folder)
        except OSError as error:
            raise SparsifyError(
                f"The converted weights of {self.name} could not be written",
                got=error,
                fix="free 1.5 GB, or point SPARSIFY_CACHE at a folder that can be written",
            ) from error
        return folder

    def _convert(self, folder: Path) -> None:
        parts, prefix = self._parts(), f".converting-{folder.name}."
        for left in folder.parent.glob(f"{prefix}*"):  # by a killed one: whoever holds the lock is alone
            shutil.rmtree(left, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
        try:
            done = draft / "done"
            _dequantise(_joined(parts, draft), done)
            note = {"from": self.sha256, "sha256": _hash(done / WEIGHTS), "files": _small_files(done)}
            (done / NOTE).write_text(json.dumps(note))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(done, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _parts(self) -> list[Path]:
        """The installed file, or all of its parts.

        Raises:
            DataError: one is missing, or together they are not the pinned file.
        """
        names = [self.file] if isinstance(self.file, str) else self.file
        parts = [paths.assets() / name for name in names]
        if missing := [part for part in parts if not part.is_file()]:
            raise DataError(
                f"The weights of {self.name} are not installed", got=f"no file {missing[0]}", fix=self.setup
            )
        if (found := _hash(*parts)) != self.sha256:
            raise DataError(
                f"{' + '.join(part.name for part in parts)} is not the pinned file: another version, or cut short",
                got=f"sha256 {found}",
                allowed=self.sha256,
                fix=f"remove {' '.join(str(part) for part in parts)} and run {self.setup} ({self.package})",
            )
        return parts


@dataclass(frozen=True)
class ShapeModel:
    """Random weights in the shape of a model, made on the device: for time and memory, never for quality.

    Attributes:
        config: keyword arguments of the transformers configuration, with `model_type`.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    num_blocks: int | None = None

    def load(self, dtype: str, device: str) -> Loaded:
        """Build the model on `device`; there is no tokenizer."""
        from transformers import AutoConfig, AutoModelForCausalLM

        options, where, torch_dtype = dict(self.config), pick_device(device), parse_dtype(dtype)
        try:
            config = AutoConfig.for_model(options.pop("model_type", None), **options)
            with torch.device(where):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype)
        except (ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
            raise UsageError(
                f"transformers makes no model of the configuration of {self.name}",
                got=str(error)[:200],
                fix="leave model.config.* as configs/model/shape has them",
            ) from error
        return _finish(model, None)


def _finish(model: nn.Module, tokenizer: Any) -> Loaded:
    model.requires_grad_(False)
    return Loaded(model.eval(), tokenizer)


def _dequantise(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The dequantisation draws a bar of its own on stderr, whatever the settings.
    with quiet(), redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def _intact(folder: Path) -> bool:
    """Whether the folder is a finished conversion whose files still have the hashes of its note."""
    try:
        note = json.loads((folder / NOTE).read_text())
        return bool(note["sha256"] == _hash(folder / WEIGHTS) and note["files"] == _small_files(folder))
    except (OSError, ValueError, KeyError, TypeError):  # no conversion, or one whose note is damaged
        return False


def _small_files(folder: Path) -> dict[str, str]:
    """Hashes of config and tokenizer, by name."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name not in (NOTE, WEIGHTS))
    return {file.name: _hash(file) for file in files}


def _hash(*files: Path) -> str:
    """SHA-256 of the files, read one after the other."""
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as handle:
            hashlib.file_digest(handle, lambda: total)
    return total.hexdigest()


def _joined(parts: list[Path], folder: Path) -> Path:
    """The parts as one file, in `folder` if there is anything to join."""
    if len(parts) == 1:
        return parts[0]
    whole = folder / "joined.gguf"
    with open(whole, "wb") as out:
        for part in parts:
            with open(part, "rb") as handle:
                shutil.copyfileobj(handle, out)
    return whole
