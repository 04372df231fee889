"""Tiny random models of every supported family, with what is known of their blocks."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = COMMON | {"intermediate_size": 48, "num_hidden_layers": 3, "num_key_value_heads": 2}
GEMMA = LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}

SEPARATE = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
FUSED = [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}]


@dataclass(frozen=True)
class Family:
    """A transformers model type.

    Attributes:
        inputs: last parts of the names of a block's layers, grouped by the input they share, in forward order.
        blocks: number of blocks.
    """

    type: str
    inputs: list[set[str]]
    blocks: int = 3
    options: dict[str, Any] = field(default_factory=lambda: dict(LLAMA))

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model, in eval mode, with weights large enough for a wrong mask or position to show."""
        config = AutoConfig.for_model(self.type, **self.options)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim >= 2:
                    weight.normal_(0, 0.3)
        return model.to(dtype).eval()


FAMILIES = {
    "llama": Family("llama", SEPARATE),
    "mistral": Family("mistral", SEPARATE, options=LLAMA | {"sliding_window": 5}),
    "qwen2": Family("qwen2", SEPARATE),
    "qwen3": Family("qwen3", SEPARATE, options=LLAMA | {"head_dim": 8}),
    "phi3": Family("phi3", [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}]),
    "gemma2": Family("gemma2", SEPARATE, options=GEMMA),
    "gemma3": Family(
        "gemma3_text",
        SEPARATE,
        4,
        GEMMA | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "opt": Family(
        "opt",
        [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}],
        options=COMMON
        | {"ffn_dim": 48, "num_hidden_layers": 3, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
    ),
    "gpt2": Family(
        "gpt2",
        [{"c_attn"}, {"attn.c_proj"}, {"c_fc"}, {"mlp.c_proj"}],
        2,
        {
            "vocab_size": VOCABULARY,
            "n_positions": 32,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": Family("gpt_neox", FUSED, options=COMMON | {"intermediate_size": 48, "num_hidden_layers": 3}),
    "bloom": Family("bloom", FUSED, options=COMMON | {"n_layer": 3, "n_head": 4}),
    "falcon": Family(
        "falcon",
        [{"query_key_value", "dense_h_to_4h"}, {"dense"}, {"dense_4h_to_h"}],
        options=COMMON | {"num_hidden_layers": 3, "multi_query": True},
    ),
}
MOE = LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}
MIXTURES = {
    "mixtral": Family("mixtral", [], options=LLAMA | {"num_local_experts": 4}),
    "qwen3_moe": Family("qwen3_moe", [], options=MOE | {"moe_intermediate_size": 16, "decoder_sparse_step": 1}),
    "olmoe": Family("olmoe", [], options=MOE),
}
"""Families whose experts are parameters of shape [experts, out, in]."""
