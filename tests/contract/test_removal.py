"""Every family without some heads and channels computes what it does with them at zero, or is refused by name."""

import copy
from functools import cache

import pytest
import torch
from families import FAMILIES, MIXTURES, VOCABULARY
from transformers import AutoModelForCausalLM

import sparsify
from sparsify.errors import DataError, UnsupportedModelError
from sparsify.model.blocks import BlockView
from sparsify.model.coupled import coupled, coupled_of
from sparsify.model.dense import DenseModel
from sparsify.model.removal import remove, silence
from sparsify.model.sizes import follow
from sparsify.model.trial import try_removal

CUT = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "opt")
REFUSED = {
    "phi3": r"self_attn\.qkv_proj.*queries, keys and values are one matrix",
    "gpt2": r"attn\.c_attn.*Conv1D.*queries, keys and values are one matrix",
    "gpt_neox": r"query_key_value.*one matrix",
    "bloom": r"query_key_value.*one matrix",
    "falcon": r"query_key_value.*one matrix",
    "mixtral": r"layers\.0\.mlp\.(gate|experts).*channels of experts",
    "qwen3_moe": r"layers\.0\.mlp\.(gate|experts).*channels of experts",
    "olmoe": r"layers\.0\.mlp\.(gate|experts).*channels of experts",
}
PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
"""Families whose class builds itself to any number of heads."""
TOKENS = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(2))

every_cut = pytest.mark.parametrize("family", CUT)
sizes = pytest.mark.parametrize("alike", [True, False], ids=["blocks alike", "blocks differ"])


@cache
def built(family):
    return (FAMILIES | MIXTURES)[family].build()


def fresh(family):
    model = copy.deepcopy(built(family))
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            bias.data.normal_(0, 0.3)  # transformers starts them from zero
    return model


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def chosen(groups, alike):
    """Units that go, by group: some from the middle."""
    for group in groups:
        count = {"heads": 1, "channels": 7}[group.kind] + (0 if alike else -(group.block % 2))
        yield group, torch.randperm(group.count)[:count].tolist()


def smaller(family, alike):
    """The model with some units at zero, and without them."""
    silenced = fresh(family)
    model = copy.deepcopy(silenced)
    view = BlockView(model)
    torch.manual_seed(1)
    for (group, units), other in zip(chosen(coupled_of(view), alike), coupled_of(BlockView(silenced)), strict=True):
        silence(other, units)
        remove(group, [i for i in range(group.count) if i not in units])
    view.refresh()
    return silenced, model, view


def test_every_family_is_cut_or_refused():
    assert {*CUT, *REFUSED} == {*FAMILIES, *MIXTURES}


@every_cut
@sizes
def test_without_some_units_a_model_computes_what_it_does_with_them_at_zero(family, alike):
    silenced, model, view = smaller(family, alike)
    follow(view)
    torch.testing.assert_close(logits(model), logits(silenced), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in silenced.parameters())
    pairs = zip(coupled_of(view), coupled_of(BlockView(silenced)), strict=True)
    assert view.numel - view.table.numel == sum((other.count - group.count) * group.size for group, other in pairs)
    assert all((layer.module.out_features, layer.module.in_features) == layer.weight.shape for layer in view.layers)


@every_cut
@sizes
def test_a_smaller_model_generates_with_a_cache_what_it_does_without(family, alike):
    _, model, view = smaller(family, alike)
    follow(view)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(TOKENS[:2, :5], **options)
    assert cached.shape == (2, 11)
    assert torch.equal(cached, model.generate(TOKENS[:2, :5], use_cache=False, **options))


