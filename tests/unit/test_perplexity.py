import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import sparsify
from sparsify.errors import DataError, NumericsError
from sparsify.model import objective as module

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(family, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | options)))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.5)
    return model.to(dtype).eval()


def by_labels(model, tokens):
    """The mean of the model's own loss over windows, exponentiated."""
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in tokens]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        ("opt", {"word_embed_proj_dim": 32}),
        pytest.param("cohere", {"logit_scale": 0.25}),
        pytest.param("granite", {"logits_scaling": 8.0}),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_it_is_the_models_own_loss(family, options, batch_size, tokens):
    model = build(family, **options)
    measured = sparsify.perplexity(model, tokens, batch_size=batch_size)
    assert measured == pytest.approx(by_labels(model, tokens), rel=1e-5)


def test_the_soft_cap_matters_to_the_test_above(tokens):
    capped, free = (build("gemma2", head_dim=8, final_logit_softcapping=cap) for cap in (3.0, None))
    assert sparsify.perplexity(capped, tokens) < 0.9 * sparsify.perplexity(free, tokens)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_slices_of_logits_do_not_change_it(size, tokens, make_model, monkeypatch):
    model = make_model()
    whole = sparsify.perplexity(model, tokens)
    monkeypatch.setattr(module, "SLICE", size)
    assert sparsify.perplexity(model, tokens) == pytest.approx(whole, rel=1e-6)


def test_half_precision_logits_are_summed_in_full_precision(tokens):
    model = build("llama", torch.bfloat16)
    assert sparsify.perplexity(model, tokens) == pytest.approx(by_labels(model, tokens), rel=2e-2)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1)])
def test_nothing_to_predict_is_refused(shape, make_model):
    with pytest.raises(DataError):
        sparsify.perplexity(make_model(), torch.zeros(shape, dtype=torch.long))


def test_a_nan_is_an_error_not_a_number(tokens, make_model):
    model = make_model()
    model.lm_head.weight.data[3, 3] = math.nan
    with pytest.raises(NumericsError):
        sparsify.perplexity(model, tokens)


def test_an_overflow_is_an_error_not_infinity(tokens, make_model):
    model = make_model()
    model.lm_head.weight.data.mul_(1e6)
    with pytest.raises(NumericsError):
        sparsify.perplexity(model, tokens)
