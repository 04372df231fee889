"""Samples to train on: prompts, what counts, and what is refused at its line."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from sparsify.data.corpora import Corpus
from sparsify.data.examples import Examples, as_examples
from sparsify.data.inputs import Inputs, TokenInputs
from sparsify.data.mixture import Mixture
from sparsify.data.samples import Samples, alpaca_prompt
from sparsify.data.windows import Windows
from sparsify.errors import DataError, UsageError
from sparsify.runs import menu, registry, request

COLUMNS = ("instruction", "input", "output")
CPU = torch.device("cpu")
BOS, EOS, PAIR = 1, 2, 3
ADD = {"instruction": "Add.", "input": "1 2", "output": "3"}
GREET = {"instruction": "Greet.", "input": "", "output": "Hello there"}


class Letters:
    """A tokenizer: a beginning-of-text 1, then a token per character; `:\\n` before an `x` is taken with it, as one."""

    bos_token_id, eos_token_id = BOS, EOS

    def __init__(self, ends=False):
        self.ends = ends

    def __call__(self, text, verbose=True, add_special_tokens=True):
        text = text.replace("\nx", chr(PAIR))
        return {"input_ids": [BOS, *map(ord, text), *([EOS] if self.ends else [])]}


@pytest.fixture
def rows(tmp_path):
    """Writes rows, as JSON lines, and names them as a text."""

    def write(*rows, columns=COLUMNS, name="rows.jsonl"):
        file = tmp_path / name
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return Corpus("mine", path=str(file), columns=columns)

    return write


def numbered(count):
    return [{"text": f"row {i:02}"} for i in range(count)]


def texts(examples):
    return ["".join(map(chr, ids[1:].tolist())).removesuffix(chr(EOS)) for ids in examples.ids]


# What a sample is


def test_the_prompt_is_alpacas():
    assert alpaca_prompt("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert alpaca_prompt("Greet.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet.\n\n### Response:\n"
    )


@pytest.mark.parametrize("ends", [False, True])
def test_a_row_is_its_prompt_its_answer_and_the_end(rows, ends):
    examples = Samples(rows(ADD, GREET), order="first").inputs(Letters(ends), 0)
    prompts = [alpaca_prompt("Add.", "1 2"), alpaca_prompt("Greet.")]
    assert [ids.tolist() for ids in examples.ids] == [
        [BOS, *map(ord, prompts[0] + "3"), EOS],
        [BOS, *map(ord, prompts[1] + "Hello there"), EOS],
    ]
    assert examples.starts == (1, 1)
    answers = Samples(rows(ADD, GREET), order="first", count="answers").inputs(Letters(ends), 0)
    assert answers.starts == (1 + len(prompts[0]), 1 + len(prompts[1]))
    assert [ids[start:].tolist() for ids, start in zip(answers.ids, answers.starts, strict=True)] == [
        [ord("3"), EOS],
        [*map(ord, "Hello there"), EOS],
    ]


def test_a_token_that_spans_the_end_of_the_prompt_is_of_the_answer(rows):
    examples = Samples(rows(GREET | {"output": "xy"}), count="answers").inputs(Letters(), 0)
    assert examples.ids[0][examples.starts[0] :].tolist() == [PAIR, ord("y"), EOS]


def test_a_row_of_one_column_is_a_text(rows):
    examples = Samples(rows({"text": "abc"}, columns=("text",))).inputs(Letters(), 0)
    assert (examples.ids[0].tolist(), examples.starts) == ([BOS, 97, 98, 99, EOS], (1,))


def test_what_is_too_long_is_cut_at_the_end(rows):
    size = 1 + len(alpaca_prompt("Greet."))
    whole = Samples(rows(GREET)).inputs(Letters(), 0).ids[0]
    for longest in (size + 1, size + 5, len(whole) - 1, len(whole)):
        ids = Samples(rows(GREET), longest=longest).inputs(Letters(), 0).ids[0]
        assert torch.equal(ids, whole[:longest])
    for count in ("text", "answers"):
        with pytest.raises(DataError, match=rf"no room.*rows\.jsonl, line 1: {size} tokens.*longest={size + 1}"):
            Samples(rows(GREET), longest=size, count=count).inputs(Letters(), 0)


# Which rows


def test_the_first_rows_come_in_order(rows):
    text = rows(*numbered(9), columns=("text",))
    first = Samples(text, samples=3, order="first")
    assert texts(first.inputs(Letters(), 0)) == texts(first.inputs(Letters(), 5)) == ["row 00", "row 01", "row 02"]


def test_random_rows_are_drawn_once_each_by_the_seed(rows):
    text = rows(*numbered(30), columns=("text",))
    one, again, other = (texts(Samples(text, samples=12).inputs(Letters(), seed)) for seed in (0, 0, 1))
    assert one == again != other
    assert len(set(one)) == 12
    everything = texts(Samples(text).inputs(Letters(), 0))
    assert sorted(everything) == [row["text"] for row in numbered(30)] != everything


@pytest.mark.parametrize("order", ["first", "random"])
def test_more_samples_than_rows_are_refused(rows, order):
    text = rows(ADD, GREET)
    with pytest.raises(DataError, match=r"samples=3, 2 rows.*Fix: samples=2"):
        Samples(text, samples=3, order=order).inputs(Letters(), 0)


def test_a_model_without_tokenizer_gets_seeded_noise(rows):
    samples = Samples(rows(ADD), samples=4, longest=8)
    one, again, other = (samples.inputs(None, seed) for seed in (0, 0, 1))
    assert (len(one), one.length) == (4, 8)
    assert one.digest == again.digest != other.digest
    with pytest.raises(DataError, match="more samples than a random model"):
        replace(samples, samples=2**40).inputs(None, 0)


def test_provenance_names_text_choice_and_tokens(rows):
    one, other = (Samples(rows(ADD, GREET), samples=1).inputs(Letters(), seed).provenance for seed in (0, 1))
    said = {"corpus": "mine", "samples": 1, "longest": 1024, "order": "random", "count": "text"}
    assert said.items() <= one.items()
    assert {"sha256", "tokens_sha256", "tokens"} <= set(one)
    assert one["tokens_sha256"] != other["tokens_sha256"]


# What is refused


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ADD | {"output": ""}, "no answer"),
        (ADD | {"output": " \n"}, "no answer"),
        (ADD | {"output": None}, "no answer"),
        (ADD | {"instruction": ""}, "no instruction"),
        (ADD | {"output": 3}, "holds no text"),
        ({"instruction": "Add.", "input": ""}, "no such column"),
        ('{"instruction": "Add.", "inp', "no JSON"),
        ("[1]", "no object"),
    ],
)
def test_a_row_that_is_no_sample_is_refused_with_its_line(rows, row, said):
    text = rows(ADD, "", row, GREET)  # blank lines count as lines
    for seed in range(3):  # drawn or not
        with pytest.raises(DataError, match=rf"{said}.*rows\.jsonl, line 3"):
            Samples(text, samples=1).inputs(Letters(), seed)
    assert len(Samples(text, samples=1, order="first").inputs(Letters(), 0)) == 1  # not read so far


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_rows_of_arrays_and_parquet_are_named_by_number(rows, tmp_path, kind):
    file = tmp_path / f"rows.{kind}"
    broken = [ADD, ADD | {"output": ""}]
    if kind == "json":
        file.write_text(json.dumps(broken, indent=1))
    else:
        pq.write_table(pa.Table.from_pylist(broken), file)
    with pytest.raises(DataError, match=rf"no answer.*rows\.{kind}, row 2"):
        Samples(Corpus("mine", path=str(file), columns=COLUMNS)).inputs(Letters(), 0)


def test_a_text_without_rows_is_refused(tmp_path, rows):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(DataError, match=r"no rows.*a\.txt.*jsonl"):
        Samples(Corpus("mine", path=str(tmp_path / "a.txt"))).inputs(Letters(), 0)
    with pytest.raises(DataError, match="mine is empty"):
        Samples(rows("")).inputs(Letters(), 0)
    with pytest.raises(DataError, match="no text"):
        Samples(rows({"text": " "}, columns=("text",))).inputs(Letters(), 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 0}, "samples"),
        ({"longest": 1}, "longest"),
        ({"text": Corpus("mine", columns=("a", "b"))}, "1 or 3 columns"),
        ({"text": Corpus("mine"), "count": "answers"}, "3 columns"),
    ],
)
def test_samples_that_make_no_sense_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        Samples(**({"text": Corpus("mine", columns=COLUMNS)} | options))


def test_a_tokenizer_without_end_is_refused(rows):
    tokenizer = Letters()
    tokenizer.eos_token_id = None
    with pytest.raises(UsageError, match=r"<eos>.*windows"):
        Samples(rows(ADD)).inputs(tokenizer, 0)


# Examples


@pytest.fixture
def examples():
    generator = torch.Generator().manual_seed(3)
    ids = tuple(torch.randint(0, 96, (size,), generator=generator) for size in (9, 4, 17, 2))
    return Examples(ids, (1, 3, 8, 1), "train", {"source": "here"})


def test_examples_are_inputs(examples):
    assert isinstance(examples, Inputs)
    assert (len(examples), examples.length) == (4, 17)
    batch = examples.batch(slice(0, 2), CPU)
    assert batch["input_ids"].tolist() == [examples.ids[0].tolist(), [*examples.ids[1].tolist(), 0, 0, 0, 0, 0]]
    assert batch["use_cache"] is False
    assert torch.equal(examples.probe(CPU)["input_ids"], examples.ids[0][None, :2])
    assert [len(ids) for ids in examples.take(slice(2, None)).few().ids] == [16, 2]
    assert Examples(examples.ids[2:3], (16,)).few().starts == (15,)


def test_counted_positions_are_from_the_start_to_the_end(examples):
    assert examples.counted(slice(0, 3), CPU).int().tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]


def test_examples_are_taken_with_their_starts(examples):
    for taken in (examples.take([2, 0]), examples.take(slice(2, None, -2))):
        assert taken.starts == (8, 1)
        assert torch.equal(taken.ids[0], examples.ids[2])
        assert (taken.split, taken.provenance) == ("train", {"source": "here"})


def test_equal_examples_have_equal_digests(examples):
    assert examples.digest == Examples(tuple(ids.clone() for ids in examples.ids), examples.starts).digest
    joined = torch.cat(examples.ids)
    others = [
        replace(examples, starts=(1, 3, 9, 1)),
        examples.take([0, 2, 1, 3]),
        Examples((joined[:8], joined[8:13], joined[13:30], joined[30:]), examples.starts),  # the same tokens
    ]
    assert len({examples.digest, *(other.digest for other in others)}) == 4


def mean_loss(model, examples, size):
    """Mean over all counted tokens, so many examples at a time."""
    total = count = 0
    for start in range(0, len(examples), size):
        where = slice(start, start + size)
        batch, counted = examples.batch(where, CPU), examples.counted(where, CPU)[:, 1:]
        losses = F.cross_entropy(model(**batch).logits[:, :-1].mT, batch["input_ids"][:, 1:], reduction="none")
        total, count = total + losses[counted].sum().item(), count + int(counted.sum())
    return total / count


@torch.no_grad()
def test_padding_changes_no_loss(make_model, examples):
    model = make_model()
    one, two, four = (mean_loss(model, examples, size) for size in (1, 2, 4))
    assert one == pytest.approx(two, rel=1e-6)
    assert one == pytest.approx(four, rel=1e-6)
    alone = [
        F.cross_entropy(model(ids[None]).logits[0, start - 1 : -1], ids[start:], reduction="sum").item()
        for ids, start in zip(examples.ids, examples.starts, strict=True)
    ]
    assert one == pytest.approx(sum(alone) / (8 + 1 + 9 + 1), rel=1e-6)


@pytest.mark.parametrize("starts", [(1,), (0, 1), (1, 2)])
def test_an_example_predicts_something(starts):
    with pytest.raises(UsageError):
        Examples((torch.arange(3), torch.arange(2)), starts)


def test_windows_are_examples_of_which_all_is_predicted(tokens, examples):
    made = as_examples(TokenInputs(tokens, "train", {"source": "ids"}))
    assert (len(made), made.length, made.starts, made.split) == (5, 12, (1,) * 5, "train")
    assert torch.equal(made.batch(slice(0, 5), CPU)["input_ids"], tokens)
    assert made.counted(slice(0, 5), CPU).tolist() == [[False] + [True] * 11] * 5
    assert as_examples(examples) is examples


def test_other_inputs_are_no_examples(tokens):
    class Images(TokenInputs.__mro__[1]):
        split, length, provenance, digest = "train", 1, {}, ""
        __len__ = take = batch = probe = few = lambda self, *_: 1

    with pytest.raises(UsageError, match="Training needs a text"):
        as_examples(Images())


# The section of the config


@pytest.mark.parametrize(
    ("overrides", "kind", "text"),
    [
        ([], Windows, "sotu"),
        (["scale=paper"], Samples, "alpaca_gpt4"),
        (["scale=paper", "data@tuning.text=c4", "heldout.split=validation"], Samples, "c4"),
        (["data@tuning.text=wikitext2"], Windows, "wikitext2"),
    ],
)
def test_every_scale_has_a_text_to_train_on(overrides, kind, text):
    config = menu.compose(overrides)
    request.check(config)
    made = registry.make(config["tuning"], "tuning")
    assert (type(made), made.text.name) == (kind, text)
    assert (made.text.name, made.split) != (config["heldout"]["text"]["name"], config["heldout"]["split"])


@pytest.mark.parametrize(("option", "said"), [("order=last", "first, random"), ("count=answer", "count=answers")])
def test_a_choice_that_there_is_not_is_refused(option, said):
    config = menu.compose(["scale=paper", f"tuning.{option}"])
    with pytest.raises(UsageError, match=said):
        registry.make(config["tuning"], "tuning")


def test_a_config_may_have_no_text_to_train_on_but_no_other_thing():
    config = menu.compose([])
    request.check(config | {"tuning": None})
    request.check({key: value for key, value in config.items() if key != "tuning"})
    with pytest.raises(UsageError, match="tuning"):
        request.check(config | {"tuning": 5})
    with pytest.raises(UsageError, match=r"data@tuning\.text"):
        request.check(config | {"tuning": {"text": None}})


# Several texts


def test_a_mixture_has_all_examples_of_its_parts_in_an_order_of_its_own(rows):
    first = Samples(rows(*numbered(6), columns=("text",), name="a.jsonl"), order="first")
    second = Windows(rows({"text": "x" * 90}, columns=("text",), name="b.jsonl"), "train", 10, sampler="joined")
    mixture = Mixture({"a": first, "b": second})
    mixed = mixture.inputs(Letters(), seed=3)
    parts = [first.inputs(Letters(), 3), as_examples(second.inputs(Letters(), 3))]
    wanted = [tuple(ids.tolist()) for part in parts for ids in part.ids]
    assert sorted(tuple(ids.tolist()) for ids in mixed.ids) == sorted(wanted)
    assert [tuple(ids.tolist()) for ids in mixed.ids] != wanted
    assert mixed.digest == mixture.inputs(Letters(), seed=3).digest != mixture.inputs(Letters(), seed=4).digest
    assert set(mixed.provenance["parts"]) == {"a", "b"}
    with pytest.raises(UsageError, match="parts"):
        Mixture({})