@every_cut
@sizes
def test_a_smaller_model_is_saved_and_opened(family, alike, tmp_path):
    _, model, view = smaller(family, alike)
    reason = follow(view)
    assert (reason is None) == (alike and family in PLAIN), reason
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path) if reason is None else load(tmp_path)
    assert type(opened) is type(model)
    assert torch.equal(logits(opened), logits(model))
    opened.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()
    if reason is not None:
        with pytest.raises(RuntimeError, match="mismatch"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def load(folder):
    from sparsify.model.pretrained import pretrained

    return pretrained(str(folder), torch.float32, "cpu").eval()


@every_cut
def test_a_smaller_model_is_restored_with_its_sizes_and_its_config(family):
    model = fresh(family)
    view, before = BlockView(model), (str(model.config), repr(model), logits(model))
    dense = view.snapshot()
    for group, units in chosen(coupled_of(view), False):
        remove(group, [i for i in range(group.count) if i not in units])
    view.refresh()
    follow(view)
    assert view.sparsity() > 0
    assert dense.changed()
    view.restore(dense)
    assert not dense.changed()
    assert (view.sparsity(), view.table.numel) == (0, view.numel)
    assert (str(model.config), repr(model)) == before[:2]
    assert torch.equal(logits(model), before[2])


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_cut_is_refused_with_the_matrix_and_the_reason(family):
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
        coupled_of(BlockView(fresh(family)))


@every_cut
def test_units_are_what_the_family_has(family):
    view = BlockView(fresh(family))
    config, groups = view.model.config, coupled_of(view)
    for group in groups:
        heads = group.kind == "heads"
        grouped = getattr(config, "num_key_value_heads", config.num_attention_heads)
        assert group.count == (grouped if heads else getattr(config, "ffn_dim", 48))
        assert group.queries == (config.num_attention_heads // grouped if heads else 1)
    assert sum(group.count * group.size for group in groups) == view.table.numel


@every_cut
def test_a_trial_passes_and_leaves_the_model_as_it_was(family):
    view = BlockView(fresh(family))
    dense = view.snapshot()
    try_removal(view, sparsify.data.inputs.as_inputs(TOKENS), dense)
    assert not dense.changed()
    assert view.table.numel == view.numel


def test_a_model_that_computes_something_else_without_its_units_is_refused():
    model = fresh("llama")
    attention = type(model.model.layers[0].self_attn)

    class Scaled(attention):
        """By the number of its heads, as no silenced model is."""

        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return out * self.q_proj.out_features, weights

    for block in model.model.layers:
        block.self_attn.__class__ = Scaled
    view = BlockView(model)
    dense = view.snapshot()
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM computes something else with fewer heads"):
        try_removal(view, sparsify.data.inputs.as_inputs(TOKENS), dense)
    assert isinstance(dense, DenseModel)
    assert not dense.changed()


def test_a_model_that_does_not_run_without_its_units_is_refused():
    model = fresh("llama")
    attention = type(model.model.layers[0].self_attn)

    class Fixed(attention):
        def forward(self, hidden_states, *args, **kwargs):
            self.q_proj(hidden_states).view(*hidden_states.shape[:2], 4, 8)
            return super().forward(hidden_states, *args, **kwargs)

    model.model.layers[0].self_attn.__class__ = Fixed
    view = BlockView(model)
    with pytest.raises(UnsupportedModelError, match=r"does not run with fewer heads and channels.*RuntimeError"):
        try_removal(view, sparsify.data.inputs.as_inputs(TOKENS), view.snapshot())


def test_a_parameter_for_every_head_is_refused():
    model = fresh("llama")
    model.model.layers[0].self_attn.register_parameter("sinks", torch.nn.Parameter(torch.zeros(4)))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn\.sinks of length 4"):
        coupled(model.model.layers[0], 0, "model.layers.0")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"9": {"num_attention_heads": 4}}, r"names no block\. Got: 9\. Allowed: 0 to 2"),
        ({"1": {"intermediate_size": 99}}, "99 channels in block 1. Allowed: 1 to 48"),
        ({"1": {"num_attention_heads": 1}}, "0 heads in block 1"),
        ({"1": {"hidden_size": 16}}, "names what is not known here. Got: hidden_size"),
        ({"x": 3}, "is no table of sizes"),
        ([1], "is no table of sizes"),
    ],
)
def test_sizes_that_cannot_be_are_refused(given, said, tmp_path):
    model = fresh("llama")
    model.config.block_sizes = given
    model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=said):
        load(tmp_path)
