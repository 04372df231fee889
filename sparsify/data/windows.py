"""Windows of tokens for calibration and evaluation, taken from a text by a named, seeded sampler."""

import random
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from sparsify.data.corpora import Corpus
from sparsify.data.inputs import TokenInputs, hash_tokens
from sparsify.errors import DataError, UsageError

SAMPLERS = ("joined", "document", "random")
POOL = 24_000_000
"""Characters of text that `random` draws from: some 5 million tokens."""


MOST_NOISE = 2**31
"""Random token ids, of 8 bytes each, that are made for a model without tokenizer."""
REDRAWN = 64
"""How often samplers that draw may come back to the same text: more tokens than these times its characters are none."""


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what makes no token ids of text; None stands for a model of random weights, which has none.

    Raises:
        UsageError: it cannot be called.
    """
    if tokenizer is not None and not callable(tokenizer):
        fix = 'model, tokenizer = sparsify.load("smollm2-135m")'
        raise UsageError("A tokenizer is what makes token ids of text", got=repr(tokenizer)[:80], fix=fix)


@dataclass(frozen=True)
class Windows:
    """Which windows of which text.

    Attributes:
        text: the corpus.
        split: its split.
        seqlen: tokens per window.
        windows: how many; None for all.
        sampler: `joined` joins the documents by a blank line, tokenises once and cuts full windows in order;
            `document` is the papers': draw documents at random until one is longer than the window, take a random
            window inside it; `random` is GPTQ's: a window at a random place of the joined text. The seed has no effect
            on `joined`.
        stride: `joined` keeps every stride-th window; `random` draws from one of this many equal parts of the text...
        offset: ...starting at this one; this part.
        bos: whether a window begins with the beginning-of-text token: `true`, every one; `false`, none; `auto`, what
            the tokenizer adds to a text, as the papers have it (the first of joined windows, if it adds any).
            Models trained with one may need it: Gemma 3 270M's dense perplexity is 38.6 without and 19.3 with it.
    """

    text: Corpus
    split: str
    seqlen: int
    windows: int | None = None
    sampler: Literal["joined", "document", "random"] = "joined"
    stride: int = 1
    offset: int = 0
    bos: Literal["auto"] | bool = "auto"

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UsageError("Unknown sampler", got=self.sampler, allowed=", ".join(SAMPLERS))
        if self.seqlen < 2 or (self.windows is not None and self.windows < 1):
            raise UsageError(
                "A window has at least two tokens and there is at least one window",
                got=f"seqlen={self.seqlen}, windows={self.windows}",
                allowed="seqlen >= 2, windows >= 1 or null for all",
            )
        if self.bos != "auto" and not isinstance(self.bos, bool):
            raise UsageError("bos says who begins with a <bos> token", got=self.bos, allowed="auto, true, false")
        if self.stride < 1 or not 0 <= self.offset < self.stride:
            raise UsageError(
                "Every stride-th window, from the offset",
                got=f"stride={self.stride}, offset={self.offset}",
                allowed="stride >= 1, 0 <= offset < stride",
            )
        if self.sampler != "joined" and self.windows is None:
            raise UsageError(
                f"The {self.sampler} sampler draws a number of windows", got="windows=null", fix="windows=128"
            )

    @property
    def _special(self) -> bool:
        """Whether the tokenizer adds its special tokens to a text."""
        return self.bos == "auto"

    @property
    def protocol(self) -> str:
        """Tag that goes with every number measured on these windows.

        `W2@2048` is every window of 2,048 tokens, `sotu@512x16/32` sixteen of 512, one in 32; `-drawn` marks the
        document sampler, `-random` windows at random places.
        """
        short = {"wikitext2": "W2"}.get(self.text.name, self.text.name)
        split = "" if self.split == "test" else f"-{self.split}"
        count = "" if self.windows is None else f"x{self.windows}"
        skipped = f"/{self.stride}" + (f"+{self.offset}" if self.offset else "")
        every = skipped if self.sampler != "document" and self.stride > 1 else ""
        drawn = {"joined": "", "document": "-drawn", "random": "-random"}[self.sampler]
        begun = {"auto": "", True: "+bos", False: "-bos"}[self.bos]
        return f"{short}{split}@{self.seqlen}{count}{every}{drawn}{begun}"

    def inputs(self, tokenizer: Any, seed: int) -> TokenInputs:
        """Tokenise and take windows; the same seed gives the same ones.

        Raises:
            DataError: the text is too short.
        """
        if tokenizer is None:
            self._refuse_more_than(MOST_NOISE, "a random model")
            return self._noise(seed)
        documents = self.text.texts(self.split)
        if self.sampler != "joined":
            self._refuse_more_than(REDRAWN * sum(map(len, documents)), f"the text {self.text.name}")
        if self.bos is True:
            tokens = self._begun(documents, tokenizer, seed)
        else:
            tokens = self._draw(documents, tokenizer, seed)
        return TokenInputs(tokens, self.split, self._provenance(tokens))

    def _refuse_more_than(self, tokens: int, what: str) -> None:
        """Refuse a number of windows that nobody wants, before it fills the memory."""
        count = self.windows or 1
        if count * self.seqlen > tokens:
            raise DataError(
                f"These are more windows than {what} ({self.split} split) can give",
                got=f"windows={self.windows} of {self.seqlen} tokens",
                allowed=f"at most {tokens // self.seqlen}",
                fix="fewer windows, or a shorter seqlen",
            )

    def _draw(self, documents: list[str], tokenizer: Any, seed: int) -> Int[Tensor, "n seq"]:
        draw = {"joined": self._joined, "document": self._drawn, "random": self._placed}[self.sampler]
        return draw(documents, tokenizer, seed)

    def _begun(self, documents: list[str], tokenizer: Any, seed: int) -> Int[Tensor, "n seq"]:
        """Windows one token shorter without any special token, and <bos> in front of each."""
        if tokenizer.bos_token_id is None:
            raise UsageError("This tokenizer has no <bos> token", got="bos=true", fix="bos=auto")
        shorter = replace(self, seqlen=self.seqlen - 1, bos=False)._draw(documents, tokenizer, seed)
        return torch.nn.functional.pad(shorter, (1, 0), value=tokenizer.bos_token_id)

    def _joined(self, documents: list[str], tokenizer: Any, seed: int) -> Int[Tensor, "n seq"]:
        enough = None if self.windows is None else 12 * self.seqlen * (self.offset + self.stride * self.windows)
        ids = encode(tokenizer, "\n\n".join(_first(documents, enough)), self._special)
        full = ids[: len(ids) // self.seqlen * self.seqlen].view(-1, self.seqlen)
        chosen = full[self.offset :: self.stride][: self.windows]
        if len(chosen) == 0 or (self.windows is not None and len(chosen) < self.windows):
            raise DataError(
                f"The text {self.text.name} ({self.split} split) is too short",
                got=f"{len(ids)} tokens, {len(chosen)} windows of {self.seqlen} at every {self.stride}",
                allowed=f"at least {self.windows or 1} windows",
                fix="fewer windows, a shorter seqlen or a smaller stride",
            )
        return chosen.clone()

    def _placed(self, documents: list[str], tokenizer: Any, seed: int) -> Int[Tensor, "n seq"]:
        text = "\n\n".join(_first(documents, POOL))  # the same for every part
        ids = encode(tokenizer, text, self._special)
        part = ids.tensor_split(self.stride)[self.offset] if self.stride <= len(ids) else ids[:0]
        if len(part) < self.seqlen:
            raise DataError(
                f"The text {self.text.name} ({self.split} split) is too short",
                got=f"{len(part)} tokens in part {self.offset} of {self.stride}",
                allowed=f"at least {self.seqlen}",
                fix="a shorter seqlen or a smaller stride",
            )
        assert self.windows is not None  # __post_init__ refuses None for this sampler
        rng = random.Random(seed)
        starts = [rng.randint(0, len(part) - self.seqlen) for _ in range(self.windows)]
        return torch.stack([part[start : start + self.seqlen] for start in starts])

    def _drawn(self, documents: list[str], tokenizer: Any, seed: int) -> Int[Tensor, "n seq"]:
        rng = random.Random(seed)
        assert self.windows is not None  # __post_init__ refuses None for this sampler
        windows: list[Tensor] = []
        known: dict[int, Tensor] = {}  # a document may be drawn again and again; one file is one document
        for _ in range(200 * self.windows):
            drawn = rng.randint(0, len(documents) - 1)
            if drawn not in known:
                known[drawn] = encode(tokenizer, documents[drawn], self._special)
            ids = known[drawn]
            if len(ids) > self.seqlen:
                start = rng.randint(0, len(ids) - self.seqlen - 1)
                windows.append(ids[start : start + self.seqlen])
            if len(windows) == self.windows:
                return torch.stack(windows)
        raise DataError(
            f"Too few documents of {self.text.name} are longer than {self.seqlen} tokens",
            got=f"{len(windows)} windows after {200 * self.windows} draws from {len(documents)} documents",
            allowed=f"{self.windows} windows",
            fix="the joined sampler (sampler=joined), or a shorter seqlen",
        )

    def _noise(self, seed: int) -> TokenInputs:
        """Random ids for a model without tokenizer; only its speed and memory mean anything."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 1000, (self.windows or 64, self.seqlen), generator=generator)
        return TokenInputs(tokens, self.split, {"source": "random token ids", "tokens_sha256": hash_tokens(tokens)})

    def _provenance(self, tokens: Tensor) -> dict[str, Any]:
        return {
            **self.text.fingerprint(self.split),
            "sampler": self.sampler,
            "windows": len(tokens),
            "seqlen": self.seqlen,
            "bos": self.bos,
            "tokens_sha256": hash_tokens(tokens),
        }


def _first(documents: list[str], characters: int | None) -> list[str]:
    """The first documents that hold this many characters, 12 for every token needed: a shard has far more."""
    if characters is None:
        return documents
    for count, length in enumerate(accumulate(len(text) for text in documents), start=1):
        if length >= characters:
            return documents[:count]
    return documents


def encode(tokenizer: Any, text: str, special: bool = True) -> Int[Tensor, " n"]:
    """Token ids with whatever beginning-of-text token the tokenizer adds, as the papers do; or without."""
    # verbose=False: text longer than the model's context is what we cut windows from.
    options = {} if special else {"add_special_tokens": False}
    return torch.tensor(tokenizer(text, verbose=False, **options)["input_ids"], dtype=torch.long)
