"""Loading a model: a hub id or folder, or random weights of a given shape; GGUF files are in `model.gguf`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from sparsify import paths
from sparsify.errors import DataError, SparsifyError, UsageError
from sparsify.model.pretrained import first_line, pretrained, tokenizer_of

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
    """`auto` is the first accelerator, of several processes each one's own, else the CPU.

    Raises:
        UsageError: not a device torch can use here.
    """
    if name == "auto":
        if torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
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
        return finished(model, tokenizer)

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
        return finished(model, None)


def finished(model: nn.Module, tokenizer: Any) -> Loaded:
    """In eval mode and without gradients."""
    model.requires_grad_(False)
    return Loaded(model.eval(), tokenizer)
