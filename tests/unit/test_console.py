import io

import pytest
from rich.console import Console

from sparsify.runs import console, registry
from sparsify.runs.registry import composed


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "absorption(owl, strength=0.2)"),
        ({"source": "noise"}, "absorption(owl, strength=0.2, eta=0.01, site=output)"),
        ({"source": "noise", "spared": 1}, "absorption(owl, strength=0.2, eta=0.01, site=output, spared=1)"),
        ({"control": "ramp"}, "absorption(owl, strength=0.2, ramp)"),
    ],
    ids=str,
)
def test_cells_of_a_sweep_are_told_apart(options, label):
    node = composed("allocator", "absorption")
    node.strength, node.control = 0.2, options.get("control", "none")
    if "source" in options:
        node.source = composed("perturbation", options["source"])
        node.source.spared = options.get("spared", 0)
    science = {
        "model": {"name": "m"},
        "pruner": composed("pruner", "wanda"),
        "allocator": node,
        "pattern": "unstructured",
        "sparsity": 0.7,
    }
    assert registry.names("perturbation") == ["noise", "pruned"]
    assert console.describe(science) == f"m, wanda + {label}, 70%"


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
