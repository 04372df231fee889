"""Stages that train a pruned model: low-rank adapters, masked or dense, and the surviving weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from sparsify.methods.base import Stage, StageResult
from sparsify.methods.job import Job
from sparsify.model.blocks import BlockView
from sparsify.model.masks import Masks
from sparsify.recovery.adapters import Adapters, check_scale
from sparsify.recovery.schedule import Schedule
from sparsify.recovery.teacher import dense_copy
from sparsify.recovery.training import Trainer, peak_memory
from sparsify.types import check_whole


@dataclass(frozen=True, kw_only=True)
class _Tuning(Stage):
    """What stages that train share.

    Attributes:
        training: the text: a spec with `inputs(tokenizer, seed)`, `Inputs`, or token ids [n, seqlen].
        schedule: of the training.
    """

    training: Any = None
    schedule: Schedule = field(default_factory=Schedule)
    version: int = 1

    def prepare(self, job: Job) -> None:
        job.examples(self.training)
        if self.schedule.distill:
            job.dense()

    def _train(self, view: BlockView, job: Job, parameters: list[nn.Parameter], **options: Any) -> dict[str, Any]:
        """Train these parameters on all of the text; notes for the record."""
        text = job.examples(self.training)
        teacher = dense_copy(view, job.dense()) if self.schedule.distill else None
        with peak_memory(view.device) as peak:
            trainer = Trainer(view, parameters, self.schedule, self.schedule.steps(len(text)), dense=teacher, **options)
            losses = trainer.run(text, job.seed, job.progress)
            tokens = sum(map(len, text.ids))
            return {"loss": losses, "training_tokens": tokens, "training_text": dict(text.provenance), **peak()}


@dataclass(frozen=True, kw_only=True)
class MaskedLoRA(_Tuning):
    """Low-rank adapters of one rank under the masks, W x + scale M.(BA) x, trained once and merged; every zero stays.

    LoSA (arXiv 2502.14816) without its dynamic sparsity and ranks.

    Attributes:
        rank: of every block.
        scale: of the product BA (alpha / r).
    """

    masked: ClassVar[bool] = True
    rank: int = 8
    scale: float = 2.0

    def __post_init__(self) -> None:
        check_whole("rank", self.rank)
        check_scale(self.scale)

    def apply(self, view: BlockView, masks: Masks, job: Job) -> StageResult:
        before, dropout = view.sparsity(), self.schedule.dropout
        with Adapters(
            view, self.rank, self.rank, scale=self.scale, dropout=dropout, seed=job.seed, masked=self.masked
        ) as adapters:
            notes = self._train(view, job, adapters.parameters())
            notes |= {"trainable": adapters.num_trainable(), "without_adapter": [x.name for x in adapters.skipped]}
            adapters.merge()
        notes |= {"sparsity_before": before, "sparsity_merged": view.sparsity()}
        return StageResult(masks, notes, sparse=self.masked)


@dataclass(frozen=True, kw_only=True)
class LoRA(MaskedLoRA):
    """Low-rank adapters without masks: merging fills the zeros, and the record says what sparsity that leaves.

    LoRA (arXiv 2106.09685) on a pruned model, the baseline of LoSA and of ATP's Table 16.
    """

    masked: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(_Tuning):
    """Full fine-tuning of the weights that are kept: gradients and steps under the masks, biases and norms as they are.

    The model is trained in single precision, its products in bfloat16 where it was in half precision, and rounded back
    into its own afterwards. With AdamW that takes 16 bytes a weight.
    """

    def apply(self, view: BlockView, masks: Masks, job: Job) -> StageResult:
        with _in_single(view) as parameters:
            zeros = [parameter == 0 for parameter in parameters]

            @torch.no_grad()
            def keep_zeros() -> None:
                for parameter, zero in zip(parameters, zeros, strict=True):
                    parameter.masked_fill_(zero, 0.0)

            notes = self._train(view, job, parameters, after=keep_zeros)
        return StageResult(masks, notes | {"trainable": int(sum((~zero).sum() for zero in zeros))})


@contextmanager
def _in_single(view: BlockView) -> Iterator[list[nn.Parameter]]:
    """The model in single precision, its prunable parameters with gradients; rounded back into place afterwards."""
    half = {p: p.data for p in view.model.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
    buffers = {b: b.data for b in view.model.buffers() if b.dtype in (torch.float16, torch.bfloat16)}
    prunable = list(dict.fromkeys(layer.stored for layer in view.layers))
    needed = [parameter.requires_grad for parameter in prunable]
    try:
        for tensor in (*half, *buffers):
            tensor.data = tensor.data.float()
        for parameter in prunable:
            parameter.requires_grad_(True)
        # Without the cache: it would hand out a weight as it was before the step.
        with torch.autocast(view.device.type, torch.bfloat16, enabled=bool(half), cache_enabled=False):
            yield prunable
    finally:
        for parameter, flag in zip(prunable, needed, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
        with torch.no_grad():
            for tensor, place in (half | buffers).items():
                tensor.data = place.copy_(tensor.data)
