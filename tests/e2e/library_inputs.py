"""Calls of the library with what people hand over by mistake; prints those that do not end in a `SparsifyError`."""

import sys
import warnings
from functools import partial
from pathlib import Path

import torch

import sparsify
from sparsify.allocators.owl import OWL
from sparsify.errors import SparsifyError, UnexpectedError

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import FAMILIES

NAN = float("nan")
MODEL = FAMILIES["llama"].build()
TOKENS = torch.randint(3, 90, (4, 16))


class Letters:
    """A tokenizer."""

    bos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [3 + ord(letter) % 80 for letter in text]}


PRUNE = {
    "model": (42, None, torch.nn.Linear(3, 3)),
    "tokens": (
        *(None, [[1, 2]], "text", {"input_ids": TOKENS}, TOKENS.float(), TOKENS[0], TOKENS[None], TOKENS[:0]),
        *(TOKENS > 3, TOKENS.numpy(), TOKENS[:, :0], -TOKENS, TOKENS + 1000),
    ),
    "sparsity": (NAN, 1.0, -0.1, 50, "abc", None, [0.5], True, {}, torch.tensor([0.1, 0.2])),
    "pattern": ("3:2", "0:4", None, 2.4, [2, 4], "", "2:4:8", "7:9"),
    "pruner": (
        *(None, 42, "wnada", ["wanda"], ("wanda",), ("wanda", {}, 3), ("wanda", 5), ("wanda", {"group": 5}), "../x"),
        *(("wanda", {5: 5}), {"name": "wanda"}, OWL, OWL(), (5, {}), ("", {}), (None, None)),
    ),
    "allocator": (
        *(None, 42, "owll", ("owl", {"M": "abc"}), ("owl", {"M": -1}), ("owl", {"lamm": 1}), ("atp", {"beta": 3.0})),
        *(("absorption", {"inner": object()}), ("absorption", {"inner": "owl"}), "from_file", "search"),
        *(("from_file", {"file": "/nothing"}), ("search", {"trials": 0}), ("equimarginal", {"steps": 1.5})),
    ),
    "method": (None, 42, "x", ("oneshot", {"regime": "x"})),
    "recovery": (42, "x"),
    "objective": (None, 42, "x"),
    "part": (42, "x", "", []),
    "seed": (-1, 2**70, 1.5, "abc", None, True),
    "batch_size": (0, -1, 1.5, "abc", True),
    "heldout": (42, "x", [1]),
}
LOAD = {
    "source": (None, 42, "", "nothing", "no/thing", ["a"], "/nothing/here", "./nothing", "../x", "a/b/c"),
    "dtype": (None, "float8", 16, torch.float16, []),
    "device": (None, "cpuu", 5, [], "cuda:99", "meta"),
}
PERPLEXITY = {
    "model": PRUNE["model"],
    "tokens": (*PRUNE["tokens"], TOKENS[:, :1]),
    "batch_size": PRUNE["batch_size"],
}
WINDOWS = {
    "tokenizer": (42, "gpt2"),
    "corpus": ("nothing", None, 5, "", "/nothing.txt", "/tmp", ["sotu"]),
    "split": ("nothing", None, 5),
    "n": (0, -1, 1.5, "a", None, 10**9, 10**30),
    "seqlen": (0, 1, -5, 1.5, "a", None, 10**9),
    "sampler": ("x", None, 5),
    "bos": ("maybe", None, 5, True),
    "seed": (-1, 1.5, "abc", None, 2**70),
}
CALLS = (
    (sparsify.prune, {"model": MODEL, "tokens": TOKENS, "allocator": "uniform", "sparsity": 0.5}, PRUNE),
    (sparsify.load, {"source": "shape/tiny"}, LOAD),
    (sparsify.perplexity, {"model": MODEL, "tokens": TOKENS}, PERPLEXITY),
    (sparsify.windows, {"tokenizer": Letters(), "corpus": "sotu", "n": 2, "seqlen": 32}, WINDOWS),
)


def outcome(call):
    """What is wrong with how a call ends; nothing if it ends as it should."""
    try:
        call()
    except SparsifyError as error:
        said = str(error)
        return "" if "\n" not in said and not isinstance(error, UnexpectedError) else said
    except Exception as error:
        return repr(error)
    return "accepted"


def main():
    """Exit 1 and a line for every call that ends otherwise."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}
    faults = rows = 0
    for function, good, table in CALLS:
        for name, values in table.items():
            for value in values:
                rows += 1
                other = {"allocator": "atp"} if name == "heldout" else {}
                if wrong := outcome(partial(function, **{**good, **other, name: value})):
                    faults += 1
                    print(f"{function.__name__}({name}={value!r}): {wrong}"[:400])
    if any(not torch.equal(before[name], tensor) for name, tensor in MODEL.state_dict().items()):
        print("a call that was refused changed the model")
        faults += 1
    return int(faults > 0 or rows < 100)


if __name__ == "__main__":
    sys.exit(main())
