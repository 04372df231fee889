"""Layer-wise sparsity for language models: load, prune, measure.

import sparsify
model, tokenizer = sparsify.load("smollm2-135m")
result = sparsify.prune(model, tokens, pruner="wanda", allocator="owl", sparsity=0.7)
sparsify.perplexity(model, test_tokens)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsify.data.inputs import Inputs
    from sparsify.recipe import PruneResult
    from sparsify.runs.registry import Spec
    from sparsify.types import Pattern

__version__ = "0.1.0"
__all__ = ["load", "perplexity", "prune", "windows"]


def load(source: str, *, dtype: str = "float32", device: str = "cpu", revision: str | None = None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, in eval mode and without gradients.

    Args:
        source: a name under `configs/model` (`smollm2-135m`), a hub id (`org/name`), a local folder, or a GGUF file.
        dtype: `float32`, `float16` or `bfloat16`.
        device: `cpu`, `cuda`, `cuda:1`, ... or `auto`.
        revision: commit for a hub id; named models have theirs pinned.

    Returns:
        (model, tokenizer); the tokenizer is None for `shape/...` models, whose weights are random.

    Raises:
        UsageError: unknown name, dtype or device.
        DataError: the weights cannot be found or fetched.
    """
    from pathlib import Path

    from sparsify.errors import UsageError
    from sparsify.model.gguf import GGUFModel
    from sparsify.model.sources import HubModel
    from sparsify.runs import registry

    if not isinstance(source, str | Path) or not str(source).strip():
        fix = 'sparsify.load("smollm2-135m")'
        raise UsageError("A model is a name, a hub id, a folder or a GGUF file", got=repr(source)[:80], fix=fix)
    source = str(source)
    if source.endswith(".gguf"):
        file = str(Path(source).resolve()) if Path(source).exists() else source
        model_source: Any = GGUFModel(Path(source).stem, file)
    elif Path(source).is_dir():
        model_source = HubModel(Path(source).name, source)
    elif source in registry.names("model") or "/" not in source:
        model_source = registry.build("model", source)
    else:
        model_source = HubModel(source, source, revision)
    loaded = model_source.load(dtype, device)
    return loaded.model, loaded.tokenizer


def windows(
    tokenizer: Any,
    corpus: str = "sotu",
    split: str = "train",
    *,
    n: int | None = 8,
    seqlen: int = 512,
    sampler: str = "document",
    text_column: str = "text",
    bos: bool | Literal["auto"] = "auto",
    seed: int = 0,
) -> Tensor:
    """Token ids to calibrate or evaluate on, [n, seqlen].

    Args:
        tokenizer: of the model.
        corpus: a name under `configs/data`, or a text file.
        split: `train`, `heldout` or `test` of `sotu`; `train` or `validation` of `c4`; any of `wikitext2`.
        n: windows; None for all (`joined` sampler only).
        seqlen: tokens per window.
        sampler: `document` (a random window of a random long document), `joined` or `random`, see `data.windows`.
        bos: whether windows begin with a beginning-of-text token, see `data.windows`.
        text_column: of a text file of your own with rows (JSON, Parquet): the column that holds the text.
        seed: of the document sampler.

    Raises:
        UsageError: unknown corpus or sampler.
        DataError: the text is nowhere to be found or too short.
    """
    from pathlib import Path

    from sparsify import schema
    from sparsify.data.corpora import Corpus
    from sparsify.data.windows import Windows, check_tokenizer
    from sparsify.errors import UsageError
    from sparsify.runs import registry
    from sparsify.types import check_seed, check_whole

    if not isinstance(corpus, str | Path) or not str(corpus).strip():
        raise UsageError(
            "A corpus is a name or a file", got=repr(corpus)[:80], allowed=", ".join(registry.names("data"))
        )
    check_tokenizer(tokenizer)
    check_whole("n", n, or_null=True)
    check_seed(seed)
    own = Path(corpus).expanduser()
    text = Corpus(own.stem, path=str(own), columns=(text_column,)) if own.is_file() else None
    text = text or registry.build("data", str(corpus))
    given = {"text": text, "split": split, "seqlen": seqlen, "windows": n, "sampler": sampler, "bos": bos}
    tokens: Tensor = Windows(**schema.values_of(Windows, given, "windows")).inputs(tokenizer, seed).tokens
    return tokens


