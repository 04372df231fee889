"""A sweep beside other processes: what they hold is waited for, what they leave is taken over."""

import json
import os
import socket
import subprocess
import sys

import psutil
import pytest

from sparsify.commands import cli, sweep
from sparsify.runs import planning


@pytest.fixture
def asked(tiny, results):
    return [*tiny, f"results={results}", "sparsity=0.3,0.5"]


@pytest.fixture
def held(asked):
    """A cell of the sweep that another process holds, and that process."""
    (part,) = planning.parts_of(None, asked)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    folder = part.cells[0].config["results"]
    lease = os.path.join(folder, "runs", part.cells[0].key, "lease")
    os.makedirs(os.path.dirname(lease))
    started = psutil.Process(other.pid).create_time()
    with open(lease, "w") as file:
        json.dump({"host": socket.gethostname(), "pid": other.pid, "started": started}, file)
    yield other
    other.kill()
    other.wait()


def test_a_cell_whose_holder_dies_is_taken_over(asked, held, monkeypatch, capsys):
    def die(_seconds):
        held.kill()
        held.wait()

    monkeypatch.setattr(sweep.time, "sleep", die)
    assert sweep.run(None, asked) == 0
    assert "waiting for 1 cell" in capsys.readouterr().out
    (part,) = planning.parts_of(None, asked)
    assert {cell.state for cell in part.cells} == {"done"}


def test_cells_that_fail_are_tried_once_and_counted(asked, monkeypatch, capsys):
    launched = []
    monkeypatch.setattr(sweep.cli, "launch", lambda arguments: launched.append(arguments) or 0)
    assert sweep.run(None, asked) == 1
    assert len(launched) == 1
    assert "2 cells not finished" in capsys.readouterr().out


def test_a_part_whose_cells_an_earlier_one_has_run_is_not_launched(asked, monkeypatch, capsys):
    """The first part asks for one evaluation more, so that the second has nothing left to do."""
    window = "{_target_:sparsify.data.windows.Windows,text:${test.text},split:test,seqlen:16,windows:3}"
    more = f"+eval.extra={{_target_:sparsify.evaluation.perplexity.Perplexity,windows:{window}}}"
    parts = [planning.parts_of(None, [*asked, *extra])[0] for extra in ([more], [])]
    launched, launch = [], cli.launch
    monkeypatch.setattr(sweep.cli, "launch", lambda arguments: launched.append(arguments) or launch(arguments))
    assert sweep._launch(parts) == 0
    assert len(launched) == 1
    assert "[2/2]" in capsys.readouterr().out
    assert {cell.state for cell in planning.parts_of(None, asked)[0].cells} == {"done"}


def test_ctrl_c_ends_the_sweep(asked, monkeypatch):
    launched = []
    monkeypatch.setattr(sweep.cli, "launch", lambda arguments: launched.append(arguments) or 130)
    assert sweep.run("table1", [f"results={asked[-2].partition('=')[2]}"]) == 130
    assert len(launched) == 1


def test_a_multirun_with_a_cell_that_another_process_holds_is_not_over(asked, held, capsys):
    assert cli.main(["-m", *asked]) == 1
    out = capsys.readouterr().out
    assert "1 cell not finished; see: python -m sparsify.plan" in out
    held.kill()
    held.wait()
    assert cli.main(["-m", *asked]) == 0
    assert "not finished" not in capsys.readouterr().out
