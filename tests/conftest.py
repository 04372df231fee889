"""Fixtures shared by all tests. sparsify is imported inside them, after jaxtyping's hook is in place."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_table():
    """A layer table from the (out, inp) shapes of the matrices of each block."""
    from sparsify.types import LayerSpec, LayerTable

    def make(*blocks):
        return LayerTable(
            tuple(
                LayerSpec(f"blocks.{i}.layer{j}", i, f"layer{j}", out, inp)
                for i, shapes in enumerate(blocks)
                for j, (out, inp) in enumerate(shapes)
            )
        )

    return make


@pytest.fixture(scope="session")
def make_model():
    """A two-block LLaMA with weights large enough for attention and ranks to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**options):
        sizes = {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
        }
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(sizes | options))).eval()

    return make


@pytest.fixture
def tokens():
    return torch.randint(0, 96, (5, 12), generator=torch.Generator().manual_seed(1))
