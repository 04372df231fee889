import math
from dataclasses import replace

import pandas as pd
import pytest

from sparsify.errors import SparsifyError, UsageError
from sparsify.report import layouts, write
from sparsify.report.layouts import accuracy
from sparsify.report.numbers import paper_numbers

LAYOUT = layouts.load("table2")
SHOWN = ("dense", "uniform", "OWL", "AlphaPruning", "DSA", "ATP")
SMALL = replace(LAYOUT, tasks=["boolq", "piqa"], rows=[row for row in LAYOUT.rows if row.label in SHOWN])


def cell(allocator, boolq, piqa, sparsity=0.7, pruner="wanda", limit=""):
    """A wide row as `frame.wide` makes it."""
    return {
        "key": f"{pruner}-{allocator}-{sparsity}",
        "sparsity": sparsity,
        "pruner": pruner,
        "allocator": allocator,
        "test": 20.0,
        "boolq": boolq,
        "boolq.stderr": 0.03,
        "boolq.protocol": f"boolq@0-shot{limit}",
        "piqa": piqa,
        "piqa.stderr": 0.04,
        "piqa.protocol": f"piqa@0-shot{limit}",
        "piqa.acc_norm": None if piqa is None else piqa + 0.01,
    }


def frames(*rows):
    cells = SMALL.prepare(pd.DataFrame(rows))
    entries = SMALL.entries(cells)
    return accuracy.mean_frame(SMALL, entries, cells), accuracy.task_frame(SMALL, entries, cells)


ROWS = (cell("uniform", 0.6, 0.7, 0.0, "magnitude"), cell("uniform", 0.4, 0.5), cell("atp", 0.5, 0.62))


def test_the_mean_has_its_error_and_its_protocol():
    cells = SMALL.prepare(pd.DataFrame([cell("uniform", 0.4, 0.5, limit=", first 20")]))
    assert cells["accuracy"].iloc[0] == pytest.approx(0.45)
    assert cells["accuracy.stderr"].iloc[0] == pytest.approx(math.hypot(0.03, 0.04) / 2)
    assert cells["accuracy.protocol"].iloc[0] == "mean of 2 tasks@0-shot, first 20"


def test_the_tables_of_means_and_of_tasks():
    means, tasks = frames(*ROWS)
    shown = write.markdown(means, "Means", ["a note"], [("Tasks", tasks)])
    assert shown == "\n".join(
        [
            "**Means**",
            "",
            "| pruner   | allocation   |     ours 70% |   ATP − row, ours 70% |   ATP − row, llama2-7b 70% |"
            "   ATP − row, llama3-8b 70% |   ATP − row, llama3-8b 60% |",
            "|:---------|:-------------|-------------:|----------------------:|---------------------------:"
            "|---------------------------:|---------------------------:|",
            "|          | dense        | 65.00 ± 2.50 |                       |                            |"
            "                            |                            |",
            "| wanda    | uniform      | 45.00 ± 2.50 |                +11.00 |                     +10.50 |"
            "                            |                      +4.13 |",
            "|          | OWL          |            – |                       |                            |"
            "                            |                            |",
            "|          | AlphaPruning |            – |                       |                      +2.46 |"
            "                            |                      +1.05 |",
            "|          | DSA          |            – |                       |                            |"
            "                      +3.43 |                            |",
            "|          | ATP          | 56.00 ± 2.50 |                       |                            |"
            "                            |                            |",
            "",
            "**Tasks**",
            "",
            "| pruner   | allocation   |   boolq acc |   piqa acc |   piqa acc_norm |",
            "|:---------|:-------------|------------:|-----------:|----------------:|",
            "|          | dense        |       60.00 |      70.00 |           71.00 |",
            "| wanda    | uniform      |       40.00 |      50.00 |           51.00 |",
            "|          | OWL          |             |            |                 |",
            "|          | AlphaPruning |             |            |                 |",
            "|          | DSA          |             |            |                 |",
            "|          | ATP          |       50.00 |      62.00 |           63.00 |",
            "",
            "- a note",
            "",
        ]
    )


def test_several_sparsities_are_columns_of_the_means_and_rows_of_the_tasks():
    means, tasks = frames(*ROWS, cell("atp", 0.55, 0.66, 0.6))
    assert [c for c in means.columns if c[0] == "ours"] == [("ours", "60%"), ("ours", "70%")]
    assert means.loc[("wanda", "ATP"), ("ours", "60%")] == "60.50 ± 2.50"
    assert tasks.loc[("wanda", "ATP 60%"), ("piqa", "acc")] == "66.00"


def test_limited_numbers_never_stand_beside_full_ones():
    with pytest.raises(UsageError, match="different protocols"):
        frames(*ROWS[:2], cell("atp", 0.5, 0.62, limit=", first 20"))


def test_a_cell_without_every_task_is_left_out_and_none_at_all_is_an_error():
    means, _ = frames(*ROWS[:2], cell("atp", 0.5, None))
    assert means.loc[("wanda", "ATP"), ("ours", "70%")] == "–"
    with pytest.raises(SparsifyError, match="No cell has every task"):
        SMALL.prepare(pd.DataFrame([{"key": "a", "test": 20.0}]))


def test_every_published_lead_has_a_row_of_the_table():
    paper = paper_numbers(LAYOUT.paper)
    assert len(paper) == 5
    assert set(paper["allocator"]) <= {row.paper for row in LAYOUT.rows}
    assert all(paper["source"].str.startswith("ATP"))


def test_the_report_is_made_from_published_rows(tmp_path):
    from sparsify.report.__main__ import report

    shared = {"model": "m", "scale": "embedded", "dtype": "float32", "calibration": "a text", "device": "cpu"}
    rows = [
        shared
        | {"key": f"{i}", "sparsity": sparsity, "pruner": "wanda", "allocator": allocator, "commit": "c" * 40}
        | {"evaluation": task, "metric": "acc", "protocol": f"{task}@0-shot", "value": value, "stderr": 0.07, "n": 50}
        for i, (allocator, sparsity, value) in enumerate(
            [("uniform", 0.0, 0.6), ("uniform", 0.7, 0.4), ("atp", 0.7, 0.5)]
        )
        for task in LAYOUT.tasks
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "table2_m_embedded.csv", index=False)
    files = report("table2", [], tmp_path / "table2_m_embedded.csv")
    text = files[0].read_text()
    assert "| wanda    | uniform      | 40.00 ± 2.65 |                +10.00 |" in text
    assert "Protocol mean of 7 tasks@0-shot; float32" in text
    assert text.count("**Table 2. Mean zero-shot accuracy — m, embedded scale") == 2
    assert r"40.00 $\pm$ 2.65" in files[2].read_text()
