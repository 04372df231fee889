from dataclasses import replace

import pandas as pd
import pytest

from sparsify.errors import UsageError
from sparsify.report import frame, layouts
from sparsify.report.layouts import compare
from sparsify.report.layouts.entries import Entry, grid_frame
from sparsify.report.numbers import format_number, paper_numbers
from sparsify.report.select import pick, where
from sparsify.runs import registry
from sparsify.runs.record import Record

LAYOUT = layouts.load("table1")


def record(allocator, sparsity, test, heldout, beta=None, key=None):
    """A finished cell as the store has it, as far as reports read it."""
    targets = {"uniform": "uniform.Uniform", "atp": "arithmetic.Arithmetic", "owl": "owl.OWL"}
    node = {"_target_": f"sparsify.allocators.{targets[allocator]}", "version": 1}
    if beta is not None:
        node["beta"] = beta
    zeros = round(100 * sparsity)
    tree = {
        "schema": 1,
        "status": "done",
        "key": key or f"{allocator}-{sparsity}-{beta}",
        "sparsity": sparsity,
        "science": {
            "scale": "embedded",
            "model": {"name": "m"},
            "dtype": "float32",
            "pattern": "unstructured",
            "sparsity": sparsity,
            "seed": 0,
            "pruner": {"_target_": "sparsify.pruners.wanda.Wanda", "group": "row"},
            "allocator": node,
            "method": {"_target_": "sparsify.methods.oneshot.OneShot", "regime": "propagated"},
        },
        "layers": [{"block": i, "zeros": zeros, "numel": 100} for i in range(2)],
        "seconds": {"prune": 1.0},
        "calibration": {"source": "random token ids"},
        "execution": {
            "device": "cpu",
            "commit": "0" * 40,
            "finished": "now",
            "versions": {"torch": "2", "transformers": "5"},
        },
        "evaluations": {
            name: {"key": name, "metric": "perplexity", "value": value, "protocol": f"t{name}@8"}
            for name, value in (("test", test), ("heldout", heldout))
        },
    }
    return Record.from_json(tree, "record.json")


def cells():
    records = [
        record("uniform", 0.0, 20.0, 21.0),
        record("uniform", 0.7, 300.0, 310.0),
        record("atp", 0.7, 150.0, 190.0, beta=0.002),
        record("atp", 0.7, 160.0, 180.0, beta=0.004),
    ]
    return frame.wide(frame.long(records))


def test_long_rows_survive_a_csv(tmp_path):
    rows = frame.long([record("atp", 0.7, 1.5, 2.5, beta=0.01)])
    rows.to_csv(tmp_path / "rows.csv", index=False)
    back = frame.read_long(tmp_path / "rows.csv")
    assert frame.wide(back)["test"].tolist() == [1.5]
    assert frame.profiles(frame.wide(back)) == {"atp-0.7-0.01": [0.7, 0.7]}


def test_what_an_allocator_noted_by_block_is_in_the_rows(tmp_path):
    notes = {"strength": 0.4, "r": [0.5, 1.25], "alpha": {"q_proj": 2.0}, "finalists": [{"rank": 1}], "tau": None}
    frame.long([replace(record("owl", 0.7, 1.5, 2.5), notes=notes)]).to_csv(tmp_path / "rows.csv", index=False)
    row = frame.wide(frame.read_long(tmp_path / "rows.csv")).iloc[0]
    assert {c: row[c] for c in row.index if c.startswith("noted.")} == {"noted.strength": 0.4, "noted.r": "0.5|1.25"}


def test_both_selection_rules_report_the_test_value():
    found = {(e.label, e.sparsity): e for e in LAYOUT.entries(cells())}
    assert (found["ATP, best β by test", 0.7].value, found["ATP, best β by test", 0.7].note) == (150.0, "beta 0.002")
    assert (found["ATP, best β by held-out", 0.7].value, found["ATP, best β by held-out", 0.7].note) == (
        160.0,
        "beta 0.004",
    )
    assert found["dense", 0.0].value == 20.0


