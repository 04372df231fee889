"""Cells with zero-shot tasks through the command line; the tasks' numbers are made up here."""

import os
import signal
import subprocess
import sys

import pytest

from sparsify.data import benchmarks
from sparsify.errors import NumericsError
from sparsify.evaluation.zeroshot import ZeroShot
from sparsify.types import Evaluation

KILLED = """
import os, signal, sys
from sparsify.commands.cli import launch
from sparsify.evaluation.zeroshot import ZeroShot
from sparsify.types import Evaluation

def deadly(self, subject):
    if self.task == "boolq":
        os.kill(os.getpid(), signal.SIGKILL)
    details = {"task": self.task, "limit": self.limit}
    return Evaluation(metric="acc", value=0.25, protocol=self.protocol, details=details)

ZeroShot.evaluate = deadly
ZeroShot.check = lambda *_: None
launch(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def rows_at_the_hub(monkeypatch, tmp_path):
    """The same keys here and in subprocesses, whatever this machine has."""
    monkeypatch.setenv("SPARSIFY_DATA", str(tmp_path))
    monkeypatch.setenv("SPARSIFY_ASSETS", str(tmp_path))
    benchmarks._provenance.cache_clear()


@pytest.fixture
def asked(monkeypatch):
    """Tasks in the order in which they were evaluated; those in `broken` fail."""
    seen, broken = [], {}

    def answer(self, subject):
        seen.append(self.task)
        if self.task in broken:
            raise broken[self.task]
        details = {"task": self.task, "limit": self.limit}
        return Evaluation(metric="acc", value=0.5, protocol=self.protocol, details=details)

    monkeypatch.setattr(ZeroShot, "evaluate", answer)
    monkeypatch.setattr(ZeroShot, "check", lambda *_: None)
    seen.append(broken)
    return seen


def done(records):
    (record,) = records().values()
    return set(record["evaluations"]) - {"test", "heldout"}


def test_every_task_is_an_evaluation_and_the_line_has_their_mean(go, records, asked):
    run = go("eval=zeroshot_wanda", "eval.limit=20")
    assert (run.code, run.err) == (0, "")
    assert len(done(records)) == len(asked) - 1 == 7
    assert "rte" in asked
    assert "piqa" not in asked
    assert "accuracy 50.00% (7 tasks, first 20 of each)" in run.out


def test_an_added_task_runs_alone(go, records, asked):
    go("eval=zeroshot", "eval.tasks=[boolq]")
    assert go("eval=zeroshot", "eval.tasks=[boolq,rte]").code == 0
    assert asked[1:] == ["boolq", "rte"]
    assert done(records) == {"boolq", "rte"}


def test_a_limit_makes_another_number(go, records, asked):
    go("eval=zeroshot", "eval.tasks=[boolq]", "eval.limit=5")
    go("eval=zeroshot", "eval.tasks=[boolq]")
    (record,) = records().values()
    assert asked[1:] == ["boolq", "boolq"]
    assert record["evaluations"]["boolq"]["protocol"] == "boolq@0-shot"
    assert [item["protocol"] for item in record["superseded"]] == ["boolq@0-shot, first 5"]
    go("eval=zeroshot", "eval.tasks=[boolq]", "eval.limit=5")  # asked for before: nothing is measured again
    (record,) = records().values()
    assert asked[1:] == ["boolq", "boolq"]
    assert record["evaluations"]["boolq"]["protocol"] == "boolq@0-shot, first 5"
    assert [item["protocol"] for item in record["superseded"]] == ["boolq@0-shot"]


def test_other_rows_make_another_number(go, asked, monkeypatch):
    go("eval=zeroshot", "eval.tasks=[boolq]")
    monkeypatch.setattr(benchmarks, "fingerprint", lambda task: {"sha256": "other"})
    go("eval=zeroshot", "eval.tasks=[boolq]")
    assert asked[1:] == ["boolq", "boolq"]


def test_a_task_that_fails_does_not_take_the_others_with_it(go, records, asked):
    asked[0]["rte"] = NumericsError("A log-likelihood is not finite", fix="dtype=float32")
    run = go("eval=zeroshot", "eval.tasks=[boolq,rte,piqa]")
    assert (run.code, run.err) == (1, "error: A log-likelihood is not finite. Fix: dtype=float32.\n")
    assert done(records) == {"boolq", "piqa"}
    asked[0].clear()
    assert go("eval=zeroshot", "eval.tasks=[boolq,rte,piqa]").code == 0
    assert asked[1:] == ["boolq", "rte", "piqa", "rte"]


def test_several_failures_are_one_message(go, records, asked):
    asked[0] |= {"rte": NumericsError("A log-likelihood is not finite"), "boolq": ValueError("no\nsuch column")}
    run = go("eval=zeroshot", "eval.tasks=[boolq,rte,piqa]")
    assert run.code == 1
    assert run.err.startswith(
        "error: 2 evaluations failed. Got: boolq: ValueError: no such column; rte: NumericsError: A"
    )
    assert run.err.count("error:") == 1
    assert done(records) == {"piqa"}


def test_a_task_nobody_knows_is_refused_before_anything_runs(go, records, asked):
    run = go("eval=zeroshot", "eval.tasks=[bolq]")
    assert run.code == 2
    assert "did you mean boolq" in run.err
    assert not records()
    assert asked == [{}]


def test_after_kill_9_between_two_tasks_nothing_is_lost(tiny, results, go, records, asked):
    tasks = ("eval=zeroshot", "eval.tasks=[rte,boolq,piqa]")
    command = [sys.executable, "-c", KILLED, *tiny, f"results={results}", *tasks]
    run = subprocess.run(command, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert run.returncode == -signal.SIGKILL
    assert done(records) == {"rte"}
    assert go(*tasks).code == 0
    assert asked[1:] == ["boolq", "piqa"]
    (record,) = records().values()
    assert (record["evaluations"]["rte"]["value"], record["status"]) == (0.25, "done")
