"""Text that the dense model writes itself, to train its pruned copy on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GenerationConfig

from sparsify.data.examples import Examples
from sparsify.data.inputs import hash_tokens
from sparsify.data.windows import encode
from sparsify.errors import UsageError
from sparsify.types import check_whole


@dataclass(frozen=True)
class Generated:
    """Sequences sampled from the dense model, each from a first token drawn uniformly from the vocabulary.

    The first `greedy` tokens after it are the likeliest ones, which lead to a subject; all others are drawn from the
    model's own distribution, up to <eos> or `length`. No text is needed, and with the dense model as teacher
    (`schedule.distill`) what is trained on is what the teacher knows.

    Source: LLM-QAT (Liu et al., arXiv 2305.17888), Section 3.1. The same seed gives the same text on the same kind of
    device and version of torch alone, since a rounding error changes what is drawn: the record has its hash.

    Attributes:
        samples: how many.
        length: tokens of each, the first one included, at most.
        greedy: tokens after the first that are not drawn.
        temperature: of the others.
        batch: sequences written side by side; changes what is drawn.
    """

    samples: int = 4096
    length: int = 512
    greedy: int = 4
    temperature: float = 1.0
    batch: int = 1024

    def __post_init__(self) -> None:
        for name, least in {"samples": 1, "length": 2, "greedy": 0, "batch": 1}.items():
            check_whole(name, getattr(self, name), least)
        if self.greedy > self.length - 2:
            raise UsageError(
                "Some tokens are to be drawn",
                got=f"length={self.length}, greedy={self.greedy}",
                allowed=f"greedy <= {self.length - 2}, beside a first token and one that is drawn",
                fix=f"length={self.greedy + 2} or more",
            )
        if not 0 < self.temperature <= 10:
            raise UsageError(
                "temperature divides the logits", got=self.temperature, allowed="above 0, at most 10", fix="1.0"
            )

    def inputs(self, tokenizer: Any, seed: int, model: nn.Module) -> Examples:
        """Have the model write.

        Args:
            tokenizer: of the model, for its <bos>, <eos> and special tokens; None for a random model.
            seed: of what is drawn.
            model: the dense model; in eval mode.

        Raises:
            UsageError: it cannot write, or not as long a text.
        """
        self._check(model)
        device = next(model.parameters()).device
        with _drawing(device, seed):
            firsts = self._firsts(tokenizer, model, device)
            ids = tuple(row for some in firsts.split(self.batch) for row in self._written(model, some, tokenizer))
        source = {"source": "the dense model", "samples": len(ids), "tokens": sum(map(len, ids))}
        return Examples(ids, (1,) * len(ids), "train", {**source, "tokens_sha256": hash_tokens(torch.cat(ids)[None])})

    def _check(self, model: nn.Module) -> None:
        if not (hasattr(model, "generate") and hasattr(model, "config")):
            fix = "tuning=samples or tuning=windows"
            raise UsageError("Only a transformers model writes text", got=type(model).__name__, fix=fix)
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and self.length > longest:
            raise UsageError(
                "The model does not write that long a text",
                got=f"length={self.length}",
                allowed=f"at most {longest} positions",
                fix=f"length={longest}",
            )

    def _firsts(self, tokenizer: Any, model: Any, device: torch.device) -> Int[Tensor, "n few"]:
        """First tokens, after a <bos> where the tokenizer adds one."""
        if tokenizer is None:
            return torch.randint(model.config.vocab_size, (self.samples, 1)).to(device)
        plain = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
        drawn = plain[torch.randint(len(plain), (self.samples, 1))]
        before = [token for token in encode(tokenizer, "").tolist()[:1] if token == tokenizer.bos_token_id]
        return torch.cat([drawn.new_tensor(before).expand(self.samples, -1), drawn], dim=1).to(device)

    def _written(self, model: Any, some: Int[Tensor, "b few"], tokenizer: Any) -> Iterator[Int[Tensor, " len"]]:
        """The texts that begin so, on the CPU."""
        eos = getattr(tokenizer, "eos_token_id", None)
        options = {"pad_token_id": 0 if eos is None else eos, "eos_token_id": eos, "use_cache": True}
        begun = some
        if self.greedy:
            likeliest = GenerationConfig(do_sample=False, max_new_tokens=self.greedy, **options)
            begun = model.generate(begun, attention_mask=torch.ones_like(begun), generation_config=likeliest)
        left = self.length - begun.shape[1]
        drawn = GenerationConfig(
            do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0, max_new_tokens=left, **options
        )
        whole = model.generate(begun, attention_mask=torch.ones_like(begun), generation_config=drawn)
        for row in whole.cpu():
            yield _ended(row, eos, some.shape[1])


def _ended(row: Int[Tensor, " n"], eos: int | None, first: int) -> Int[Tensor, " m"]:
    """Up to the first <eos> after the given tokens, and with it."""
    ends = (row[first:] == eos).nonzero() if eos is not None else row.new_zeros(0, 1)
    return row[: first + int(ends[0]) + 1] if len(ends) else row


@contextmanager
def _drawing(device: torch.device, seed: int) -> Iterator[None]:
    """The seed's random numbers; those of the caller go on afterwards as if nothing had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        yield
