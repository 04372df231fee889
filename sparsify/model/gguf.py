"""Models in GGUF files, dequantised once into a folder that transformers reads in a tenth of a second."""

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import warnings
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from sparsify import paths
from sparsify.errors import DataError, SparsifyError
from sparsify.model.pretrained import first_line, pretrained, quiet, tokenizer_of
from sparsify.model.sources import Loaded, finished, parse_dtype, pick_device

NOTE, WEIGHTS = "converted.json", "model.safetensors"


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file: of one's own, of the hub, or shipped by Python packages.

    Attributes:
        file: its path, or `org/name/file.gguf` of the hub; of a package's file the path below `assets`, or the paths of
            its parts, in order, where it is too large for one package.
        sha256: of the (joined) file; a different file is refused. None takes any file.
        package: the requirement that ships it, for the message when it is not the pinned file.
        setup: the command that installs it, for the messages.
    """

    name: str
    file: str | list[str]
    sha256: str | None = None
    package: str = ""
    num_blocks: int | None = None
    setup: str = "make setup"

    def load(self, dtype: str, device: str) -> Loaded:
        """Convert if needed (20 to 60 s, once), check the hash, load.

        Raises:
            DataError: there is no such file, it is not the pinned one, or transformers cannot read it.
        """
        torch_dtype, where = parse_dtype(dtype), pick_device(device)
        folder = self._converted()
        return finished(pretrained(str(folder), torch_dtype, where), tokenizer_of(str(folder)))

    def _converted(self) -> Path:
        """The converted folder; where one is whole nothing is written, so that it may be another user's."""
        parts = self._parts() if self.sha256 is None else []
        sha256 = self.sha256 or _hash(*parts)
        name = f"{self.name}-{sha256[:12]}"
        if whole := next((place / name for place in paths.caches() if _intact(place / name)), None):
            return whole
        folder = paths.cache() / name
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not _intact(folder):
                    if folder.exists():
                        warnings.warn(f"{folder} is damaged; converting it again", stacklevel=2)
                    self._convert(folder, parts or self._parts(), sha256)
        except OSError as error:
            raise SparsifyError(
                f"The converted weights of {self.name} could not be written",
                got=error,
                fix="free 1.5 GB, or point SPARSIFY_CACHE at a folder that can be written",
            ) from error
        return folder

    def _convert(self, folder: Path, parts: list[Path], sha256: str) -> None:
        prefix = f".converting-{folder.name}."
        for left in folder.parent.glob(f"{prefix}*"):  # by a killed one: whoever holds the lock is alone
            shutil.rmtree(left, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
        try:
            done = draft / "done"
            _dequantise(_joined(parts, draft), done)
            note = {"from": sha256, "sha256": _hash(done / WEIGHTS), "files": _small_files(done)}
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
        parts = [paths.assets() / Path(name).expanduser() for name in names]
        if not self.package:
            parts = [part if part.is_file() else _of_hub(name) for name, part in zip(names, parts, strict=True)]
        if self.sha256 is None:
            return parts
        if missing := [part for part in parts if not part.is_file()]:
            raise DataError(
                f"The weights of {self.name} are not installed", got=f"no file {missing[0]}", fix=self.setup
            )
        if (found := _hash(*parts)) != self.sha256:
            raise DataError(
                f"{' + '.join(part.name for part in parts)} is not the pinned file: another version, or cut short",
                got=f"sha256 {found}",
                allowed=self.sha256,
                fix=f"remove {' '.join(map(str, parts))}, and {paths.assets()}/.ready-* and .gemma-* which call it "
                f"installed, then {self.setup} ({self.package})"
                if self.package
                else f"remove {' '.join(map(str, parts))}, so that it is downloaded again",
            )
        return parts


def _of_hub(name: str) -> Path:
    """The file `org/name/file.gguf` of the hub.

    Raises:
        DataError: there is no such file.
    """
    try:
        if not (match := re.fullmatch(r"([\w.-]+/[\w.-]+)/(.+\.gguf)", name)):
            raise FileNotFoundError(name)
        from huggingface_hub import hf_hub_download

        with paths.quiet_hub():
            return Path(hf_hub_download(*match.groups()))
    except Exception as error:  # of the hub's client
        raise DataError(
            "There is no such GGUF file",
            got=f"{name}: {type(error).__name__}",
            allowed="a file, or org/name/file.gguf of the hub",
            fix="check the path",
        ) from error


def _dequantise(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The dequantisation draws a bar of its own on stderr, whatever the settings.
    try:
        with quiet(), redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # whatever transformers and its reader raise about this file
        raise DataError(
            f"{source.name} could not be read",
            got=f"{type(error).__name__}: {first_line(error)}",
            allowed="a GGUF file of a family that transformers reads",
            fix="check that the file is whole, or take the model's safetensors",
        ) from error


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