def test_a_cell_that_has_not_run_is_a_dash_and_papers_stand_beside_ours():
    found = LAYOUT.entries(cells())
    shown = grid_frame(found, paper_numbers(LAYOUT.paper), ["llama-7b", "llama2-7b"])
    assert shown.loc[("wanda", "OWL"), ("ours", "70%")] == "–"
    assert shown.loc[("wanda", "OWL"), ("llama-7b", "70%")] == "24.55"
    assert shown.loc[("wanda", "ATP, best β by held-out"), ("llama2-7b", "70%")] == ""


def test_protocols_never_share_a_table():
    mixed = cells()
    mixed.loc[0, "test.protocol"] = "other@8"
    with pytest.raises(UsageError, match="protocols"):
        LAYOUT.entries(mixed)


def test_an_ambiguous_entry_is_an_error_and_not_a_guess():
    with pytest.raises(ValueError, match="no selection rule"):
        pick(where(cells(), {"allocator": "atp"}), None)


def test_conditions_compare_numbers_by_value_and_booleans_by_identity():
    data = pd.DataFrame({"key": ["a", "b"], "s": [0.1 + 0.2, 0.5], "clip": pd.Series([True, 1], dtype=object)})
    assert where(data, {"s": 0.3})["key"].tolist() == ["a"]
    assert where(data, {"clip": True})["key"].tolist() == ["a"]
    assert where(data, {"nowhere": 1}).empty


@pytest.mark.parametrize(
    ("value", "text"), [(5.678, "5.68"), (101.26, "101.3"), (2053.8, "2054"), (123456.0, "1.2e+05")]
)
def test_numbers_are_printed_as_the_papers_do(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(("value", "limit"), [(50.0, 0.01), (500.0, 0.03), (5000.0, 0.1)])
def test_tolerance_grows_with_the_perplexity(value, limit):
    layout = layouts.load("reference")
    assert compare.tolerance(value, layout) == limit


@pytest.mark.parametrize("sparsities", [[0.7], [0.5, 0.7]])
def test_more_allocations_than_colours_get_a_panel_each(sparsities, tmp_path):
    import matplotlib.pyplot as plt

    from sparsify.report import figures
    from sparsify.report.layouts import perplexity_figures

    labels = [f"rule {i}" for i in range(len(figures.COLOURS) + 2)]
    found = [Entry("wanda", label, s, 1.0, "", f"{label}{s}", "") for label in labels for s in sparsities]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_save", lambda figure, files: drawn.append(figure))
        perplexity_figures.layer_profile(tmp_path, "profile", found, {e.key: [e.sparsity] * 4 for e in found})
    panels = [axes for axes in drawn[0].axes if axes.axison]
    assert [axes.get_title() for axes in panels] == labels
    for axes in panels:
        own = {line.get_label() for line in axes.get_lines()} & {f"{s:.0%}" for s in sparsities}
        assert len(own) == len(sparsities)
    plt.close(drawn[0])


def test_a_parameter_that_came_later_has_its_former_value(monkeypatch):
    grown = {"pruner": {"wanda": {"power": 0.5}}, "allocator": {"atp": {"gamma": 1}}}
    monkeypatch.setattr(registry, "former_values", lambda group: grown.get(group, {}))
    rows = frame.long([record("uniform", 0.5, 1.0, 2.0), record("atp", 0.5, 1.0, 2.0, beta=0.1)])
    cells = frame.wide(rows.assign(**{"pruner.power": [None, None, 0.7, 0.7]}))
    assert where(cells, {"pruner.power": 0.5})["allocator"].tolist() == ["uniform"]
    assert where(cells, {"pruner.power": 0.7})["allocator"].tolist() == ["atp"]
    assert where(cells, {"allocator.gamma": 1})["allocator"].tolist() == ["atp"]


def test_stages_after_pruning_are_columns(monkeypatch):
    stage = {"_target_": "elsewhere.Rounding", "bits": 4}
    old = record("owl", 0.5, 1.0, 2.0)
    rows = frame.long([old, replace(old, key="b", science=old.science | {"quantiser": stage, "part": "language"})])
    cells = frame.wide(rows).set_index("key")
    assert cells.loc["b", ["quantiser", "quantiser.bits", "part"]].tolist() == ["Rounding", 4, "language"]
    assert cells.loc[old.key, ["quantiser", "part"]].isna().all()
