"""Layouts that are not tables of perplexities: searches, seeds, beta."""

import math

import numpy as np
import pandas as pd
import pytest

from sparsify import paths
from sparsify.report import figures, frame, layouts
from sparsify.report.layouts import beta_study, recovery, search, seeds
from sparsify.report.layouts.base import Page, Row
from sparsify.report.layouts.by_allocation import ByAllocation, Pruning
from sparsify.report.layouts.medians import Medians
from sparsify.report.layouts.recovery import Recovery
from sparsify.report.spread import Spread, median_and_range


@pytest.fixture
def searched():
    """A grid of two trials and a search of three, at one sparsity."""
    return pd.DataFrame(
        [
            {"key": "a", "sparsity": 0.7, "allocator": "grid", "heldout": 50.0, "test": 55.0}
            | {"trials.heldout": "80|60", "trials.seconds": "1|2", "noted.rank_correlation": math.nan},
            {"key": "b", "sparsity": 0.7, "allocator": "evolution", "heldout": 40.0, "test": 44.0}
            | {"trials.heldout": "90|inf|30", "trials.seconds": "0.5|1.5|4", "noted.rank_correlation": 0.5},
            {"key": "c", "sparsity": 0.7, "allocator": "uniform", "heldout": 99.0, "test": 110.0},
        ]
    )


def rows_of(*allocators):
    return [Row(allocator, {"allocator": allocator}) for allocator in allocators]


COMMON = {"title": "a table", "layout": "any", "parts": []}
LAYOUT = search.Searches(**COMMON, reference="grid", rows=rows_of("uniform", "grid", "evolution"))


def test_searches_are_compared_at_equal_trials_and_equal_seconds(searched):
    runs = search.runs_of(LAYOUT, searched)
    table = search.summary(LAYOUT, runs)
    rows = {label: list(table.loc[("70%", label)]) for label in ("uniform", "grid", "evolution")}
    assert rows["uniform"] == ["", "", "", "", "", "99.00", "110.0", "+150%"]
    assert rows["grid"] == ["2", "2", "60.00", "60.00", "", "50.00", "55.00", "+25%"]
    # Two trials: 90 and one without a number; two seconds: the same two.
    assert rows["evolution"] == ["3", "4", "90.00", "90.00", "0.50", "40.00", "44.00", "+0%"]


def test_the_search_figure_is_drawn(searched, tmp_path):
    files = search.figure(tmp_path, "search", LAYOUT, search.runs_of(LAYOUT, searched), "c4@8")
    assert [file.suffix for file in files] == [".png", ".pdf"]
    assert all(file.stat().st_size > 1000 for file in files)


def test_a_spread_is_students_interval():
    spread = Spread.of([1.0, 2.0, 3.0])
    assert (spread.mean, spread.n) == (2.0, 3)
    assert spread.half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert str(spread) == "2.00 ± 2.48 (3)"
    assert str(Spread.of([7.0])) == "7.00"


def test_seeds_make_one_entry_per_text():
    cells = pd.DataFrame(
        {
            "sparsity": 0.7,
            "allocator": ["uniform"] * 3 + ["owl"],
            "calibration": ["c4 train (x)", "c4 train (x)", "sotu train (x)", "c4 train (x)"],
            "test": [10.0, 12.0, 20.0, 5.0],
        }
    )
    layout = seeds.Seeds(**COMMON, rows=rows_of("owl", "uniform", "atp"))
    table = seeds.over_seeds(layout, cells)
    assert list(table.index) == [("70%", "owl"), ("70%", "uniform")]
    assert list(table.loc[("70%", "uniform")]) == [str(Spread.of([10.0, 12.0])), "20.00"]
    assert list(table.loc[("70%", "owl")]) == ["5.00", ""]


def test_the_beta_study_reads_grids_maximum_and_leak_off_the_curve():
    betas = np.array([0.0, 0.002, 0.004, 0.006, 0.008])
    cells = pd.DataFrame(
        {
            "pruner": "wanda",
            "sparsity": 0.7,
            "num_blocks": 30,
            "allocator": ["uniform"] + ["atp"] * 4,
            "allocator.beta": [math.nan, *betas[1:]],
            "test": [90.0, 70.0, 60.0, 50.0, 65.0],
            "heldout": [91.0, 71.0, 55.0, 61.0, 66.0],
        }
    )
    layout = beta_study.BetaStudy(**COMMON, steps=[1, 2, 4], pruners=["sparsegpt", "wanda"])
    row = list(beta_study.studied(layout, cells).loc[("wanda", "70%")])
    assert row == ["50.00", "60.00", "65.00", "0.004", "19%", "60.00", "50.00", "16.7%"]


