"""Cells whose model became smaller: recorded, kept, measured again, exported and opened."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparsify
from sparsify.commands import export
from sparsify.methods.structured import Structured
from sparsify.model.blocks import BlockView

STRUCTURED = ("method=structured", "sparsity=0.5")
DIFFERING = (*STRUCTURED, "allocator=atp", "allocator.beta=0.2")


@pytest.fixture
def run(go, inputs, records):
    """Run a cell of a model in a folder; its record."""
    texts = [*(f"data@{part}.text=file" for part in ("calibration", "heldout", "test")), "test.stride=1"]
    texts += [f"{part}.sampler=joined" for part in ("calibration", "heldout")]
    texts += [f"{part}.text.path={inputs}/long.txt" for part in ("calibration", "heldout", "test")]

    def cell(*overrides):
        outcome = go(f"model={inputs / 'model'}", *texts, *overrides)
        assert (outcome.code, outcome.err) == (0, "")
        return next(iter(records().values()))

    return cell


def exported(record, results, to, capsys):
    assert export.main([record["key"], "--to", str(to), "--results", str(results)]) == 0
    return capsys.readouterr().out


def test_the_record_counts_what_was_removed(run, inputs):
    record = run(*DIFFERING)
    dense, _ = sparsify.load(str(inputs / "model"))
    numel = BlockView(dense).numel
    gone = sum(row["zeros"] for row in record["layers"])
    assert record["sparsity"] == record["ledger"]["achieved"] == gone / numel
    assert record["ledger"]["rounded"] == pytest.approx(record["sparsity"], abs=1e-12)
    notes = record["notes"]
    assert notes["parameters_before"] - notes["parameters_after"] == gone
    assert notes["channels_before"] == [48, 48]
    assert record["evaluations"]["test"]["value"] > 1


def test_alike_blocks_are_exported_for_plain_transformers(run, results, tmp_path, capsys):
    record = run(*STRUCTURED, "keep=true")
    out = exported(record, results, tmp_path / "out", capsys)
    assert "prunable weights are removed" in out
    assert "AutoModelForCausalLM.from_pretrained" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == record["notes"]["parameters_after"]
    assert model.config.intermediate_size == record["notes"]["channels"][0]
    card = (tmp_path / "out/README.md").read_text()
    assert f"{record['notes']['parameters_after']:,} of" in card
    assert "zeros included" not in card


def test_blocks_that_differ_are_exported_for_sparsify_with_the_reason(run, results, inputs, tmp_path, capsys):
    record = run(*DIFFERING, "keep=true")
    out = exported(record, results, tmp_path / "out", capsys)
    assert "plain transformers does not open it: its blocks differ in size" in out
    assert f'sparsify.load("{tmp_path / "out"}")' in out
    assert "its blocks differ in size" in (tmp_path / "out/README.md").read_text()
    model, tokenizer = sparsify.load(str(tmp_path / "out"))
    windows = {"n": 2, "seqlen": 32, "sampler": "joined"}
    tokens = sparsify.windows(tokenizer, str(inputs / "long.txt"), "test", **windows)
    library, _ = sparsify.load(str(inputs / "model"))
    sparsify.prune(library, tokens, method="structured", sparsity=0.5, allocator=("atp", {"beta": 0.2}))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in library.named_parameters()}
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("overrides", [STRUCTURED, DIFFERING], ids=["alike", "differing"])
def test_a_kept_model_is_measured_again_without_pruning(run, overrides, monkeypatch):
    applied, apply = [], Structured.apply
    monkeypatch.setattr(Structured, "apply", lambda *arguments: applied.append(1) or apply(*arguments))
    extra = "+eval.again={_target_:sparsify.evaluation.perplexity.Perplexity,windows:${test},version:1}"
    first = run(*overrides, "keep=true")
    second = run(*overrides, "keep=true", extra)
    assert len(applied) == 1
    values = [item["value"] for item in second["evaluations"].values()]
    assert values == [first["evaluations"]["test"]["value"]] * 2
    assert second["sparsity"] == first["sparsity"]


def test_a_smaller_model_is_measured_as_it_stands(go, records):
    outcome = go("method=structured", "allocator=atp", "allocator.beta=0.1", "eval=absorption")
    assert (outcome.code, outcome.err) == (0, "")
    assert next(iter(records().values()))["evaluations"]


def test_cells_of_a_sweep_find_the_dense_model_again(go, results):
    run = go("method=structured,oneshot", "sparsity=0.3,0.5", sweep=True)
    assert (run.code, run.err) == (0, "")
    swept = [json.loads(file.read_text()) for file in results.glob("runs/*/record.json")]
    assert len(swept) == 4
    for record in swept:
        assert record["sparsity"] == pytest.approx(record["science"]["sparsity"], abs=2e-2)
        numel = {row["name"]: row["numel"] for row in record["layers"]}
        assert numel == {row["name"]: row["numel"] for row in swept[0]["layers"]}


def test_the_library_call_gives_the_model_of_a_cell(run, results, inputs):
    from safetensors.torch import load_file

    record = run(*DIFFERING, "keep=true")
    model, tokenizer = sparsify.load(str(inputs / "model"))
    windows = {"n": 2, "seqlen": 32, "sampler": "joined"}
    tokens = sparsify.windows(tokenizer, str(inputs / "long.txt"), "train", **windows)
    sparsify.prune(model, tokens, method="structured", sparsity=0.5, allocator=("atp", {"beta": 0.2}))
    weights = load_file(results / "runs" / record["key"] / "weights.safetensors")
    assert weights
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("pattern=2:4",), ("whole heads and channels", "pattern=2:4", "Fix: method=oneshot")),
        (("method.spare_first=1", "allocator=owl"), ("spare_first=1", "allocator=uniform")),
        (("sparsity=0.99",), ("One head and one channel stay", "sparsity=0.99", "at most 0.")),
        (("eval=error_growth",), ("eval.error_growth puts dense weights", "Structured", "Fix: eval=perplexity")),
        (("method.order=elements",), ("method.order", "Fix: method.order=element")),
    ],
)
def test_what_cannot_be_is_one_paragraph(go, overrides, words):
    outcome = go("method=structured", *overrides)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert all(word in outcome.err for word in words), outcome.err
