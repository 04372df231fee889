import importlib.util
import json
import sys
from dataclasses import replace

import pandas as pd
import pytest
import swaps
import torch
from torch.nn import functional as F

from sparsify import paths
from sparsify.analysis.error_growth import METRICS, Growth, error_growth
from sparsify.data.corpora import Corpus
from sparsify.data.inputs import TokenInputs
from sparsify.data.windows import Windows
from sparsify.errors import NumericsError, UsageError
from sparsify.evaluation.base import Evaluator, Subject
from sparsify.evaluation.error_growth import ErrorGrowth
from sparsify.model.blocks import BlockView
from sparsify.report import frame, layouts
from sparsify.report.layouts import curves
from sparsify.types import Measurement

LAYOUT = layouts.load("error_growth")


def states(model, tokens):
    """Block outputs by a plain forward of the whole model, [block][n, seq, dim]."""
    found = []
    handles = [b.register_forward_hook(lambda _m, _a, out: found.append(out)) for b in BlockView(model).blocks]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return [out[0] if isinstance(out, tuple) else out for out in found]


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def pruned(make_model):
    """A model whose first block lost its down projection, and its dense weights."""
    model = make_model()
    view = BlockView(model)
    dense = view.snapshot()
    next(x for x in view.layers_of(0) if x.spec.kind == "mlp.down_proj").weight.zero_()
    return model, view, dense


