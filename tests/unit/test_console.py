import io

from rich.console import Console

from sparsify.runs import console


def test_what_is_left_is_estimated_anew_when_the_count_begins_again(monkeypatch):
    """Four blocks of ten seconds, as many of one second, and a count of two trials around them."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    text = io.StringIO()
    update = console._quarters(Console(file=text, width=200), "pruning", 0.0)
    for step, trial in ((10.0, 1), (1.0, 2)):
        for block in range(1, 5):
            now[0] += step
            update(block, 4)
        update(trial, 2)
    lines = text.getvalue().splitlines()
    assert [line.rsplit(", ", 1)[1] for line in lines] == [
        *("about 30 s left", "about 20 s left", "about 10 s left", "about 0 s left", "about 40 s left"),
        *("about 3 s left", "about 2 s left", "about 1 s left", "about 0 s left", "about 0 s left"),
    ]
