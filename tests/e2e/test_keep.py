"""A model that is kept, measured again without pruning, exported, and opened by plain transformers."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsify
from sparsify.commands import export
from sparsify.evaluation.perplexity import Perplexity
from sparsify.methods.oneshot import OneShot
from sparsify.model.blocks import BlockView
from sparsify.model.masks import Masks
from sparsify.quantisation.stored import grids_in

TEXTS = (
    *(f"data@{part}.text=file" for part in ("calibration", "heldout", "test")),
    "calibration.sampler=joined",
    "heldout.sampler=joined",
    "test.stride=1",
)
EXTRA = (
    "+eval.extra={_target_:sparsify.evaluation.perplexity.Perplexity,windows:{_target_:sparsify.data.windows.Windows,"
)
EXTRA += "text:${test.text},split:test,seqlen:16,windows:3}}"
OPEN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    loss = model(ids, labels=ids).loss
zeros = {n: int((w == 0).sum()) for n, w in model.named_parameters()}
assert "sparsify" not in sys.modules
print(json.dumps([float(loss), zeros, model.config.tie_word_embeddings]))
"""


@pytest.fixture
def texts(inputs):
    return [*TEXTS, *(f"{part}.text.path={inputs}/long.txt" for part in ("calibration", "heldout", "test"))]


@pytest.fixture
def kept(go, inputs, texts, records):
    """Run a cell of a model in a folder with keep=true; its record."""

    def run(*overrides, model=None):
        outcome = go(f"model={model or inputs / 'model'}", *texts, "keep=true", *overrides)
        assert (outcome.code, outcome.err) == (0, "")
        return next(iter(records().values()))

    return run


@pytest.fixture
def prunings(monkeypatch):
    """How often a model was pruned."""
    seen, apply = [], OneShot.apply
    monkeypatch.setattr(OneShot, "apply", lambda *arguments: seen.append(1) or apply(*arguments))
    return seen


def test_a_kept_model_is_exported_and_plain_transformers_has_its_zeros(kept, results, tmp_path, capsys):
    record = kept("pruner=sparsegpt", "allocator=atp", "allocator.beta=0.1", "sparsity=0.6")
    folder = tmp_path / "out" / "pruned"
    assert export.main([record["key"][:8], "--to", str(folder), "--results", str(results)]) == 0
    assert "from_pretrained" in capsys.readouterr().out
    tokens = torch.ones(3, 7, dtype=torch.long)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder), json.dumps(tokens.tolist())],
        capture_output=True,
        text=True,
        check=True,
    )
    loss, zeros, _ = json.loads(done.stdout)
    assert {row["name"]: row["zeros"] for row in record["layers"]} == {
        name.removesuffix(".weight"): count for name, count in zeros.items() if "proj" in name
    }
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sparsify.perplexity(model, tokens) == pytest.approx(float(torch.tensor(loss).exp()), rel=1e-5)
    allocation = json.loads((folder / "allocation.json").read_text())
    assert allocation["layers"] == {row["name"]: row["sparsity"] for row in record["plan"]}
    card = (folder / "README.md").read_text()
    assert all(f"{item['value']:.5g}" in card for item in record["evaluations"].values())
    assert "allocator.beta=0.1" in card
    assert (folder / "generation_config.json").is_file()


