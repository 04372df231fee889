import errno
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import sparsify
from sparsify.errors import NumericsError
from sparsify.runs import records as store

TEXTS = (
    "model={inputs}/model",
    *(f"data@{part}.text=file" for part in ("calibration", "heldout", "test")),
    *(f"{part}.text.path={{inputs}}/long.txt" for part in ("calibration", "heldout", "test")),
    "test.stride=1",
)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, tiny):
    """A results folder with one finished record."""
    from sparsify.commands import cli

    folder = tmp_path_factory.mktemp("earlier")
    assert cli.launch([*tiny, f"results={folder}"]) == 0
    return folder / "runs"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("SPARSIFY_DATA", raising=False)


@pytest.fixture
def refused(go, results, files, earlier, inputs):
    """Run what must be refused: one paragraph with these parts, this exit code, and nothing earlier touched."""
    shutil.copytree(earlier, results / "runs")

    def run(overrides, code, parts):
        before = files()
        outcome = go(*(override.format(inputs=inputs) for override in overrides))
        assert outcome.code == code
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1
        assert "Traceback" not in outcome.out + outcome.err
        for part in parts:
            assert part in outcome.err
        assert before.items() <= files().items()
        return outcome

    return run


USAGE = {
    "unknown model": (["model=llama2-77b"], ["Got: llama2-77b.", "Allowed: gemma3-270m, ", "Fix: model=llama2-7b"]),
    "typo in a key": (["sparsty=0.5"], ["Got: sparsty.", "Fix: did you mean sparsity", "configs/config.yaml"]),
    "typo in a group's key": (
        ["allocator=atp", "allocator.betta=0.01"],
        ["Got: allocator.betta.", "did you mean allocator.beta", "configs/allocator/"],
    ),
    "a component in a place that nothing has": (
        ["allocator@allocator.inner=owl"],
        ["a place allocator.inner", "Fix: allocator=absorption allocator@allocator.inner=<name>."],
    ),
    "a parameter of a component that is not chosen": (
        ["allocator=absorption", "allocator.source.eta=0.1"],
        ["Got: allocator.source.eta.", "Fix: perturbation@allocator.source=noise, then allocator.source.eta=<value>."],
    ),
    "a parameter deeper down": (
        ["allocator=absorption", "allocator.eta=0.1"],
        ["Fix: allocator=absorption perturbation@allocator.source=noise, then allocator.source.eta=<value>."],
    ),
    "a parameter of another rule": (["allocator=atp", "allocator.M=5"], ["allocator=owl, then allocator.M=<value>."]),
    "a component that stands within others": (
        ["perturbation=noise"],
        ["within another component", "Fix: allocator=absorption perturbation@allocator.source=<name>."],
    ),
    "noise below the resolution": (
        ["allocator=absorption", "perturbation@allocator.source=noise", "allocator.source.eta=1e-9", "sparsity=0.7"],
        ["drowns in the rounding of float32", "Got: eta=1e-09.", "Allowed: eta >= 4.8e-07."],
    ),
    "a strength below zero": (["allocator=absorption", "allocator.strength=-1.0"], ["Got: -1.0.", ">= 0, or auto"]),
    "typo in an option": (
        ["pruner=wnada"],
        [
            "Got: wnada.",
            "Allowed: admm, alps, dsnot, gblm, least_squares, magnitude, pruner_zero, ria, sparsegpt, wanda.",
            "Fix: pruner=wanda.",
        ],
    ),
    "no room in the pattern": (
        ["allocator=fisher", "pattern=mixed:8", "sparsity=0.95"],
        ["Got: sparsity=0.95.", "Allowed: sparsity <= 0.875.", "Fix: pattern=mixed:16"],
    ),
    "sparsity above one": (["sparsity=1.2"], ["Got: 1.2.", "Allowed: 0 <= sparsity < 1.", "Fix: sparsity=0.7."]),
    "sparsity in percent": (["sparsity=60.0"], ["Got: 60.0.", "Fix: sparsity=0.6."]),
    "beta beyond the limit": (
        ["allocator=atp", "allocator.beta=0.3", "sparsity=0.7"],
        ["Got: 0.3.", "Allowed: -0.2 <= beta <= 0.2.", "Fix: allocator.beta=0.2 or allocator.beta=auto."],
    ),
    "M that does not divide": (["pattern=7:9", "sparsity=null"], ["Got: M = 9, inputs = 64.", "Fix: pattern=2:4."]),
    "N above M": (["pattern=5:4", "sparsity=null"], ["Got: 5:4.", "1 <= N <= M"]),
    "sparsity against N:M": (["pattern=2:4", "sparsity=0.7"], ["Got: sparsity=0.7.", "Allowed: sparsity=0.5."]),
    "a text that must be given": (["data@calibration.text=file"], ["Fix: calibration.text.path=<value>."]),
    "two values without -m": (["sparsity=0.6,0.7"], ["sparsity=0.6,0.7", "add --multirun"]),
    "windows of nothing": (["calibration.windows=0"], ["Got: seqlen=32, windows=0.", "windows >= 1"]),
}

