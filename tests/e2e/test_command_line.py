import json
import os
import signal
import subprocess
import sys
from types import ModuleType

import pytest

from sparsify.commands import sweep
from sparsify.errors import NumericsError
from sparsify.evaluation.perplexity import Perplexity
from sparsify.model.blocks import BlockView

EXTRA = (
    "+eval.extra={_target_:sparsify.evaluation.perplexity.Perplexity,windows:{_target_:sparsify.data.windows.Windows,"
)
EXTRA += "text:${test.text},split:test,seqlen:16,windows:3}}"
KILLED = """
import os, signal, sys
from sparsify.commands.cli import launch
from sparsify.evaluation.perplexity import Perplexity

evaluate, calls = Perplexity.evaluate, []

def deadly(*arguments):
    calls.append(arguments)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(*arguments)

Perplexity.evaluate = deadly
launch(sys.argv[1:])
"""


@pytest.fixture
def evaluated(monkeypatch):
    """Sparsity of the model at each evaluation, as counted in its weights."""
    seen, evaluate = [], Perplexity.evaluate

    def spy(self, subject):
        seen.append(BlockView(subject.model).sparsity())
        return evaluate(self, subject)

    monkeypatch.setattr(Perplexity, "evaluate", spy)
    return seen


def values(record):
    return {name: item["value"] for name, item in record["evaluations"].items()}


def test_a_cell_leaves_a_record_of_the_zeros_that_were_evaluated(go, records, evaluated):
    run = go("pruner=ria", "allocator=atp", "allocator.beta=0.02", "sparsity=0.6")
    assert (run.code, run.err) == (0, "")
    record = records()[0.6]
    zeros, numel = (sum(row[key] for row in record["layers"]) for key in ("zeros", "numel"))
    assert record["status"] == "done"
    assert evaluated == [zeros / numel] * 2 == [record["sparsity"]] * 2
    assert all(row["achieved"] == row["zeros"] / row["numel"] for row in record["layers"])
    assert record["sparsity"] == pytest.approx(0.6, abs=1e-4)
    assert set(values(record)) == {"test", "heldout"}
    assert f"sparsity {record['sparsity']:.4f}" in run.out


def test_a_finished_cell_is_skipped_and_its_record_stays(go, files, evaluated):
    go()
    before = files()
    run = go()
    assert (run.code, run.err, len(evaluated)) == (0, "", 2)
    assert "already done" in run.out
    assert len(before) == 1
    assert files() == before


def test_an_added_evaluation_runs_alone(go, records, evaluated):
    go()
    before = records()[0.5]
    assert go(EXTRA).code == 0
    after = records()[0.5]
    assert len(evaluated) == 3
    assert len(set(evaluated)) == 1
    assert set(values(after)) == {"test", "heldout", "extra"}
    assert before["evaluations"].items() < after["evaluations"].items()
    assert after["status"] == "done"


def test_an_added_evaluation_that_fails_leaves_the_others(go, records, monkeypatch):
    def broken(*_):
        raise NumericsError("The perplexity is not finite")

    go()
    before = records()[0.5]["evaluations"]
    monkeypatch.setattr(Perplexity, "evaluate", broken)
    run = go(EXTRA)
    assert (run.code, run.err) == (1, "error: The perplexity is not finite.\n")
    assert records()[0.5]["evaluations"] == before
    assert go().code == 0
    assert (records()[0.5]["evaluations"], records()[0.5]["status"]) == (before, "done")


def test_an_evaluation_no_longer_asked_for_is_kept(go, records, files):
    go(EXTRA)
    before = files()
    assert go().code == 0
    assert files() == before
    assert "extra" in records()[0.5]["evaluations"]


def test_a_sweep_skips_what_is_done(go, files, evaluated):
    go("sparsity=0.5")
    (done,) = before = files()
    assert go("sparsity=0.5,0.6", sweep=True).code == 0
    assert len(evaluated) == 4
    assert files()[done] == before[done]
    assert len(files()) == 2


