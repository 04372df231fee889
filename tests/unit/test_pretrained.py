"""What a folder of weights must not be taken for."""

import json

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import sparsify
from sparsify.errors import DataError, UnsupportedModelError
from sparsify.model.pretrained import pretrained

TOKENS = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    FAMILIES["llama"].build().save_pretrained(tmp_path)
    return tmp_path


def edit(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def configure(folder, **options):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def load(folder):
    return pretrained(str(folder), torch.float32, "cpu")


def test_a_whole_checkpoint_is_loaded_as_it_is(folder):
    weights = load_file(folder / "model.safetensors")
    model = load(folder)
    assert all(torch.equal(dict(model.named_parameters())[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
            r"missing.*left over.*without the prefix '_orig_mod\.'",
        ),
        (lambda w: {f"module.{k}": v for k, v in w.items()}, r"without the prefix 'module\.'"),
        (lambda w: {k: v for k, v in w.items() if ".1." not in k}, r"9 missing \(model\.layers\.1\."),
        (lambda w: {k: v for k, v in w.items() if "lm_head" not in k}, r"1 missing \(lm_head\.weight\)"),
        (lambda w: w | {"model.layers.3.mlp.up_proj.weight": torch.ones(48, 32)}, r"1 left over \(model\.layers\.3"),
        (
            lambda w: w | {"model.layers.1.mlp.up_proj.weight": torch.ones(40, 32)},
            r"1 of another shape.*layers\.1\.mlp",
        ),
        (lambda w: w | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}, "merge the adapter"),
    ],
)
def test_weights_that_are_not_the_models_are_refused_by_name(folder, change, said):
    edit(folder, change)
    with pytest.raises(DataError, match=said):
        load(folder)


def test_more_layers_than_there_are_is_refused(folder):
    configure(folder, num_hidden_layers=4)
    with pytest.raises(DataError, match=r"missing \(model\.layers\.3"):
        load(folder)


def test_tied_weights_and_buffers_that_are_not_stored_are_fine(tmp_path):
    config = AutoConfig.for_model("llama", **FAMILIES["llama"].options, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    edit(tmp_path, lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    load(tmp_path)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors"])
def test_a_quantised_checkpoint_is_refused_before_it_is_loaded(folder, method):
    configure(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedModelError, match=f"Quantised.*method {method}"):
        load(folder)


def test_code_of_a_models_own_is_not_run(folder):
    (folder / "own.py").write_text("raise SystemExit('run')\n")
    configure(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    with pytest.raises(UnsupportedModelError, match="code of their own"):
        load(folder)


def test_an_encoder_decoder_is_refused(folder):
    configure(folder, is_encoder_decoder=True, architectures=["BartForConditionalGeneration"])
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        load(folder)


def test_a_pointer_of_git_lfs_is_named(folder):
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match=r"pointer of git-lfs.*git lfs pull"):
        load(folder)


def test_a_truncated_file_is_one_error(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"could not be loaded.*download or save"):
        sparsify.load(str(folder))


def test_an_encoder_has_no_perplexity():
    config = AutoConfig.for_model(
        "bert", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    with pytest.raises(UnsupportedModelError, match="no decoder"):
        sparsify.perplexity(model, TOKENS)
    with pytest.raises(UnsupportedModelError, match="no decoder"):
        sparsify.prune(model, TOKENS, sparsity=0.5)
