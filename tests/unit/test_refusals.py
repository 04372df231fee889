"""Matrices that are not what they seem, ids and windows that a model cannot read, zeros that do not stay."""

import warnings

import pytest
import torch
from families import FAMILIES
from torch import nn
from torch.nn.utils import parametrize, prune

import sparsify
from sparsify.errors import NumericsError, UnsupportedModelError, UsageError
from sparsify.model.blocks import BlockView

TOKENS = torch.randint(3, 90, (5, 11), generator=torch.Generator().manual_seed(1))


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Adapted(nn.Module):
    """As peft does."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora_A = base, nn.Linear(base.in_features, 2)

    def forward(self, x):
        return self.base_layer(x)


def adapted(mlp):
    mlp.up_proj = Adapted(mlp.up_proj)


def packed(mlp):
    mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 16, dtype=torch.uint8), requires_grad=False)


def eight_bits(mlp):
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.to(torch.float8_e4m3fn), requires_grad=False)


def offloaded(mlp):
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.to("meta"))


def masked(mlp):
    prune.random_unstructured(mlp.up_proj, "weight", 0.5)


def computed(mlp):
    parametrize.register_parametrization(mlp.up_proj, "weight", nn.Identity())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (adapted, "adapters.*merge_and_unload"),
        (packed, "Quantised or packed.*uint8"),
        (eight_bits, "Quantised or packed.*float8"),
        (offloaded, "not in memory"),
        (masked, r"computed.*prune\.remove"),
        (computed, r"computed.*remove_parametrizations"),
    ],
)
def test_a_matrix_that_is_not_what_it_seems_is_refused_by_name(make_model, change, said):
    model = make_model()
    change(model.model.layers[1].mlp)
    with pytest.raises(UnsupportedModelError, match=rf"{said}") as error:
        sparsify.prune(model, TOKENS, sparsity=0.5)
    assert "layers.1.mlp.up_proj" in str(error.value)


def test_blocks_that_share_a_matrix_are_refused(make_model):
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedModelError, match="share a matrix"):
        BlockView(model)


def test_a_short_convolution_is_left_alone_and_said():
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = FAMILIES["llama"].options | {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **shape)).eval()
    result = sparsify.prune(model, TOKENS, sparsity=0.5)
    assert {(x.reason, x.name.rsplit(".", 2)[-2]) for x in result.skipped} == {("convolution", "conv")}
    assert len(result.skipped) == 2
    assert result.sparsity == pytest.approx(0.5, abs=0.03)


def test_weights_that_are_written_anew_at_every_forward_are_found(make_model):
    model = make_model()
    layer = model.model.layers[1].mlp.down_proj
    dense = layer.weight.clone()

    def anew(module, _args):
        module.weight.data.copy_(dense)

    layer.register_forward_pre_hook(anew)
    before = weights(model)
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.down_proj.*no longer zero.*hooks"):
        sparsify.prune(model, TOKENS, sparsity=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_error_leaves_the_model_as_it_was(make_model):
    class Failing:
        needs, version = frozenset(), 1

        def __init__(self):
            self.count = 0

        def prune(self, weight, stats, target):
            self.count += 1
            if self.count == 9:
                raise NumericsError("enough")
            from sparsify.pruners.magnitude import Magnitude

            return Magnitude().prune(weight, stats, target)

    model = make_model().train()
    before = weights(model)
    with pytest.raises(NumericsError, match="enough"):
        sparsify.prune(model, TOKENS, pruner=Failing(), sparsity=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert "forward" not in model.model.layers[0].__dict__


def test_a_pruner_that_prunes_less_than_it_is_asked_to_is_caught(make_model):
    from sparsify.pruners.magnitude import Magnitude
    from sparsify.types import Target

    class Half(Magnitude):
        def prune(self, weight, stats, target):
            return super().prune(weight, stats, Target(target.sparsity / 2))

    with pytest.raises(NumericsError, match="less than it was asked to"):
        sparsify.prune(make_model(), TOKENS, pruner=Half(), sparsity=0.5)


@pytest.mark.parametrize("bad", [-1, 96, 5000])
def test_ids_without_an_embedding_are_refused(make_model, bad):
    model, tokens = make_model(), TOKENS.clone()
    tokens[2, 3] = bad
    for call in (lambda: sparsify.prune(model, tokens, sparsity=0.5), lambda: sparsify.perplexity(model, tokens)):
        with pytest.raises(UsageError, match="no embedding"):
            call()


@pytest.mark.parametrize("kind", [torch.int32, torch.int16])
def test_ids_of_other_integer_types_are_ids(make_model, kind):
    model = make_model()
    assert sparsify.perplexity(model, TOKENS.to(kind)) == sparsify.perplexity(model, TOKENS)


@pytest.mark.parametrize(("family", "positions"), [("gpt2", 32), ("opt", 32)])
def test_windows_beyond_learned_positions_are_refused(family, positions):
    model = FAMILIES[family].build()
    sparsify.perplexity(model, torch.randint(3, 90, (2, positions)))
    with pytest.raises(UsageError, match=f"at most {positions}"):
        sparsify.perplexity(model, torch.randint(3, 90, (2, positions + 1)))


def test_windows_beyond_a_computed_context_are_warned_of(make_model):
    model = make_model(max_position_embeddings=8)
    with pytest.warns(UserWarning, match="beyond the context of 8"):
        sparsify.perplexity(model, TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsify.perplexity(model, TOKENS[:, :8])