def test_a_failing_cell_does_not_stop_its_sweep(go, records):
    run = go("pattern=1:4,7:9,2:4", "sparsity=null", sweep=True)
    assert run.code == 2
    assert run.err.count("error:") == 1
    assert "M = 9" in run.err
    assert {key: record["status"] for key, record in records().items()} == {
        "1:4": "done",
        "7:9": "failed",
        "2:4": "done",
    }
    assert records()["2:4"]["sparsity"] == 0.5
    assert "M = 9" in records()["7:9"]["error"]


def test_a_table_run_says_that_a_cell_is_left_and_ends_with_its_code(tiny, results, capsys):
    arguments = [*tiny, f"results={results}", "sparsity=null"]
    assert sweep.main([*arguments, "pattern=7:9,2:4"]) == 2
    out, err = capsys.readouterr()
    assert "2 to run" in out
    assert "[2/2]" in out
    assert "not finished" in out
    assert "M = 9" in err
    assert sweep.main([*arguments, "pattern=2:4"]) == 0
    assert "1 done" in capsys.readouterr().out


def test_illegal_cells_of_a_sweep_are_left_out_aloud(go, records):
    run = go("allocator=atp", "allocator.beta=0.1,0.5", "sparsity=0.7", sweep=True)
    assert run.code == 0
    assert [record["science"]["allocator"]["beta"] for record in records().values()] == [0.1]
    assert run.err.startswith("warning: skipped:")
    assert "beta <= 0.2" in run.err


def test_without_wandb_the_record_is_safe(go, records, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = go("logger=wandb")
    assert run.code == 0
    assert run.err.count("\n") == 1
    assert run.err.startswith("warning: wandb was not written")
    assert records()[0.5]["status"] == "done"


def test_a_wandb_that_breaks_is_one_warning(go, records, monkeypatch):
    broken = ModuleType("wandb")

    def init(**_):
        raise ConnectionError("no such project")

    broken.init = init
    monkeypatch.setitem(sys.modules, "wandb", broken)
    run = go("logger=wandb")
    assert run.code == 0
    assert run.err.count("\n") == 1
    assert "ConnectionError: no such project" in run.err
    assert "the record itself is safe" in run.err
    assert records()[0.5]["status"] == "done"


def test_wandb_offline_needs_no_key_and_stays_in_the_results(go, results, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(results.parent))
    losa = ("method=losa", "method.steps=2", "tuning.windows=8", "tuning.seqlen=16")  # with curves of training
    run = go("logger=wandb", *losa)
    wandb.teardown()
    assert (run.code, run.err) == (0, "")
    (record,) = results.glob("runs/*/record.json")
    assert len(list(results.glob(f"wandb/offline-run-*-{record.parent.name}/*.wandb"))) == 1


def test_after_kill_9_only_the_unfinished_cells_run(tiny, results, go, records, files, evaluated):
    command = [sys.executable, "-c", KILLED, "-m", *tiny, f"results={results}", "sparsity=0.3,0.5,0.7"]
    run = subprocess.run(command, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert run.returncode == -signal.SIGKILL
    left = records()
    assert {key: record["status"] for key, record in left.items()} == {0.3: "done", 0.5: "running"}
    assert set(values(left[0.5])) == {"test"}
    (lease,) = results.glob("runs/*/lease")
    assert json.loads(lease.read_text())["pid"] > 0
    assert lease.parent.name == left[0.5]["key"]
    finished = results / "runs" / left[0.3]["key"] / "record.json"
    before = files()[finished]

    assert go("sparsity=0.3,0.5,0.7", sweep=True).code == 0
    assert {key: record["status"] for key, record in records().items()} == dict.fromkeys((0.3, 0.5, 0.7), "done")
    assert files()[finished] == before
    assert len(evaluated) == 3  # the held-out text of the killed cell, both texts of the last
    assert records()[0.5]["evaluations"]["test"] == left[0.5]["evaluations"]["test"]
    assert not list(results.glob("runs/*/lease*"))