def test_parameters_that_share_a_column_with_text_are_numbers_again(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(
        "key,evaluation,metric,protocol,value,allocator.beta,allocator.M\n"
        "1,test,perplexity,x,2,auto,5.0\n2,test,perplexity,x,3,0.004,\n"
    )
    rows = frame.read_long(file)
    assert list(rows["allocator.beta"]) == ["auto", 0.004]
    assert rows["allocator.M"].tolist()[0] == 5.0


def test_a_table_of_the_dense_model_alone():
    from sparsify.report.layouts.entries import Entry, grid_frame

    paper = pd.DataFrame(columns=["model", "pruner", "allocator", "sparsity", "value"])
    table = grid_frame([Entry("", "dense", 0.0, 21.6, "", "a", "dense")], paper, [])
    assert table.iloc[0].tolist() == ["21.60"]


def test_medians_have_their_range_and_rows_without_a_number_are_left_out():
    cells = pd.DataFrame(
        [
            {"pruner": "wanda", "allocator": "uniform", "sparsity": 0.5, "seed": seed, "test": value}
            for seed, value in enumerate([90.0, 120.0, 100.0])
        ]
        + [
            {"pruner": "wanda", "allocator": "msp", "sparsity": 0.625, "seed": 0, "test": 300.0},
            {"pruner": "wanda", "allocator": "owl", "sparsity": 0.5, "seed": 0, "test": math.nan},
        ]
    )
    rows = [Row(name, {"allocator": name}) for name in ("uniform", "msp", "owl")]
    layout = Medians(title="", layout="medians", parts=[], pruners=["ria", "wanda"], rows=rows)
    shown = layout.frame(cells, "test", lambda values: median_and_range(values, "{:.0f}".format))
    assert list(shown.columns.get_level_values(1)) == ["50%", "62.5%"]
    assert list(shown.index) == [("wanda", "uniform"), ("wanda", "msp")]
    assert shown.to_numpy().tolist() == [["100 [90 to 120] (3)", "–"], ["–", "300"]]


def test_medians_show_other_texts_in_tables_of_their_own(tmp_path):
    cells = pd.DataFrame(
        [
            {"key": str(i), "pruner": "wanda", "allocator": "uniform", "sparsity": 0.5, "seed": i}
            | {"test": 90.0 + i, "sotu": 40.0 + i, "trials.heldout": math.nan, "block_sparsity": "0.5|0.5"}
            for i in range(3)
        ]
    )
    layout = Medians(
        title="",
        layout="medians",
        parts=[],
        pruners=["wanda"],
        rows=[Row("uniform", {"allocator": "uniform"})],
        beside={"sotu": "Messages", "c4": "Not measured"},
    )
    page = Page(cells, cells, "equimarginal", "tiny", "A title", [], tmp_path, tmp_path)
    layout.write(page)
    text = (tmp_path / "equimarginal_tiny.md").read_text()
    assert "91.00 [90.00 to 92.00] (3)" in text
    assert "Messages" in text
    assert "41.00 [40.00 to 42.00] (3)" in text


def trained():
    """Cells of a table of training: a dense one, two seeds without and with training, one by steps."""
    plain = {"pruner": "wanda", "method": "oneshot", "allocator": "uniform", "sparsity": 0.7, "achieved": 0.7}
    losa = {"method": "losa", "noted.trainable": 4e6, "noted.loss": "3|2|1", "noted.step_sparsity": "0.5|0.7"}
    losa |= {"noted.step_block_sparsity": "0.4|0.5|0.6;0.7|0.6|0.8", "noted.similarity": "1|.9|.8;.9|1|.7;.8|.7|1"}
    losa |= {"allocator.measure": "cka", "noted.step_ranks": "6|6|6;7|5|9", "seconds.prune": 120.0, "test": 60.0}
    return pd.DataFrame(
        [
            plain | {"sparsity": 0.0, "test": 20.0},
            *(plain | {"test": value, "seed": seed, "seconds.prune": 6.0} for seed, value in enumerate((100.0, 110.0))),
            plain | {"recovery": "lora", "test": 50.0, "achieved": 0.0, "noted.recovery.trainable": 2e6},
            plain | losa,
        ]
    )


def test_training_has_means_costs_and_a_figure(tmp_path):
    rows = [
        Row("dense", dense=True),
        Row("plain", {"method": "oneshot", "recovery": "none"}),
        Row("LoRA", {"recovery": "lora"}),
        Row("LoSA", {"method": "losa"}),
    ]
    layout = Recovery(**COMMON, pruners=["wanda", "sparsegpt"], rows=rows)
    cells = layout.prepare(trained())
    page = Page(cells, cells, "table5", "tiny", "a table", [], tmp_path, tmp_path)
    files = layout.write(page)
    text = files[0].read_text()
    assert "105.0 ± 63.53 (2)" in text
    header = "| trainable | tokens | sparsity at the end | minutes | peak GiB |"
    assert header in " ".join(text.split())
    costs = recovery._costs(layout, cells)[""]
    assert costs["trainable"].tolist() == ["", "2,000,000", "4,000,000"]
    assert costs["sparsity at the end"].tolist() == ["70.0%", "0.0%", "70.0%"]
    assert costs["minutes"].tolist() == ["0.1", "", "2.0"]
    sizes = recovery._costs(layout, cells.assign(**{"noted.quantiser.bits_per_weight": 3.256}))[""]["bits a weight"]
    assert set(sizes) == {"3.26"}
    assert [file.name for file in files if file.suffix == ".png"] == ["training_tiny.png", "cka_tiny.png"]
    assert all(file.is_file() for file in files)


def test_a_quantised_dense_model_is_a_row_of_its_own_and_no_pruned_one(tmp_path):
    dense = {"sparsity": 0.0, "pruner": "wanda", "method": "oneshot", "seconds.prune": 1.0, "test.protocol": "t"}
    pruned = dense | {"sparsity": 0.5, "achieved": 0.6, "test": 30.0}
    cells = pd.DataFrame(
        [
            dense | {"key": "a", "test": 10.0},
            dense | {"key": "b", "test": 12.0, "quantiser": "rtn", "noted.quantiser.bits_per_weight": 4.2},
            pruned | {"key": "c"},
            pruned | {"key": "d", "test": 33.0, "quantiser": "rtn", "noted.quantiser.bits_per_weight": 3.2},
        ]
    )
    rows = [
        Row("dense", {"quantiser": "none"}, dense=True),
        Row("dense, few bits", {"quantiser": "rtn"}, dense=True),
        Row("pruned", {"quantiser": "none"}),
        Row("few bits", {"quantiser": "rtn"}),
    ]
    layout = Recovery(**COMMON, pruners=["wanda"], rows=rows)
    cells = layout.prepare(cells)
    shown = layout.frame(cells, "test", lambda values: str(values[0]))
    assert shown["zeros", "50%"].tolist() == ["10.0", "12.0", "30.0", "33.0"]
    costs = recovery._costs(layout, cells)[""]
    assert costs["bits a weight"].tolist() == ["", "3.20"]
    assert costs["sparsity at the end"].tolist() == ["60.0%", "60.0%"]


def test_the_figure_of_a_training_has_loss_sparsity_and_ranks_by_step_and_block(tmp_path, monkeypatch):
    drawn = {}

    def keep(figure, files):
        drawn[files[0].name] = [[line.get_ydata().tolist() for line in axes.get_lines()] for axes in figure.axes]

    monkeypatch.setattr(figures, "_save", keep)
    layout = Recovery(**COMMON, pruners=["wanda"], rows=[Row("LoSA", {"method": "losa"})])
    cells = layout.prepare(trained())
    layout.write(Page(cells, cells, "table5", "tiny", "a table", [], tmp_path, tmp_path))
    loss, sparsity, ranks = drawn["training_tiny.png"]
    assert loss == [[3.0, 2.0, 1.0]]
    assert sparsity == [pytest.approx([40.0, 50.0, 60.0]), pytest.approx([70.0, 60.0, 80.0])]
    assert ranks == [[6.0, 6.0, 6.0], [7.0, 5.0, 9.0]]


def test_a_row_stands_among_those_of_another_pruner():
    base = {"sparsity": 0.7, "allocator": "uniform"}
    cells = pd.DataFrame([base | {"pruner": "wanda", "test": 100.0}, base | {"pruner": "ria", "test": 90.0}])
    rows = [
        Row("plain", {"allocator": "uniform"}),
        Row("other", {"pruner": "ria", "allocator": "uniform"}, under="wanda"),
    ]
    layout = Recovery(**COMMON, pruners=["wanda", "sparsegpt"], rows=rows)
    shown = layout.frame(cells, "test", lambda values: f"{values[0]:g}")
    assert shown.iloc[:, 0].to_dict() == {("wanda", "plain"): "100", ("wanda", "other"): "90"}


def pruned(allocator, values, **more):
    """Cells of one pruner and allocation, a seed each."""
    cell = {"pruner": "wanda", "allocator": allocator, "sparsity": 0.7, "test.protocol": "t"} | more
    return [cell | {"key": f"{allocator}{n}{more}", "seed": n, "test": value} for n, value in enumerate(values)]


@pytest.fixture
def crossed():
    """A table by allocation, and cells of it: three seeds, two of which a second rule has, and bits by block."""
    rows = [
        Pruning("dense", {"sparsity": 0.0, "quantiser": "none"}),
        Pruning("Wanda", {"pruner": "wanda", "sparsity": 0.7}, group="masks"),
        Pruning("ALPS", {"pruner": "alps", "sparsity": 0.7}, group="weights"),
        Pruning("SparseGPT", {"pruner": "sparsegpt", "sparsity": 0.7}, group="weights"),
        Pruning("GPTQ", {"quantiser": "gptq"}, by="quantiser.allocator"),
    ]
    allocations = {"uniform": "uniform", "ATP": "atp", "OWL": "owl"}
    layout = ByAllocation(**COMMON, allocations=allocations, rows=rows, tasks=["boolq", "piqa"])
    bits = {"sparsity": 0.0, "quantiser": "gptq"}
    cells = [
        *pruned("uniform", [20.0], sparsity=0.0),
        *pruned("uniform", [100.0, 200.0, 90.0]),
        *pruned("atp", [50.0, 150.0]),
        *pruned("uniform", [40.0], pruner="alps", boolq=0.5, piqa=0.6),
        *pruned("uniform", [30.0], **bits, **{"quantiser.allocator": "uniform"}),
        *pruned("uniform", [33.0], **bits, **{"quantiser.allocator": "atp"}),
    ]
    return layout, layout.prepare(pd.DataFrame(cells))


def test_a_table_by_allocation_has_medians_and_changes_in_pairs(crossed):
    layout, cells = crossed
    shown = layout.frame(cells, "test", lambda values: f"{np.median(values):g}")
    assert list(shown.columns.get_level_values(1)) == ["uniform", "ATP"]
    assert {row: list(entries) for row, entries in zip(shown.index, shown.to_numpy(), strict=True)} == {
        ("", "dense"): ["20", ""],
        ("masks", "Wanda"): ["100", "100"],
        ("weights", "ALPS"): ["40", ""],
        ("", "GPTQ"): ["30", "33"],
    }
    changes = layout.changes(cells)
    assert changes["", "ATP"].to_dict() == {("masks", "Wanda"): "-38% [-50% to -25%] (2)", ("", "GPTQ"): "+10%"}


def test_a_table_by_allocation_is_one_file_of_tables_and_a_figure(crossed, tmp_path):
    layout, cells = crossed
    files = layout.write(Page(cells, cells, "table15", "tiny", "a table", [], tmp_path, tmp_path))
    text = " ".join(files[0].read_text().split())
    assert "100.0 [90.00 to 200.0] (3)" in text
    assert "**Mean accuracy over boolq, piqa, in percent**" in text
    assert "| weights | ALPS | 55.0 |" in text
    assert [file.name for file in files if file.suffix == ".png"] == ["allocations_table15_tiny.png"]
    assert all(file.stat().st_size for file in files)


def test_a_table_by_allocation_of_a_cell_alone_has_no_changes(crossed, tmp_path):
    layout, cells = crossed
    dense = cells[:1].drop(columns=["boolq", "piqa"])
    files = layout.write(Page(dense, dense, "table15", "tiny", "a table", [], tmp_path, tmp_path))
    assert "Change" not in files[0].read_text()
    assert layout.changes(dense).empty


def test_two_cells_of_a_seed_are_no_entry(crossed):
    layout, cells = crossed
    with pytest.raises(ValueError, match="Several cells of one seed for Wanda, ATP"):
        layout.frame(pd.concat([cells, cells]).query("allocator == 'atp'"), "test", str)


def test_table_13_shows_published_cells_of_table_4():
    rows = paths.root() / "results/published/2026-11-27_cac9715/table4/table4_smollm2-135m_paper.csv"
    layout = layouts.load("table13")
    cells = layout.prepare(frame.wide(frame.read_long(rows)))
    mixed = cells[~(cells["allocator"].eq("equimarginal") & ~cells["allocator.native"].eq(True))]
    shown = layout.frame(mixed, "test", lambda values: f"{np.median(values):.4g}")
    wanda = shown.loc[("mixed N:8, Wanda", "4:8 on average")][""]
    assert wanda[["uniform", "OWL", "ATP, β by held-out", "equimarginal"]].tolist() == [
        "93.79",
        "103.6",
        "79.62",
        "68.54",
    ]
    assert ("mixed N:8, SparseGPT", "3:8 on average") in shown.index
