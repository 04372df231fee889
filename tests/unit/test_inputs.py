"""Inputs that are no text, other losses, and models of several towers."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn import functional as F

import sparsify
from sparsify.data.inputs import Inputs, TokenInputs, as_inputs, batches, first
from sparsify.errors import DataError, UnsupportedModelError, UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.objective import Objective, mean_loss
from sparsify.model.walk import Walk


@dataclass(frozen=True, eq=False)
class Embedded:
    """Sequences of vectors with a class each, as images would be: no token in sight."""

    vectors: torch.Tensor
    classes: torch.Tensor
    split: str = "train"
    provenance: dict = field(default_factory=lambda: {"source": "vectors"})

    @property
    def length(self):
        return self.vectors.shape[1]

    @property
    def digest(self):
        return str(float(self.vectors.double().sum()))

    def __len__(self):
        return len(self.vectors)

    def take(self, which):
        return type(self)(self.vectors[which], self.classes[which], self.split)

    def batch(self, where, device):
        return {"inputs_embeds": self.vectors[where].to(device), "labels": self.classes[where].to(device)}

    def probe(self, device):
        return {"inputs_embeds": self.vectors[:1].to(device)}

    def few(self):
        return self.take(slice(0, 2))


class Labelless(Embedded):
    """For the walk, which calls the model without labels."""

    def batch(self, where, device):
        return {"inputs_embeds": self.vectors[where].to(device)}


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of a class read off the last position."""

    version: int = 1

    def prepare(self, model, inputs):
        return self.loss

    def loss(self, model, batch):
        states = model.base_model(inputs_embeds=batch["inputs_embeds"], use_cache=False).last_hidden_state[:, -1]
        return F.cross_entropy(states[:, :4].float(), batch["labels"], reduction="sum").double()

    def predictions(self, inputs):
        return len(inputs)


@pytest.fixture
def embedded(tokens, make_model):
    vectors = make_model().model.embed_tokens(tokens).detach()
    return Embedded(vectors, torch.tensor([0, 1, 2, 3, 0]))


def test_inputs_and_objectives_are_protocols(embedded, tokens):
    assert isinstance(embedded, Inputs)
    assert isinstance(TokenInputs(tokens), Inputs)
    assert isinstance(Classification(), Objective)


def test_a_walk_over_vectors_is_that_over_the_tokens_they_embed(make_model, embedded, tokens):
    view = BlockView(make_model())
    one = Walk(view, tokens, 2)
    other = Walk(view, Labelless(embedded.vectors, embedded.classes), 2)
    for block in range(2):
        one.advance(block)
        other.advance(block)
    assert torch.equal(one.hidden, other.hidden)


def test_other_inputs_prune_and_other_losses_choose(make_model, embedded, tokens):
    inputs = Labelless(embedded.vectors, embedded.classes)
    by_tokens, by_vectors = make_model(), make_model()
    sparsify.prune(by_tokens, tokens, sparsity=0.5)
    sparsify.prune(by_vectors, inputs, sparsity=0.5)
    for a, b in zip(by_tokens.parameters(), by_vectors.parameters(), strict=True):
        assert torch.equal(a, b)
    model = make_model()
    allocator = ("atp", {"step": 0.2})
    result = sparsify.prune(
        model, inputs, allocator=allocator, sparsity=0.5, heldout=embedded, objective=Classification()
    )
    best = min(t["heldout_perplexity"] for t in result.plan.trials)
    assert math.exp(mean_loss(model, embedded, Classification())) == pytest.approx(best)


def test_the_descent_follows_any_loss(make_model, embedded):
    inputs = Labelless(embedded.vectors, embedded.classes)
    allocator = ("equimarginal", {"steps": 5, "settle_every": 2, "batch": 2})
    result = sparsify.prune(
        make_model(), inputs, allocator=allocator, sparsity=0.5, heldout=embedded, objective=Classification()
    )
    assert len(result.plan.trials) == 4


def test_token_inputs_are_cut_by_samples(tokens):
    inputs = TokenInputs(tokens, "train", {"source": "ids"})
    assert (len(inputs), inputs.length) == (5, 12)
    assert [s.stop - s.start for s in batches(inputs, 2)] == [2, 2, 1]
    assert torch.equal(inputs.take([3, 0]).tokens, tokens[[3, 0]])
    assert torch.equal(first(inputs, 2).tokens, tokens[:2])
    assert len(first(inputs, None)) == 5
    assert inputs.take(slice(1, 2)).split == "train"
    assert inputs.digest == TokenInputs(tokens.clone()).digest != TokenInputs(tokens + 1).digest
    assert inputs.digest != TokenInputs(tokens.reshape(10, 6)).digest


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (torch.zeros(0, 4, dtype=torch.long), DataError),
        (torch.zeros(3, 1, dtype=torch.long), DataError),
        (torch.zeros(4, dtype=torch.long), DataError),
        (torch.zeros(2, 4), UsageError),
        ([[1, 2, 3]], UsageError),
        ("text", UsageError),
    ],
)
def test_what_is_no_batch_of_windows_is_refused(given, error):
    with pytest.raises(error):
        as_inputs(given, 2)


# Towers


@pytest.fixture(scope="module")
def llava():
    """A tiny LLaVA whose vision tower is larger than its language model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=5, **sizes)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    text = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, **sizes)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=95)
    ).eval()


def test_the_decoder_is_pruned_where_there_are_several_towers(llava, tokens):
    view = BlockView(llava)
    assert (len(view.blocks), {"language_model" in x.spec.name for x in view.layers}) == (2, {True})
    text = tokens.clamp(max=90)
    walk = Walk(view, text, 2)
    for block in range(2):
        walk.advance(block)
    states = llava.base_model(text).last_hidden_state
    torch.testing.assert_close(llava.base_model.language_model.norm(walk.hidden), states)
    dense = view.snapshot()
    assert sparsify.prune(llava, text, sparsity=0.5).sparsity == pytest.approx(0.5, abs=0.02)
    assert all("language_model" in name for name in dense.changed())
    view.restore(dense)


def test_a_part_names_its_tower(llava, tokens):
    vision, language = BlockView(llava, "vision"), BlockView(llava, "language")
    assert (len(vision.blocks), len(language.blocks)) == (5, 2)
    assert BlockView(llava, "model.vision_tower").table == vision.table
    with pytest.raises(UsageError, match=r"model\.vision_tower"):
        BlockView(llava, "audio")
    with pytest.raises(UnsupportedModelError, match="part=language"):
        Walk(vision, tokens.clamp(max=90))


def test_a_language_model_is_its_own_language_part(make_model):
    model = make_model()
    assert BlockView(model, "language").table == BlockView(model).table
    with pytest.raises(UsageError, match="leave part out"):
        BlockView(model, "vision")
