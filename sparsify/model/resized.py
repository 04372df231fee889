"""Opening a model whose blocks differ in size: transformers loads the files, into a model cut to their sizes first."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsify.errors import UnsupportedModelError
from sparsify.model.sizes import BLOCK_SIZES, Sizes, resize, stored


def opened(tree: Mapping[str, Any], source: str, revision: str | None, **options: Any) -> tuple[nn.Module, Any]:
    """The causal language model of a folder or hub id, and what transformers says of its weights.

    Args:
        tree: its config.json.
        source: folder or hub id.
        revision: commit for a hub id.
        options: of `from_pretrained`.

    Raises:
        DataError: sizes by block that the model cannot have.
        UnsupportedModelError: sizes by block, in a family whose blocks are not cut.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes, options = stored(tree), {"revision": revision, **options}
    if sizes is None:
        return tuple(AutoModelForCausalLM.from_pretrained(source, **options))
    kind = _kind(AutoConfig.from_pretrained(source, revision=revision))
    model, info = _cut_to(kind, sizes).from_pretrained(source, **options)
    model.__class__ = kind
    return model, info


def _kind(config: Any) -> type[nn.Module]:
    """The class that transformers has for a configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not isinstance(kind, type):
        raise UnsupportedModelError(f"{BLOCK_SIZES} is read for causal language models", got=type(config).__name__)
    return kind


def _cut_to(kind: type[nn.Module], sizes: Mapping[int, Sizes]) -> Any:
    """A class like `kind` whose models have these sizes from the start."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        resize(self, sizes)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})