NOT_HERE = {
    "empty text": ([*TEXTS, "calibration.text.path={inputs}/empty.txt"], ["train split of file is empty"]),
    "text too short to draw from": (
        [*TEXTS, "calibration.text.path={inputs}/short.txt"],
        ["longer than 32 tokens", "Got: 0 windows", "Allowed: 2 windows.", "Fix: the joined sampler"],
    ),
    "text too short to cut": (
        [*TEXTS, "test.text.path={inputs}/short.txt"],
        ["(test split) is too short", "Got: 20 tokens, 0 windows", "Fix: fewer windows"],
    ),
    "no such text": ([*TEXTS, "calibration.text.path={inputs}/none.txt"], ["does not exist", "none.txt", "Fix: give"]),
    "a corpus that is nowhere": (
        [*(text for text in TEXTS if "calibration" not in text), "data@calibration.text=c4"],
        ["text c4 (train split) is nowhere", "SPARSIFY_DATA (not set)", "the hub (allenai/c4)", "Fix: make setup"],
    ),
    "a model that is nowhere": ([*TEXTS, "model=nobody/nothing"], ["nobody/nothing could not be loaded", "Fix: check"]),
    "a NaN in the weights": (
        [*TEXTS, "model={inputs}/nan"],
        ["model.layers.1.mlp.up_proj holds NaN", "Got: 1 of 1536 weights.", "Allowed: finite weights."],
    ),
}

OTHER = {
    "a preset without -m": (["experiment=atp/beta_curve"], 2, ["-m"]),
    "results in a file": (["results={inputs}/long.txt"], 1, ["long.txt", "results="]),
    "a component by its path": (["logger._target_=os.system"], 2, ["logger._target_", "logger=<name>"]),
    "a version": (["pruner.version=7"], 2, ["pruner.version=7", "leave pruner.version out"]),
    "a version inside": (["allocator=absorption", "+allocator.inner.version=7"], 2, ["allocator.inner.version"]),
    "a seed in words": (["seed=abc"], 2, ["Got: abc."]),
    "a batch size in words": (["batch_size=abc", "sparsity=0.6"], 2, ["Got: abc."]),
}


@pytest.mark.parametrize(("overrides", "parts"), USAGE.values(), ids=USAGE)
def test_a_wrong_request_is_one_paragraph(refused, overrides, parts):
    refused(overrides, 2, parts)


@pytest.mark.parametrize(("overrides", "parts"), NOT_HERE.values(), ids=NOT_HERE)
def test_what_cannot_be_used_is_one_paragraph(refused, monkeypatch, inputs, overrides, parts):
    monkeypatch.setenv("SPARSIFY_ASSETS", str(inputs))
    refused(overrides, 1, parts)


@pytest.mark.parametrize(("overrides", "code", "parts"), OTHER.values(), ids=OTHER)
def test_other_mistakes_are_one_paragraph(refused, overrides, code, parts):
    refused(overrides, code, parts)


def test_good_texts_and_weights_are_not_refused(go, records, inputs):
    outcome = go(*(override.format(inputs=inputs) for override in TEXTS))
    assert (outcome.code, outcome.err) == (0, "")
    assert records()[0.5]["calibration"]["corpus"] == "file"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_one_paragraph(refused):
    refused(["device=cuda"], 2, ["Got: cuda.", "Allowed: auto, cpu, cuda, mps.", "Fix: device=auto."])


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("overrides", [["sparsity=0.6"], ["test.windows=1"]], ids=["new cell", "same cell"])
def test_a_full_disk_is_one_paragraph(refused, monkeypatch, results, call, overrides):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.os, call, full)
    refused(overrides, 1, ["record.json could not be written", "No space left on device", "Fix: free some space"])
    assert sorted(file.name for file in results.glob("runs/*/*")) == ["record.json"]


def test_a_damaged_record_is_named_and_kept_and_its_cell_run_anew(go, results, earlier, records):
    shutil.copytree(earlier, results / "runs")
    (file,) = results.glob("runs/*/record.json")
    damaged = file.read_text()[:-9]
    file.write_text(damaged)
    outcome = go()
    assert outcome.code == 0
    assert "warning: A record is damaged" in outcome.err
    assert "set aside as" in outcome.err
    assert file.with_name("record.damaged.json").read_text() == damaged
    assert records()[0.5]["status"] == "done"


LACKING = {
    "test text that is nowhere": ([*TEXTS, "test.text.path={inputs}/nowhere.txt"], "The text file does not exist"),
    "test text that is too short": ([*TEXTS, "test.windows=100000"], "is too short"),
    "rows of a task": ([*TEXTS, "eval=zeroshot", "eval.tasks=gsm8k"], "The rows of gsm8k are nowhere"),
    "a tokenizer": (["eval=zeroshot"], "Tasks need a tokenizer"),
}


@pytest.mark.parametrize(("overrides", "says"), LACKING.values(), ids=LACKING)
def test_what_could_not_be_measured_is_refused_before_pruning(go, inputs, monkeypatch, overrides, says):
    from sparsify import pipeline

    monkeypatch.setattr(pipeline, "prune", lambda *_: pytest.fail("pruned in vain"))
    outcome = go(*(override.format(inputs=inputs) for override in overrides))
    assert outcome.code in (1, 2)
    assert says in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_nan_stops_the_library_call_before_a_weight_changes(make_model, tokens):
    model = make_model()
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        NumericsError, match=r"layers\.1\.self_attn\.v_proj holds NaN .* Got: 1 of 512 weights\. .*Fix:"
    ):
        sparsify.prune(model, tokens, sparsity=0.5)
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in model.state_dict().items())


def test_an_unforeseen_error_shows_its_traceback_and_leaves_a_failed_record(go, records, monkeypatch):
    from sparsify import pipeline

    monkeypatch.setattr(pipeline, "prune", lambda *_: SimpleNamespace().nothing)
    outcome = go()
    assert outcome.code == 1
    assert outcome.err.startswith("error: Unexpected AttributeError.")
    assert "Traceback" in outcome.err
    assert (records()[0.5]["status"], records()[0.5]["evaluations"]) == ("failed", {})


def test_the_process_ends_with_the_exit_code(tiny, results):
    command = [sys.executable, "-m", "sparsify", *tiny, f"results={results}", "pruner=wnada"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert run.stderr.startswith("error: There is no pruner of that name. Got: wnada.")
    assert not results.exists()
