"""What transformers makes of a folder or a hub id, looked at before it is believed.

A weight that the files lack is drawn at random, one that the model lacks is dropped, and code that lies beside them may
be run: none of that may end in a number.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify import paths
from sparsify.errors import DataError, UnsupportedModelError
from sparsify.model.blocks import refuse_encoder_decoder
from sparsify.model.resized import opened

WRAPPERS = ("_orig_mod.", "module.", "model.", "base_model.model.", "_forward_module.", "transformer.")
"""Prefixes that torch.compile, data parallelism and adapters leave in the names of a checkpoint."""


def pretrained(source: str, dtype: torch.dtype, device: str, revision: str | None = None) -> nn.Module:
    """The causal language model of a folder or hub id, with every weight from its files.

    Raises:
        UnsupportedModelError: quantised weights, an encoder, a model with code of its own.
        DataError: weights that are missing, left over or of another shape; files that are no weights.
        OSError, ValueError, ...: whatever transformers raises about files that it cannot read.
    """
    tree = _read_config(source, revision)
    refuse_config(tree)
    _refuse_pointers(Path(source))
    with quiet():
        model, info = opened(
            tree,
            source,
            revision,
            dtype=dtype,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that they are named here, not in a report on the screen
            output_loading_info=True,
        )
    refuse_loading(info, source)
    placed: nn.Module = model.to(device)
    return placed


def tokenizer_of(source: str, revision: str | None = None) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        DataError: it needs a package that is not there.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (ImportError, ValueError, OSError) as error:
        if Path(source, "tokenizer.model").is_file() and not Path(source, "tokenizer.json").is_file():
            raise DataError(
                "This tokenizer is a SentencePiece model that could not be converted",
                got=f"{source}/tokenizer.model: {first_line(error)}",
                allowed="a tokenizer.json beside it",
                fix="pip install sentencepiece protobuf, or copy tokenizer.json from a newer conversion of the model",
            ) from error
        raise


def _read_config(source: str, revision: str | None) -> Mapping[str, Any]:
    """config.json as it is: nothing in it is run or interpreted yet."""
    from transformers import PretrainedConfig

    with paths.quiet_hub():
        tree, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    return dict(tree)


def refuse_config(config: Mapping[str, Any]) -> None:
    """Refuse by its config what must not be loaded, or would be measured as something that it is not.

    Raises:
        UnsupportedModelError: quantised weights, an encoder-decoder, a model with code of its own.
    """
    name = ", ".join(config.get("architectures") or []) or config.get("model_type", "no model_type")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else quantised
        raise UnsupportedModelError(
            "Quantised weights are not pruned: a zero of theirs is a code, not a zero",
            got=f"{name} with quantization_config of method {method}",
            allowed="weights in float32, float16 or bfloat16",
            fix="the checkpoint that it was quantised from; prune first, quantise after",
        )
    refuse_encoder_decoder(bool(config.get("is_encoder_decoder")), name)
    if "AutoModelForCausalLM" in (config.get("auto_map") or {}) and not _known(config.get("model_type")):
        raise UnsupportedModelError(
            "Models that bring code of their own are not supported, and the code is not run",
            got=f"{name} with auto_map in config.json",
            allowed="architectures that transformers has itself",
        )


def _known(model_type: Any) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def refuse_loading(info: Mapping[str, Any], source: str) -> None:
    """Refuse a model of which some weights are not those of its files.

    Raises:
        DataError: naming weights that were drawn at random, dropped or of another shape.
    """
    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    shapes = sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in info["mismatched_keys"])
    if not (missing or extra or shapes or info.get("error_msgs")):
        return
    raise DataError(
        f"The weights in {source} are not those of the model in its config.json",
        got="; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("left over", extra), ("of another shape", shapes))
            if names
        )
        or first_line(info["error_msgs"]),
        allowed="files that hold every weight of the model and no other",
        fix=_advice(missing, extra),
    )


def _advice(missing: Sequence[str], extra: Sequence[str]) -> str:
    for prefix in WRAPPERS:
        if missing and any(f"{prefix}{name}" in extra for name in missing):
            return f"save the weights again without the prefix {prefix!r} in their names"
        if missing and any(f"{prefix}{name}" in missing for name in extra):
            return f"save the weights again with the prefix {prefix!r} in their names"
    if any("lora_" in name for name in extra):
        return "merge the adapter into the weights (peft: model.merge_and_unload()) and save the model again"
    return "check num_hidden_layers and the sizes in config.json, and that no file of the checkpoint is missing"


def _refuse_pointers(folder: Path) -> None:
    """A clone without git-lfs has a few lines of text where the weights should be.

    Raises:
        DataError: naming such a file.
    """
    for file in sorted(folder.glob("*")) if folder.is_dir() else ():
        if file.suffix in (".safetensors", ".bin", ".json", ".model") and file.is_file():
            with open(file, "rb") as handle:
                if handle.read(24) == b"version https://git-lfs.":
                    raise DataError(
                        "A file of the model is a pointer of git-lfs, not the file itself",
                        got=f"{file}, {file.stat().st_size} bytes",
                        fix=f"git lfs pull in {folder}, or download the model again",
                    )


def first_line(error: Any) -> str:
    """What an exception or a list of messages says first; its name where it says nothing."""
    text = str(error[0] if isinstance(error, list) and error else error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and reports of transformers: the console has its own line for loading, errors their own text."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    logger = logging.getLogger("transformers")
    level = logger.level
    transformers_logging.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            transformers_logging.enable_progress_bar()
