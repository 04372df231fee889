"""Text that the dense model writes: first tokens at random, then the likeliest, then what it draws."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify.cells.bench import Bench
from sparsify.data.corpora import Corpus
from sparsify.data.generated import Generated
from sparsify.data.mixture import Mixture
from sparsify.data.windows import Windows
from sparsify.errors import UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.sources import Loaded

VOCABULARY, BOS, EOS = 40, 1, 2


class Tokenizer:
    """Puts <bos> before a text, as LLaMA's does."""

    bos_token_id, eos_token_id, all_special_ids = BOS, EOS, [0, BOS, EOS]

    def __len__(self):
        return VOCABULARY

    def __call__(self, text, verbose=True, add_special_tokens=True):
        return {"input_ids": [BOS, *map(ord, text)]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)
    return LlamaForCausalLM(config).eval()


def ids_of(examples):
    return [row.tolist() for row in examples.ids]


def test_the_same_seed_writes_the_same_text_and_draws_of_others_go_on(model):
    spec = Generated(samples=5, length=12, greedy=2, batch=2)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = spec.inputs(Tokenizer(), 3, model)
    assert torch.equal(torch.rand(3), expected)
    assert ids_of(first) == ids_of(spec.inputs(Tokenizer(), 3, model)) != ids_of(spec.inputs(Tokenizer(), 4, model))
    assert (len(first), first.provenance["source"]) == (5, "the dense model")


def test_a_text_begins_with_bos_and_a_plain_token_and_goes_on_with_the_likeliest(model):
    for row in Generated(samples=20, length=9, greedy=3).inputs(Tokenizer(), 0, model).ids:
        assert row[0] == BOS
        assert row[1] not in Tokenizer.all_special_ids
        for place in range(2, min(5, len(row))):
            assert row[place] == model(row[None, :place]).logits[0, -1].argmax()


def test_a_text_ends_with_eos_or_at_its_length(model):
    rows = ids_of(Generated(samples=60, length=30, greedy=0).inputs(Tokenizer(), 0, model))
    assert all(len(row) == 30 or row[-1] == EOS for row in rows)
    assert all(EOS not in row[2:-1] for row in rows)
    assert {len(row) == 30 for row in rows} == {True, False}


def test_what_is_drawn_has_the_frequencies_of_the_model(model):
    rows = Generated(samples=4000, length=3, greedy=0, batch=4000).inputs(None, 0, model).ids
    chosen = [row for row in rows if row[0] == 5]
    wanted = model(torch.tensor([[5]])).logits[0, -1].softmax(dim=0)
    drawn = torch.bincount(torch.stack(chosen)[:, 1], minlength=VOCABULARY) / len(chosen)
    assert (drawn - wanted).abs().max() < 4 * (wanted.max() / len(chosen)) ** 0.5
    flat = Generated(samples=4000, length=3, greedy=0, batch=4000, temperature=10.0).inputs(None, 0, model).ids
    assert ids_of(SimpleNamespace(ids=flat)) != ids_of(SimpleNamespace(ids=rows))


def test_a_mixture_hands_the_model_on(model, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("ab" * 40)
    windows = Windows(Corpus("mine", path=str(file), columns=("text",)), "train", 8, sampler="joined")
    written = Generated(samples=3, length=9)
    mixed = Mixture({"text": windows, "own": written})
    assert mixed.reads_model
    assert not Mixture({"text": windows}).reads_model
    made = ids_of(mixed.inputs(Tokenizer(), 1, model))
    assert all(row in made for row in ids_of(written.inputs(Tokenizer(), 1, model)))
    assert len(made) > 3


def test_a_cell_has_the_dense_model_write_even_after_pruning(model):
    spec = Generated(samples=4, length=10)
    wanted = ids_of(spec.inputs(None, 0, model))
    bench = Bench(Loaded(model, None), BlockView(model))
    _ = bench.dense
    with torch.no_grad():
        for layer in bench.view.layers:
            layer.write(torch.zeros_like(layer.weight))
    try:
        assert ids_of(bench.inputs(spec, 0)) == wanted
        assert all(not layer.weight.any() for layer in bench.view.layers)
    finally:
        bench.restore()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 0}, "samples"),
        ({"length": 4, "greedy": 3}, "greedy <= 2"),
        ({"temperature": 0.0}, "temperature"),
        ({"batch": 0}, "batch"),
    ],
)
def test_values_that_cannot_be_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        Generated(**options)


def test_a_model_that_cannot_write_as_long_or_at_all_is_refused(model):
    with pytest.raises(UsageError, match="at most 64"):
        Generated(samples=1, length=65).inputs(None, 0, model)
    with pytest.raises(UsageError, match="Only a transformers model"):
        Generated(samples=1).inputs(None, 0, torch.nn.Linear(2, 2))
