import io

import pytest
from rich.console import Console

from sparsify.runs import console


@pytest.fixture
def lines(monkeypatch):
    """Progress on a clock of our own; what was printed."""
    now, text = [0.0], io.StringIO()
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = console._Lines(Console(file=text, width=200), "pruning", 0.0)

    def at(seconds, *call):
        now[0] = seconds
        progress(*call)

    return at, lambda: [line.strip() for line in text.getvalue().splitlines()]


def test_a_phase_is_named_and_what_is_left_estimated(lines):
    at, printed = lines
    for block in range(1, 5):
        at(10.0 * block, "block", block, 4)
    assert printed() == [
        "pruning: block 1 of 4, about 30 s left",
        "pruning: block 2 of 4, about 20 s left",
        "pruning: block 3 of 4, about 10 s left",
        "pruning: block 4 of 4, about 0 s left",
    ]


def test_phases_inside_others_are_quiet_while_these_go_on(lines):
    at, printed = lines
    at(0.0, "trial", 0, 2)
    for trial in (1, 2):
        for block in range(1, 5):
            at(10.0 * trial - 10 + block, "block", block, 4)
        at(10.0 * trial, "trial", trial, 2)
    assert printed() == ["pruning: trial 1 of 2, about 10 s left", "pruning: trial 2 of 2, about 0 s left"]


def test_a_long_trial_says_where_it_is(lines):
    at, printed = lines
    at(0.0, "trial", 0, 8)
    for block in range(1, 5):
        at(30.0 * block, "block", block, 4)
    at(121.0, "trial", 1, 8)
    at(200.0, "block", 2, 4)
    assert printed()[:2] == ["pruning: trial 1 of 8, block 1 of 4", "pruning: trial 1 of 8, block 2 of 4"]
    assert printed()[-1] == "pruning: trial 2 of 8, block 2 of 4, about 23 min left"


def test_what_follows_a_finished_phase_is_no_part_of_it(lines):
    at, printed = lines
    at(0.0, "trial", 0, 1)
    at(5.0, "trial", 1, 1)
    at(7.0, "block", 1, 1)
    assert printed()[-1] == "pruning: block 1 of 1, about 0 s left"


def test_counting_anew_is_a_phase_anew(lines):
    at, printed = lines
    at(10.0, "block", 4, 4)
    at(11.0, "block", 1, 4)
    assert printed()[-1] == "pruning: block 1 of 4, about 3 s left"