@pytest.mark.parametrize(
    "quantised",
    [
        ["quantiser=gptq", "quantiser.bits=3", "quantiser.group=20"],
        ["quantiser=rtn", "quantiser.bits=3.5", "quantiser.group=16", "allocator@quantiser.allocator=atp_relative"],
        ["method=joint", "method.bits=2", "method.group=null"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_an_exported_quantised_model_has_its_zeros_and_codes(quantised, kept, results, tmp_path, capsys):
    record = kept("pruner=sparsegpt", "sparsity=0.6", *quantised)
    folder = tmp_path / "out"
    assert export.main([record["key"], "--to", str(folder), "--results", str(results)]) == 0
    view = BlockView(AutoModelForCausalLM.from_pretrained(folder))
    grids, file = (
        grids_in(folder / "quantisation.safetensors"),
        results / "runs" / record["key"] / "weights.safetensors",
    )
    assert view.sparsity() == record["sparsity"]
    assert set(grids) == {layer.spec.name for layer in view.layers}
    stored, loaded = load_file(file), Masks()
    for layer in view.layers:
        name, grid = layer.spec.name, grids[layer.spec.name]
        loaded.put(name, stored[f"mask/{name}"], layer.weight.shape)
        assert torch.equal(layer.weight, stored[f"{name}.weight"])
        assert torch.equal(grid.values(grid.codes(layer.weight)), layer.weight)
        groups = layer.weight.split(grid.precision.width(layer.spec.in_features), dim=1)
        assert all(len(row.unique()) <= 2**grid.precision.bits for part in groups for row in part)
    loaded.check(view)
    notes = {name.removeprefix("quantiser."): value for name, value in record["notes"].items()}
    pruned = sum(int((~loaded[x.spec.name]).sum()) for x in view.layers) / view.table.numel
    assert notes["pruned"] == pruned == pytest.approx(0.6, abs=0.02)
    assert notes["pruned"] + notes["rounded_to_zero"] == pytest.approx(view.sparsity())
    bits = sum(grids[x.spec.name].precision.bits * x.spec.numel for x in view.layers) / view.table.numel
    assert notes["mean_bits"] == bits
    assert f"{notes['bits_per_weight']:.3f} bits a weight" in (folder / "README.md").read_text()


def test_tied_weights_stay_tied(make_model, inputs, kept, results, tmp_path):
    source = tmp_path / "tied"
    make_model(tie_word_embeddings=True).save_pretrained(source)
    AutoTokenizer.from_pretrained(inputs / "model").save_pretrained(source)
    record = kept("sparsity=0.5", model=source)
    assert export.main([record["key"], "--to", str(tmp_path / "out"), "--results", str(results)]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_allocation_can_be_read_back(kept, results, tmp_path, go, inputs, texts):
    record = kept("allocator=owl", "allocator.M=2.0", "sparsity=0.6")
    export.main([record["key"], "--to", str(tmp_path / "out"), "--results", str(results)])
    again = go(
        f"model={inputs / 'model'}",
        *texts,
        "allocator=from_file",
        f"allocator.file={tmp_path}/out/allocation.json",
        "sparsity=0.6",
    )
    assert (again.code, again.err) == (0, "")
    both = [json.loads(file.read_text()) for file in results.glob("runs/*/record.json")]
    assert len(both) == 2
    assert both[0]["plan"] == both[1]["plan"]
    assert both[0]["evaluations"]["test"]["value"] == both[1]["evaluations"]["test"]["value"]
    assert str(tmp_path) not in json.dumps([x["science"] for x in both])


def test_an_added_evaluation_reads_the_kept_model_instead_of_pruning(kept, go, inputs, texts, records, prunings):
    first = kept("sparsity=0.6")
    assert len(prunings) == 1
    second = kept("sparsity=0.6", EXTRA)
    assert len(prunings) == 1
    assert first["evaluations"].items() < second["evaluations"].items()
    assert (second["layers"], second["plan"], second["kept"]) == (first["layers"], first["plan"], first["kept"])
    assert second["status"] == "done"


def test_what_the_kept_model_measures_is_what_the_pruned_one_did(kept, go, inputs, texts, records, monkeypatch):
    measured, evaluate = [], Perplexity.evaluate

    def spy(self, subject):
        measured.append(evaluate(self, subject))
        return measured[-1]

    monkeypatch.setattr(Perplexity, "evaluate", spy)
    kept("sparsity=0.6", "pruner=sparsegpt")
    same = EXTRA.replace("seqlen:16,windows:3", "seqlen:32,windows:2")
    kept("sparsity=0.6", "pruner=sparsegpt", same)
    assert measured[-1].value == measured[0].value


def test_a_damaged_file_means_pruning_again(kept, results, prunings):
    record = kept("sparsity=0.6")
    (results / "runs" / record["key"] / "weights.safetensors").write_bytes(b"nothing")
    again = kept("sparsity=0.6", EXTRA)
    assert len(prunings) == 2
    assert again["kept"] == record["kept"]


def test_keeping_what_is_finished_prunes_once_more_and_measures_nothing_again(
    kept, go, inputs, texts, records, prunings
):
    assert go(f"model={inputs / 'model'}", *texts, "sparsity=0.6").code == 0
    before = records()[0.6]
    after = kept("sparsity=0.6")
    assert len(prunings) == 2
    assert after["evaluations"] == before["evaluations"]
    assert after["key"] == before["key"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["0123", "--to", "{tmp}/new"], ["There is no finished cell", "Got: 0123"]),
        (["{key}", "--to", "{tmp}"], ["not empty", "--to"]),
    ],
)
def test_what_cannot_be_exported_is_one_paragraph(kept, results, tmp_path, capsys, arguments, words):
    key = kept("sparsity=0.6")["key"]
    filled = [text.format(key=key, tmp=tmp_path) for text in arguments]
    assert export.main([*filled, "--results", str(results)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words)


def test_a_cell_that_was_not_kept_says_how_to_keep_it(go, results, records, tmp_path, capsys):
    go("sparsity=0.6")
    assert export.main([records()[0.6]["key"], "--to", str(tmp_path / "x"), "--results", str(results)]) == 1
    assert "keep=true" in capsys.readouterr().err


@pytest.mark.parametrize(
    "allocator", [("atp", {"step": 0.2}), ("search", {"trials": 6, "windows": 2, "heldout": 2, "finalists": 3})]
)
def test_the_library_call_gives_the_bits_of_a_cell(kept, inputs, results, allocator):
    name, options = allocator
    overrides = [f"allocator.{key}={value}" for key, value in options.items()]
    record = kept(f"allocator={name}", *overrides, "pruner=sparsegpt", "sparsity=0.6", "seed=3")
    model, tokenizer = sparsify.load(str(inputs / "model"))
    text = str(inputs / "long.txt")
    windows = {"split": "train", "n": 2, "seqlen": 32, "sampler": "joined", "seed": 3}
    calibration, heldout = (sparsify.windows(tokenizer, text, **windows) for _ in range(2))
    result = sparsify.prune(
        model, calibration, heldout=heldout, pruner="sparsegpt", allocator=allocator, sparsity=0.6, seed=3
    )
    assert [t["heldout_perplexity"] for t in result.plan.trials] == [t["heldout_perplexity"] for t in record["trials"]]
    weights = load_file(results / "runs" / record["key"] / "weights.safetensors")
    changed = {name: weight for name, weight in weights.items() if not name.startswith("mask/")}
    assert len(changed) == len(record["layers"])
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in changed.items())
