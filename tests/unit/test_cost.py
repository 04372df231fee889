import pytest

from sparsify.runs import identity, menu
from sparsify.runs.cost import Costs
from sparsify.runs.record import Record, Recorded
from sparsify.types import Evaluation


def finished(overrides, seconds):
    """A finished record of these overrides that took so many seconds a step."""
    config = menu.compose(overrides)
    result = Recorded("key", Evaluation(metric="perplexity", value=1.0, protocol="p"))
    evaluations = {name: result for name in seconds if name not in ("load", "prune")}
    return Record("key", "done", identity.science(config), {}, evaluations=evaluations, seconds=seconds)


def expected(costs, *overrides, evaluations=("test",)):
    return costs.expected(menu.compose(overrides), evaluations)


COSTS = Costs.of(
    [
        finished(["allocator=atp", "allocator.beta=0.01"], {"load": 9.0, "prune": 2.0, "test": 1.0}),
        finished(["allocator=atp", "allocator.beta=0.02"], {"load": 0.0, "prune": 4.0, "test": 2.0}),
        finished(["allocator=atp"], {"load": 0.0, "prune": 60.0, "test": 1.0}),
        finished(["allocator=search", "allocator.trials=10"], {"prune": 100.0, "test": 1.0, "boolq": 7.0}),
        finished(["sparsity=0"], {"prune": 0.1, "test": 1.0}),
    ]
)


@pytest.mark.parametrize(
    ("overrides", "seconds"),
    [
        (["allocator=atp", "allocator.beta=0.03"], 4.0),  # the median of 2 and 4, and of the tests
        (["allocator=atp"], 61.0),
        (["allocator=atp", "pruner=sparsegpt"], 61.0),  # no better known
        (["allocator=search", "allocator.trials=10"], 101.0),
        (["allocator=search", "allocator.trials=11"], None),
        (["allocator=owl"], None),
        (["sparsity=0", "allocator=owl"], 1.1),
        (["allocator=atp", "scale=paper"], None),
        (["allocator=atp", "model=opt-125m"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_cell_takes_what_cells_of_its_kind_took(overrides, seconds):
    assert expected(COSTS, *overrides) == (None if seconds is None else pytest.approx(seconds))


def test_an_evaluation_is_a_cost_of_its_own():
    assert expected(COSTS, "allocator=atp", evaluations=("test", "boolq")) == pytest.approx(68.0)
    assert expected(COSTS, "allocator=atp", evaluations=("test", "piqa")) is None
