"""Samples of a text to train on: instructions with their answers, or plain rows, one sequence each."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from sparsify.data.corpora import Corpus
from sparsify.data.examples import Examples
from sparsify.data.inputs import hash_tokens
from sparsify.data.windows import MOST_NOISE, encode
from sparsify.errors import DataError, UsageError
from sparsify.types import check_whole

ORDERS = ("first", "random")
COUNTS = ("text", "answers")
Written = tuple[str, str, str]
"""A row as text: where it stands, the prompt (empty for plain text), and the answer."""


@dataclass(frozen=True)
class Samples:
    """Which rows of which text, and what of them is predicted.

    A row of three columns is an instruction, its input (which may be empty) and the answer: Alpaca's prompt, the
    answer and <eos>. A row of one column is a text and <eos>. What is longer than `longest` is cut at the end, <eos>
    first.

    LoSA's release trains on the same text. It pads with <eos>, and the collator of its trainer leaves out of the loss
    whatever has the id of padding, so the end of a text too; here that counts, and a model learns where answers end.

    Attributes:
        text: the corpus; its files have rows (JSON or Parquet).
        split: its split.
        samples: how many; None for all.
        longest: tokens of a sequence, at most.
        order: `first` takes the first rows in order; `random` draws without replacement by the seed, in the order
            drawn.
        count: `text` predicts every token but the first, prompts too, as LoSA does; `answers` those of the answer.
    """

    text: Corpus
    split: str = "train"
    samples: int | None = None
    longest: int = 1024
    order: Literal["first", "random"] = "random"
    count: Literal["text", "answers"] = "text"

    def __post_init__(self) -> None:
        check_whole("samples", self.samples, or_null=True)
        check_whole("longest", self.longest, least=2)
        if self.order not in ORDERS:
            raise UsageError("Unknown order of samples", got=self.order, allowed=", ".join(ORDERS))
        if self.count not in COUNTS:
            raise UsageError("count says what is predicted", got=self.count, allowed=", ".join(COUNTS))
        allowed = (3,) if self.count == "answers" else (1, 3)
        if len(self.text.columns) not in allowed:
            raise UsageError(
                "A sample is an instruction, an input and an answer, or with count=text a plain text",
                got=f"columns={list(self.text.columns)}, count={self.count}",
                allowed=f"{' or '.join(map(str, allowed))} columns",
                fix="text.columns=[instruction,input,output], or count=text with text.columns=[text]",
            )

    def inputs(self, tokenizer: Any, seed: int) -> Examples:
        """Read, draw and tokenise; the same seed gives the same samples.

        Raises:
            DataError: a row without instruction or answer, a prompt that fills the whole sequence (all with file and
                line), or fewer rows than samples.
            UsageError: the tokenizer has no <eos>.
        """
        if tokenizer is None:
            return self._noise(seed)
        if tokenizer.eos_token_id is None:
            raise UsageError(
                "A sample ends with <eos>, which this tokenizer has not",
                got=type(tokenizer).__name__,
                fix="windows of the text instead of samples",
            )
        # Every row that is read must be sound, drawn or not: whether a file is refused is not up to the seed.
        written = [_written(where, list(values.values())) for where, values in self._rows()]
        made = [self._encoded(row, tokenizer) for row in self._chosen(written, seed)]
        ids, starts = tuple(ids for ids, _ in made), tuple(start for _, start in made)
        return Examples(ids, starts, self.split, self._provenance(ids))

    def _rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        return islice(self.text.rows(self.split), self.samples if self.order == "first" else None)

    def _chosen(self, written: list[Written], seed: int) -> list[Written]:
        if not written:
            raise DataError(f"The {self.split} split of {self.text.name} is empty", got="no rows")
        wanted = len(written) if self.samples is None else self.samples
        if wanted > len(written):
            raise DataError(
                f"These are more samples than {self.text.name} ({self.split} split) has rows",
                got=f"samples={wanted}, {len(written)} rows",
                allowed=f"at most {len(written)}, or null for all",
                fix=f"samples={len(written)}",
            )
        return random.Random(seed).sample(written, wanted) if self.order == "random" else written

    def _encoded(self, row: Written, tokenizer: Any) -> tuple[Int[Tensor, " len"], int]:
        """Token ids of a sample, and the first position that counts."""
        where, prompt, answer = row
        whole = _ended(encode(tokenizer, prompt + answer), tokenizer.eos_token_id)
        begins = max(1, _shared(encode(tokenizer, prompt), whole)) if prompt else 1
        if begins >= self.longest:
            raise DataError(
                "This prompt leaves no room for a token of its answer",
                got=f"{where}: {begins} tokens, longest={self.longest}",
                allowed=f"at most {self.longest - 1} tokens",
                fix=f"longest={begins + 1} or more, or leave the row out",
            )
        return whole[: self.longest], begins if self.count == "answers" else 1

    def _noise(self, seed: int) -> Examples:
        """Random ids for a model without tokenizer, as long as they may be; only its speed and memory mean anything."""
        count = self.samples or 64
        if count * self.longest > MOST_NOISE:
            raise DataError(
                "These are more samples than a random model can give",
                got=f"samples={count} of {self.longest} tokens",
                allowed=f"at most {MOST_NOISE // self.longest}",
                fix="fewer samples, or a smaller longest",
            )
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 1000, (count, self.longest), generator=generator)
        source = {"source": "random token ids", "tokens_sha256": hash_tokens(tokens)}
        return Examples(tuple(tokens), (1,) * count, self.split, source)

    def _provenance(self, ids: tuple[Tensor, ...]) -> dict[str, Any]:
        joined = torch.cat(ids)[None]
        return {
            **self.text.fingerprint(self.split),
            "samples": len(ids),
            "longest": self.longest,
            "order": self.order,
            "count": self.count,
            "tokens": joined.shape[1],
            "tokens_sha256": hash_tokens(joined),
        }


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """Alpaca's prompt up to where the answer begins (Taori et al. 2023), for an instruction with or without input."""
    paired = ", paired with an input that provides further context" if given else ""
    told = f"Below is an instruction that describes a task{paired}. "
    asked = "Write a response that appropriately completes the request."
    parts = {"Instruction": instruction, **({"Input": given} if given else {}), "Response": ""}
    return told + asked + "".join(f"\n\n### {name}:\n{part}" for name, part in parts.items())


def _written(where: str, values: list[str]) -> Written:
    """A row of one column or three as text.

    Raises:
        DataError: there is nothing to predict, or no instruction.
    """
    *asked, answer = values
    needed = {"instruction": asked[0], "answer": answer} if asked else {"text": answer}
    for name, text in needed.items():
        if not text.strip():
            raise DataError(f"A row has no {name}", got=where, allowed="a text that is not blank", fix="leave it out")
    return where, alpaca_prompt(*asked) if asked else "", answer


def _ended(ids: Int[Tensor, " n"], eos: int) -> Int[Tensor, " m"]:
    """With <eos> at the end, unless the tokenizer has put it there."""
    return ids if len(ids) and ids[-1] == eos else torch.cat([ids, torch.tensor([eos])])


def _shared(prompt: Int[Tensor, " p"], whole: Int[Tensor, " n"]) -> int:
    """Tokens that both begin with. One that spans the end of the prompt belongs to the answer."""
    size = min(len(prompt), len(whole))
    differing = (prompt[:size] != whole[:size]).nonzero()
    return int(differing[0]) if len(differing) else size