def test_a_model_that_was_not_pruned_has_no_error(make_model, tokens):
    view = BlockView(make_model())
    growth = error_growth(view, view.snapshot(), tokens)
    for name in ("absolute", "relative", "own", "inherited", "update", "absolute_median"):
        assert torch.equal(getattr(growth, name), torch.zeros(2, 5, dtype=torch.float64)), name
    assert torch.allclose(growth.cosine, torch.ones(2, 5, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_errors_are_the_differences_of_two_whole_models(make_model, pruned, tokens, batch_size):
    model, view, dense = pruned
    growth = error_growth(view, dense, tokens, batch_size=batch_size)
    for block, (t, h) in enumerate(zip(states(model, tokens), states(make_model(), tokens), strict=True)):
        square, norm = (t - h).square().sum(-1).double(), h.square().sum(-1).double()
        expected = {
            "absolute": square.mean(1),
            "absolute_median": square.median(1).values,
            "norm": norm.mean(1),
            "relative": (square / norm).sqrt().mean(1),
            "cosine": F.cosine_similarity(t, h, dim=-1).double().mean(1),
        }
        for name, values in expected.items():
            assert torch.allclose(getattr(growth, name)[block], values, rtol=1e-4), (name, block)


def test_an_error_is_either_a_block_s_own_or_inherited(pruned, tokens):
    _, view, dense = pruned
    growth = error_growth(view, dense, tokens)
    assert torch.equal(growth.own[0], growth.absolute[0])
    assert torch.equal(growth.inherited[0], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(growth.own[1], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(growth.inherited[1], growth.absolute[1])
    assert float(growth.amplification("mean")[0]) == pytest.approx(
        float(growth.absolute[1].sum() / growth.absolute[0].sum())
    )


def test_half_precision_accumulates_in_double(pruned, tokens):
    model, view, dense = pruned
    model.half()
    growth = error_growth(view, {name: weight.half() for name, weight in dense.items()}, tokens)
    assert all(getattr(growth, name).dtype == torch.float64 for name in METRICS)


@pytest.mark.parametrize("flaw", ["missing", "nan"])
def test_the_pruned_weights_are_back_after_an_error(pruned, tokens, flaw):
    model, view, dense = pruned
    before = view.snapshot()
    last = view.layers[-1].spec.name
    broken = {**dense, last: torch.full_like(dense[last], torch.nan)}
    if flaw == "missing":
        del broken[last]
    with pytest.raises(KeyError if flaw == "missing" else NumericsError):
        error_growth(view, broken, tokens)
    assert all(torch.equal(before[name], weight) for name, weight in view.snapshot().items())
    assert hooks(model) == 0


def test_the_evaluator_measures_and_leaves_the_model_alone(pruned, tokens):
    model, view, dense = pruned
    before = view.snapshot()
    evaluator = ErrorGrowth(Windows(Corpus("text"), "heldout", 12, 5))
    assert isinstance(evaluator, Evaluator)
    text = TokenInputs(tokens, "heldout", {"source": "ids"})
    found = evaluator.evaluate(Subject(view, None, lambda _: text, dense)).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["metric"], found["protocol"]) == ("relative_error", "text-heldout@12x5")
    everything = [found, *found["more"]]
    assert [m["metric"] for m in everything] == ["relative_error", *(n for n in METRICS if n != "relative")]
    assert all(len(m["curve"]) == len(m["curve_stderr"]) == 2 and m["value"] == m["curve"][-1] for m in everything)
    assert all(torch.equal(before[name], weight) for name, weight in view.snapshot().items())
    assert hooks(model) == 0


def test_one_window_has_no_standard_error(pruned, tokens):
    _, view, dense = pruned
    text = TokenInputs(tokens[:1], "heldout", {"source": "ids"})
    growth = ErrorGrowth(Windows(Corpus("text"), "heldout", 12, 1)).evaluate(Subject(view, None, lambda _: text, dense))
    assert growth.stderr is None


def measured(allocator, beta, height):
    """Long rows of one cell with all curves, as a record would give them."""
    shared = {"key": f"{allocator}{beta}", "model": "m", "scale": "s", "pruner": "wanda", "allocator": allocator}
    shared |= {"allocator.beta": beta, "sparsity": 0.7, "protocol": "t@8", "text_sha256": "0"}
    curve = [height * (i + 1) for i in range(8)]
    item = Measurement(metric="relative_error", value=curve[-1], stderr=0.1, curve=curve, curve_stderr=[0.1] * 8)
    perplexity = Measurement(metric="perplexity", value=100 * height)
    rows = [shared | {"evaluation": "test"} | frame._measurement(perplexity)]
    rows += [shared | {"evaluation": "error_growth"} | frame._measurement(item)]
    for name in METRICS:
        rows.append(shared | {"evaluation": f"error_growth.{name}"} | frame._measurement(replace(item, metric=name)))
    return rows


def cells_from_csv(folder):
    rows = [measured("uniform", None, 0.5), measured("atp", 0.004, 0.25), measured("atp", -0.01, 1.0)]
    pd.DataFrame([row for cell in rows for row in cell]).to_csv(folder / "rows.csv", index=False)
    return frame.wide(frame.read_long(folder / "rows.csv"))


def test_curves_survive_a_csv_and_are_tabulated_by_depth(tmp_path):
    found = curves.lines(LAYOUT, cells_from_csv(tmp_path))
    assert [line.label for line in found] == ["uniform", "ATP, β = -0.01", "ATP, β = 0.004"]
    assert found[0].values("error_growth", "curve_stderr") == [0.1] * 8
    shown = curves.summary(LAYOUT, found)
    assert shown.loc[("wanda", "uniform")].tolist() == ["50.00", "1.000", "2.000", "3.000", "4.000", "4.000"]


def test_the_figure_of_a_csv_is_the_same_twice(tmp_path):
    found = curves.lines(LAYOUT, cells_from_csv(tmp_path))
    one, two = (curves.figure(tmp_path / name, "error_growth", LAYOUT, found, "title") for name in ("one", "two"))
    assert [file.suffix for file in one] == [".png", ".pdf"]
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def test_a_table_of_curves_without_curves_says_what_to_run(tmp_path):
    cells = cells_from_csv(tmp_path).drop(columns="error_growth.curve")
    with pytest.raises(UsageError, match="eval=error_growth"):
        curves.lines(LAYOUT, cells)


def test_a_pair_is_put_in_both_orders_and_the_others_stay():
    assert swaps.orders([0.6, 0.8, 0.7], 1) == ((0.6, 0.7, 0.8), (0.6, 0.8, 0.7))
    ascending, descending = swaps.orders([0.6, 0.7, 0.8], 0, gap=0.3)
    assert ascending == pytest.approx((0.5, 0.8, 0.8))
    assert descending == pytest.approx((0.8, 0.5, 0.8))


def test_a_verdict_counts_pairs_and_a_tie_is_no_win():
    found = swaps.verdict("perplexity", [1.0, 1.0, 2.0, 1.0], [2.0, 1.1, 1.0, 1.0])
    assert (found.wins, found.pairs) == (2, 4)
    assert found.low < 0.5 < found.high
    assert found.change == pytest.approx(0.05)


def test_the_recursion_is_found_in_errors_that_follow_it():
    runs, start = {}, [0.2, 1.2, 0.7, 40.0]
    for profile in ((0.5, 0.6, 0.9, 0.7), (0.9, 0.7, 0.5, 0.6), (0.5, 0.9, 0.6, 0.7)):
        errors = [1.0 + profile[0]]
        for block in (1, 2, 3):
            errors.append(1.5 * errors[-1] + start[block] + 3 * profile[block])
        values = torch.tensor(errors, dtype=torch.float64)[:, None]
        runs[profile] = Growth(**dict.fromkeys(METRICS, values))
    fit = swaps.fit_recursion(runs, "absolute")
    assert (fit.c, fit.b, fit.explained) == pytest.approx((1.5, 3.0, 1.0))


@pytest.fixture
def script(monkeypatch):
    file = paths.root() / "experiments" / "atp" / "adjacent_swaps.py"
    spec = importlib.util.spec_from_file_location("adjacent_swaps", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "adjacent_swaps", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


SMALL = ["model=shape/tiny", *(f"{t}.{k}" for t in ("calibration", "heldout") for k in ("windows=2", "seqlen=16"))]


@pytest.mark.parametrize("gap", [[], ["--gap", "0.1"]])
def test_the_swap_experiment_writes_a_row_per_pair(script, tmp_path, capsys, gap):
    assert script.main([*gap, *SMALL, f"results={tmp_path}"]) == 0
    rows = pd.read_csv(next((tmp_path / "tables").glob("adjacent_swaps_*.csv")))
    assert rows["block"].tolist() == [1, 2, 3]
    assert (rows["sparsity 0, ascending"] < rows["sparsity 1, ascending"]).all()
    assert "perplexity" in capsys.readouterr().out


def test_a_profile_without_unequal_neighbours_is_refused(script, tmp_path, capsys):
    assert script.main([*SMALL, "allocator.beta=0.0", f"results={tmp_path}"]) == 2
    assert "--gap" in capsys.readouterr().err
