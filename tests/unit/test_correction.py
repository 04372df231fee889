"""Tables and figures of absorption: what the correction does to a rule, and the curves it is read from."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from sparsify.analysis.absorption import absorption
from sparsify.analysis.drift import drift
from sparsify.analysis.perturbation import Noise, PrunedBlock
from sparsify.data.corpora import Corpus
from sparsify.data.inputs import TokenInputs
from sparsify.data.windows import Windows
from sparsify.errors import UsageError
from sparsify.evaluation.absorption import AbsorptionCurves
from sparsify.evaluation.base import Evaluator, Subject
from sparsify.model.blocks import BlockView
from sparsify.report import frame, layouts
from sparsify.report.layouts import absorption as absorption_report
from sparsify.report.layouts import correction, correction_figures
from sparsify.runs import registry

TASKS = layouts.load("table3").zeroshot.tasks


def cell(key, seed, test, heldout=0.0, allocator="owl", **more):
    shared = {"key": key, "pruner": "wanda", "sparsity": 0.7, "seed": seed, "allocator": allocator}
    return shared | {"test": test, "heldout": heldout, "block_sparsity": "0.60000|0.80000"} | more


def corrected(key, seed, strength, test, heldout, control="none", source="pruned", **more):
    inner = {"allocator.inner": "owl", "allocator.strength": strength}
    inner |= {"allocator.source": source, "allocator.control": control}
    return cell(key, seed, test, heldout, "absorption", **inner, **more)


def asked(accuracy):
    return dict.fromkeys(TASKS, accuracy) | {f"{name}.protocol": f"{name}@0-shot" for name in TASKS}


@pytest.fixture
def cells():
    return pd.DataFrame(
        [
            cell("a", 0, 100.0, **asked(0.30)),
            cell("b", 1, 200.0),
            corrected("c", 0, 0.2, 90.0, 9.0),
            corrected("d", 0, 0.8, 50.0, 9.5),  # better on the test text, which must not choose
            corrected("e", 1, 0.2, 10.0, 9.0),
            corrected("f", 1, 0.8, 180.0, 8.0),
            corrected("g", 0, 0.8, 120.0, 9.0, control="ramp"),
            corrected("h", 0, "auto", 1.0, 1.0, **asked(0.35)),
        ]
    )


@pytest.fixture
def layout():
    return layouts.load("table3")


def test_the_strength_is_chosen_by_heldout_text_for_every_seed(cells, layout):
    found = correction.corrections(layout, cells)
    assert [item.label for item in found] == ["corrected", "control: depth ramp"]
    assert list(found[0].chosen["key"]) == ["c", "f"]
    assert found[0].changes("test") == pytest.approx({0: math.log(0.9), 1: math.log(0.9)})
    assert found[1].changes("test") == pytest.approx({0: math.log(1.2)})


def test_a_correction_stands_below_its_rule_with_what_it_changes(cells, layout):
    found, accuracy = correction.corrections(layout, cells), correction.accuracies(layout, cells)
    table = correction.summary(layout, found, accuracy)
    assert list(table.index.get_level_values("allocation")) == ["OWL", "OWL, corrected", "OWL, control: depth ramp"]
    rows = [list(row) for _, row in table.iterrows()]
    assert rows[0] == ["150.0 ± 635.3 (2)", "", "", "30.00", ""]
    assert rows[1] == ["135.0 ± 571.8 (2)", "-10.0% [-10.0, -10.0]", "0.2 (1), 0.8 (1)", "35.00", "+5.00"]
    assert rows[2] == ["120.0", "+20.0%", "0.8 of 0.8", "", ""]


def test_seeds_choose_among_strengths_that_all_of_them_have(cells, layout):
    more = pd.concat([cells, pd.DataFrame([corrected("i", 1, 1.6, 1.0, 1.0)])])
    assert list(correction.corrections(layout, more)[0].chosen["key"]) == ["c", "f"]


def test_a_seed_that_lacks_a_strength_does_not_take_it_from_the_others(cells, layout):
    whole = [corrected(f"{s}{x}", s, x, 1.0, x) for s in (2, 3, 4) for x in (0.2, 0.8, 1.6)]
    row = correction.corrections(layout, pd.concat([cells, pd.DataFrame(whole)]))[0]
    assert sorted(row.chosen.index) == [0, 1, 2, 3, 4]  # two strengths of five seeds are more than three of three
    row = correction.corrections(layout, pd.concat([cells[cells["seed"] == 0], pd.DataFrame(whole)]))[0]
    assert sorted(row.chosen.index) == [2, 3, 4]
    assert set(row.compared["allocator.strength"]) == {0.2, 0.8, 1.6}


def test_a_correction_whose_rule_has_not_run_has_no_change(cells, layout):
    found = correction.corrections(layout, cells[cells["allocator"] != "owl"])
    table = correction.summary(layout, found, correction.accuracies(layout, cells))
    assert [row[:2] for row in table.to_numpy().tolist()[:2]] == [["–", ""], ["135.0 ± 571.8 (2)", ""]]


def test_a_cell_that_was_not_measured_is_left_out(cells, layout):
    found = correction.corrections(layout, cells.assign(test=cells["test"].where(cells["key"] != "b")))
    assert found[0].changes("test") == pytest.approx({0: math.log(0.9)})


def test_the_papers_averages_stand_beside_ours_at_their_sparsity(cells, layout):
    accuracy = correction.accuracies(layout, cells)
    found = correction.corrections(layout, pd.concat([cells, cells.assign(sparsity=0.6)]))
    of_one_rule = correction.averages(layout, found, accuracy)
    assert list(of_one_rule.loc["wanda 70%"].iloc[0]) == ["–", "-7.13%", "–", "+1.02"]
    table = correction.averages(replace(layout, averaged=["owl"]), found, accuracy)
    assert list(table.loc["wanda 70%"].iloc[0]) == ["-10.0% [-10.0, -10.0]", "-7.13%", "+5.00", "+1.02"]
    assert list(table.loc["wanda 60%"].iloc[0]) == ["-10.0% [-10.0, -10.0]", "", "–", ""]


def test_no_zero_shot_cell_is_no_accuracy(cells, layout):
    assert correction.accuracies(layout, cells.drop(columns=list(TASKS)))("wanda", 0.7, "owl", None) == {}


def test_zero_shot_over_seeds_is_a_mean_with_the_paired_gain(cells, layout):
    more = pd.DataFrame([cell("j", 1, 200.0, **asked(0.32)), corrected("k", 1, "auto", 1.0, 1.0, **asked(0.33))])
    more = pd.concat([cells[cells["key"] != "b"], more])
    found, accuracy = correction.corrections(layout, more), correction.accuracies(layout, more)
    assert accuracy("wanda", 0.7, "owl", None) == pytest.approx({0: 30.0, 1: 32.0})
    rows = [list(row)[3:] for _, row in correction.summary(layout, found, accuracy).iterrows()]
    assert rows[0] == ["31.00 ± 12.71 (2)", ""]
    assert rows[1] == ["34.00 ± 12.71 (2)", "+3.00 [-22.41, +28.41]"]


def test_the_correction_is_held_against_its_controls_seed_by_seed(cells, layout):
    found = correction.corrections(layout, cells)
    table = correction.against(layout, found)
    assert list(table.index) == [("wanda 70%", "OWL")]
    assert table["control: depth ramp", ""].iloc[0] == "-25.0%"  # 90 over 120, the one seed that both have
    assert table["control: permuted", ""].iloc[0] == ""
    assert correction.against(layout, found[:1]).empty


@pytest.mark.parametrize("kind", ["strength_figure", "profile_figure"])
def test_figures_of_a_correction_are_drawn(cells, layout, tmp_path, kind):
    found = correction.corrections(layout, cells)
    more = ("W2@8",) if kind == "strength_figure" else ()
    files = getattr(correction_figures, kind)(tmp_path, "x", layout, found, "title", *more)
    assert [file.suffix for file in files] == [".png", ".pdf"]
    assert all(file.stat().st_size > 1000 for file in files)


def test_a_component_inside_another_is_named_in_its_column():
    node = OmegaConf.to_container(registry.composed("allocator", "absorption"), resolve=True)
    row = frame._component("allocator", "allocator", node)
    assert (row["allocator"], row["allocator.inner"], row["allocator.source"]) == ("absorption", "owl", "pruned")
    assert (row["allocator.inner.lam"], row["allocator.source.pruner"]) == (0.08, "wanda")
    assert json.loads(row["allocator.grid"])[0] == 0.0


def test_a_component_inside_another_may_be_swapped_and_is_built():
    assert registry.build("allocator", "absorption").source == PrunedBlock(registry.build("pruner", "wanda"))
    assert registry.build("allocator", ("absorption", {"control": "ramp"})).control == "ramp"


@pytest.fixture
def measured(make_model, tokens):
    """A model of four blocks, and what one evaluation found."""
    model = make_model(num_hidden_layers=4)
    evaluator = AbsorptionCurves(Windows(Corpus("text"), "train", 12, 5), Noise(0.1), limit=3, seeds=2, followed=2)
    assert isinstance(evaluator, Evaluator)
    text, view = TokenInputs(tokens, "train", {"source": "ids"}), BlockView(model)
    return view, evaluator.evaluate(Subject(view, None, lambda _: text, {}))


def test_the_evaluation_holds_the_curves_of_the_drift(measured, tokens):
    view, result = measured
    found = result.to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    moved = drift(view, tokens[:3], Noise(0.1), seeds=2)
    read = absorption(moved)
    assert found["protocol"] == "text-train@12x5, first 3, 2 draws"
    assert found["curve"] == pytest.approx(read.r.tolist())
    assert found["curve_stderr"] == pytest.approx(read.stderr.tolist())
    assert found["value"] == pytest.approx(float(read.r[:-1].prod() ** (1 / 3)))
    more = {item["metric"]: item["curve"] for item in found["more"]}
    relative, cosine = moved.relative.mean((2, 3)), moved.cosine.mean((2, 3))
    by_window = moved.relative[2, 2:].mean(1)
    errors = {item["metric"]: item.get("curve_stderr") for item in found["more"]}
    assert errors["relative.3"] == pytest.approx((by_window.std(1) / 3**0.5).tolist())
    assert errors["turned.3"] is not None
    assert errors["handed_on.3"] is None
    assert more["size"] == pytest.approx([0.1] * 4, rel=1e-4)
    assert {name for name in more if name.startswith("relative")} == {"relative.1", "relative.3"}
    assert more["relative.3"] == pytest.approx(relative[2, 2:].tolist())
    assert more["turned.1"] == pytest.approx((1 - cosine[0]).tolist())
    assert more["handed_on.1"] == pytest.approx(moved.handed_on()[0].mean((1, 2)).tolist())
    squares = moved.start.square()
    assert more["first_token"] == pytest.approx((squares[..., 0] / squares.sum(-1)).mean((1, 2)).tolist())
    assert more["falls"][2:] == [float(relative[2, 3] < relative[2, 2]), 1.0]


def test_one_window_and_one_draw_have_no_standard_error(make_model, tokens):
    evaluator = AbsorptionCurves(Windows(Corpus("text"), "train", 12, 5), Noise(0.1), limit=1, seeds=1)
    text = TokenInputs(tokens, "train", {"source": "ids"})
    told = []
    view = BlockView(make_model())
    result = evaluator.evaluate(Subject(view, None, lambda _: text, {}, progress=lambda *phase: told.append(phase)))
    assert not [item for item in (result, *result.more) if item.curve_stderr]
    assert told[-1] == ("block", len(result.curve), len(result.curve))


@pytest.mark.parametrize("options", [{"limit": 0}, {"seeds": 0}, {"followed": 0}])
def test_numbers_of_things_below_one_are_refused(options):
    with pytest.raises(UsageError, match="whole number"):
        AbsorptionCurves(Windows(Corpus("text"), "train", 12, 5), Noise(0.1), **options)


CURVES = absorption_report.Absorption(
    title="curves",
    layout="absorption",
    parts=[],
    rows=[
        absorption_report.DisturbanceRow("small", "noise_1", 0.01),
        absorption_report.DisturbanceRow("large", "noise_2", 1.0),
        absorption_report.DisturbanceRow("not run", "noise_3", 2.0),
    ],
    drifts=["noise_1", "noise_2"],
    compared=["noise_2"],
    pruning="noise_2",
)


@pytest.fixture
def dense(measured):
    """The one cell of the table, with two evaluations."""
    item, shared = measured[1], {"key": "a", "protocol": "W2", "text_sha256": "0"}
    rows = [shared | {"evaluation": "test", "metric": "perplexity", "value": 9.0}]
    for name in ("noise_1", "noise_2"):
        for part in (item, *item.more):
            evaluation = name if part is item else f"{name}.{part.metric}"
            rows.append(shared | {"evaluation": evaluation} | frame._measurement(part))
    return frame.wide(pd.DataFrame(rows))


def test_a_disturbance_is_a_row_of_thirds(dense, measured):
    r = torch.tensor(measured[1].curve)
    table = absorption_report.summary(absorption_report.disturbances(CURVES, dense))
    assert list(table.index.get_level_values("disturbance")) == ["small", "large"]
    row = list(table.iloc[0])
    assert row[:4] == ["0.1", *(f"{x:.2f}" for x in r[:3].tolist())]
    assert row[4:7] == [f"{int(x < 1)} of 1" for x in r[:3].tolist()]


def test_figures_of_the_curves_are_drawn(dense, tmp_path):
    found = absorption_report.disturbances(CURVES, dense)
    assert found[0].followed() == [1, 3]
    for draw in (absorption_report.drift_figure, absorption_report.coefficient_figure):
        files = draw(tmp_path, draw.__name__, CURVES, found, "title")
        assert all(file.stat().st_size > 1000 for file in files)


def test_a_table_without_its_evaluations_says_which_to_run():
    cells = pd.DataFrame([{"key": "a", "test": 1.0}])
    with pytest.raises(UsageError, match="eval=absorption"):
        absorption_report.disturbances(CURVES, cells)