def prune(
    model: nn.Module,
    tokens: Tensor | Inputs,
    *,
    pruner: Spec = "wanda",
    allocator: Spec = "uniform",
    sparsity: float | None = None,
    pattern: str | Pattern = "unstructured",
    method: Spec = "oneshot",
    recovery: Spec = None,
    quantiser: Spec = None,
    heldout: Tensor | Inputs | None = None,
    training: Tensor | Inputs | None = None,
    objective: Spec = "next_token",
    part: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> PruneResult:
    """Prune a decoder language model in place; the same seed gives the same bits as a cell of the command line.

    Args:
        model: any transformers decoder whose blocks hold `Linear` or `Conv1D` layers.
        tokens: calibration token ids, LongTensor [n, seqlen] (128 x 2048 in the papers); or other `Inputs`.
        pruner: `magnitude`, `wanda`, `ria`, `sparsegpt`, `alps`, `admm`, `least_squares`, `gblm`,
            `pruner_zero`, `dsnot`; or `(name, {parameter: value})`; or an object.
        allocator: `uniform`, `atp`, `owl`, `alphapruning`, ...; same forms.
        sparsity: fraction of zeros over the blocks' linear weights, in [0, 1). May be left out for N:M.
        pattern: `unstructured`, `2:4` (keep 2 of every 4 inputs), `mixed:8` (each block its own N of 8).
        method: `oneshot`, or `("oneshot", {"regime": "sequential"})`; `losa`; `structured`: matrices become smaller;
            `joint`: prune and quantise in one solve.
        recovery: a stage that trains the pruned model; None for none.
        quantiser: a stage after it, `rtn`, `gptq` or `("gptq", {"bits": 3, "group": 64})`; None for none.
        heldout: token ids or inputs for allocators that search (`("atp", {"beta": "auto"})`).
        training: token ids or inputs for what trains: `method="losa"`, `recovery="masked_lora"`.
        objective: the loss that searches and gradients mean.
        part: which tower of a model with several: `language`, `vision` or a module's name; None for the decoder.
        seed: of whatever draws.
        batch_size: windows per forward; None picks one for the device.

    Returns:
        Achieved sparsity, the plan with its budget ledger, one row per layer (block, name, target, achieved, zeros,
        numel, error, seconds), the masks, the grids of a quantised model, and what of the blocks was not pruned. Dtype,
        device and mode of the model stay as they were; a call that raises leaves the model as it was (until then a copy
        is kept on the host).

    Raises:
        UsageError: a value out of range, an unknown name, a pattern that does not fit.
        UnsupportedModelError: no decoder blocks found, or weights that cannot be pruned as what they are: quantised,
            adapted, offloaded, computed, shared between blocks.
        NumericsError: NaN weights, or a factorisation that fails at any damping; the message names the layer.
    """
    from sparsify.data.inputs import as_inputs, check_batch_size
    from sparsify.model.blocks import BlockView
    from sparsify.recipe import Recipe, prune_model
    from sparsify.runs import registry
    from sparsify.types import check_seed

    check_seed(seed)
    check_batch_size(batch_size)
    chosen = {"recovery": recovery, "quantiser": quantiser}
    recipe = Recipe.of(
        registry.build("pruner", pruner),
        registry.build("allocator", allocator),
        registry.build("method", method),
        pattern,
        sparsity,
        objective=registry.build("objective", objective),
        stages={group: registry.build(group, spec) for group, spec in chosen.items() if spec is not None},
    )
    calibration, scored = as_inputs(tokens), None if heldout is None else as_inputs(heldout, 2)
    view = BlockView(model, part)
    modes = {module: module.training for module in model.modules()}
    dense = view.snapshot()
    model.eval()
    try:
        return prune_model(
            view,
            calibration,
            recipe,
            heldout=scored,
            training=None if training is None else as_inputs(training, 2),
            batch_size=batch_size,
            snapshot=lambda: dense,
            seed=seed,
        )
    except BaseException:
        view.restore(dense)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode


def perplexity(model: nn.Module, tokens: Tensor | Inputs, *, batch_size: int | None = None) -> float:
    """Perplexity of windows: exp of the mean cross-entropy over the seqlen - 1 predicted tokens of each.

    Args:
        model: a transformers causal language model in eval mode.
        tokens: token ids, LongTensor [n, seqlen].
        batch_size: windows per forward; None picks one for the device.

    Raises:
        DataError: no windows, or windows of fewer than two tokens.
        NumericsError: the result is not finite.
    """
    from sparsify.model.objective import perplexity as measure

    return measure(model, tokens, batch_size=batch_size)
