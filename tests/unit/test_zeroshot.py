"""Zero-shot tasks on a model of 260,032 parameters and a real tokenizer, against the harness itself."""

import gc
import gzip
import json
import logging
import math
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsify import paths
from sparsify.data import benchmarks
from sparsify.errors import DataError, NumericsError, UsageError
from sparsify.evaluation.base import Subject
from sparsify.evaluation.zeroshot import ZeroShot
from sparsify.model.blocks import BlockView

STORIES = "zeroshot rows or models/stories260k are not in SPARSIFY_DATA"


@pytest.fixture(scope="module")
def model():
    folder = paths.data() and paths.data() / "models" / "stories260k"
    if not folder or not folder.is_dir() or not (paths.data() / "zeroshot").is_dir():
        pytest.skip(STORIES)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(paths.data() / "models" / "stories260k")


@pytest.fixture
def subject(model, tokenizer):
    return Subject(BlockView(model), tokenizer, no_windows, {})


def no_windows(windows):
    raise AssertionError("tasks read no windows")


def direct(model, tokenizer, task, split, limit):
    """The harness' own answer, over the same file."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    from sparsify.evaluation import harness

    file = paths.data() / "zeroshot" / task / f"{split}.jsonl.gz"
    override = {
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file)}},
        "training_split": None,
        **({"validation_split": None} if split == "test" else {}),
    }
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda results: None)  # asks pip and git, for seconds
        found = evaluator.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
            tasks=[{"group": "local", "task": [override]}],
            task_manager=harness._manager(benchmarks.find(task).template),
            limit=limit,
            bootstrap_iters=100,
        )
    return found["results"][task], found["versions"][task]


@pytest.mark.parametrize(
    ("task", "split", "norm"),
    [("arc_easy", "test", True), ("boolq", "validation", False), ("piqa", "validation", True)],
)
def test_a_task_gives_what_the_harness_gives(subject, task, split, norm):
    ours = ZeroShot(task, limit=30).evaluate(subject).to_json()
    theirs, version = direct(subject.model, subject.tokenizer, task, split, 30)
    assert ours["value"] == theirs["acc,none"]
    assert ours["stderr"] == pytest.approx(theirs["acc_stderr,none"])
    assert (ours["metric"], ours["n"], ours["task_version"]) == ("acc", 30, version)
    assert [m["metric"] for m in ours.get("more", ())] == ["acc_norm"] * norm
    for other in ours.get("more", ()):
        assert other["value"] == theirs["acc_norm,none"]
        assert other["stderr"] == pytest.approx(theirs["acc_norm_stderr,none"])


def test_log_likelihoods_are_those_of_the_harness(subject):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from sparsify.evaluation import harness

    pairs = [("Once upon a time", f" there was a {x}") for x in ("girl", "big dog named Max", "cat.")]
    pairs += [("Tom said", " yes"), ("Tom said", " no"), ("", "Lily ran home"), ("a b c " * 400, " d")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    with harness._quiet():
        theirs = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=2).loglikelihood(requests)
    suite = harness.Suite({})
    for _ in range(2):  # packed, then as packed before
        ours = harness.LiveModel(subject, suite).loglikelihood(requests)
        assert [hit for _, hit in ours] == [hit for _, hit in theirs]
        assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-3)


def test_a_second_cell_reuses_the_prompts_and_sees_its_own_weights(subject, model):
    first = ZeroShot("piqa", limit=25).evaluate(subject).to_json()
    again = ZeroShot("piqa", limit=25).evaluate(subject).to_json()
    assert again == first
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    try:
        assert ZeroShot("piqa", limit=25).evaluate(subject).to_json() != first
    finally:
        model.load_state_dict(weights)


def test_the_model_and_its_tokenizer_stay_as_they_are(subject, model, tokenizer):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    padding = tokenizer.pad_token
    model.train()
    ZeroShot("rte", limit=2).evaluate(subject)
    assert model.training
    model.eval()
    assert tokenizer.pad_token == padding
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_mmlu_is_one_number_over_its_subjects(subject):
    found = ZeroShot("mmlu", limit=1).evaluate(subject).to_json()
    parts = {m["metric"]: m["value"] for m in found.get("more", ())}
    assert (len(parts), found["n"], found["protocol"]) == (57, 57, "mmlu@5-shot, first 1")
    assert found["value"] == pytest.approx(sum(parts.values()) / 57)
    assert "acc_anatomy" in parts


def test_a_text_is_generated_for_gsm8k(subject, tmp_path, monkeypatch):
    rows = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 1?", "answer": "#### 3"}]
    file = tmp_path / "zeroshot" / "gsm8k" / "test.jsonl.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    monkeypatch.setenv("SPARSIFY_DATA", str(tmp_path))
    monkeypatch.setattr(subject.model.config, "max_position_embeddings", 2048)
    found = ZeroShot("gsm8k_cot", limit=2).evaluate(subject).to_json()
    assert (found["metric"], found["value"], found["protocol"]) == ("exact_match", 0, "gsm8k_cot@8-shot, first 2")
    assert [m["metric"] for m in found.get("more", ())] == ["exact_match_flexible-extract"]


def test_examples_are_the_same_after_an_attempt_that_failed(subject, tmp_path, monkeypatch):
    from sparsify.evaluation import harness

    rows = [json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) for i in range(30)]
    folder = tmp_path / "zeroshot" / "gsm8k"
    folder.mkdir(parents=True)
    for split, some in (("train", rows[4:]), ("test", rows[:4])):
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress("\n".join(some).encode()))
    monkeypatch.setenv("SPARSIFY_DATA", str(tmp_path))
    seen = []

    def answer(model, requests, **_):
        seen.append([request.args[0] for request in requests])
        if len(seen) == 2:
            raise NumericsError("not this time")
        return [""] * len(requests)

    monkeypatch.setattr(harness.LiveModel, "generate_until", answer)
    ZeroShot("gsm8k", shots=3).evaluate(subject)
    harness._suite.cache_clear()
    with pytest.raises(NumericsError):
        ZeroShot("gsm8k", shots=3).evaluate(subject)
    ZeroShot("gsm8k", shots=3).evaluate(subject)
    assert len(set(seen[0])) == 4
    assert seen[0] == seen[1] == seen[2]


def test_the_harness_does_not_hold_on_to_a_model(subject):
    from sparsify.evaluation import harness

    ZeroShot("rte", limit=2).evaluate(subject)
    suite = harness._suite("rte", 0, 2, tuple(benchmarks.fingerprint("rte").values()))
    gc.disable()
    try:
        wrapper = harness.LiveModel(subject, suite)
        wrapper.tok_encode("a few words")
        alive = weakref.ref(wrapper)
        del wrapper
        assert alive() is None
    finally:
        gc.enable()


def test_weights_that_are_not_finite_are_an_error_and_not_an_accuracy(subject, model):
    weight = model.model.layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = math.nan
    try:
        with pytest.raises(NumericsError, match="not finite"):
            ZeroShot("rte", limit=2).evaluate(subject)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_limit_is_part_of_the_protocol():
    assert ZeroShot("boolq").protocol == "boolq@0-shot"
    assert ZeroShot("boolq", limit=20).protocol == "boolq@0-shot, first 20"
    assert ZeroShot("mmlu").protocol == "mmlu@5-shot"
    assert ZeroShot("mmlu", shots=0).protocol == "mmlu@0-shot"


@pytest.mark.parametrize("options", [{"task": "bolq"}, {"limit": 0}, {"limit": True}, {"shots": -1}, {"shots": 3}])
def test_a_task_that_cannot_be_is_refused(options):
    with pytest.raises(UsageError):
        ZeroShot(**{"task": "boolq"} | options)


def test_random_weights_have_no_tokenizer_to_ask(make_model):
    with pytest.raises(UsageError, match="tokenizer"):
        ZeroShot("boolq").evaluate(Subject(BlockView(make_model()), None, no_windows, {}))


def test_rows_that_are_nowhere_are_one_clear_error(subject, tmp_path, monkeypatch):
    import lm_eval.tasks

    def unreachable(*_):
        raise ConnectionError("offline")

    monkeypatch.setenv("SPARSIFY_DATA", str(tmp_path))
    monkeypatch.setenv("SPARSIFY_ASSETS", str(tmp_path))
    monkeypatch.setattr(lm_eval.tasks.TaskManager, "load", unreachable)
    benchmarks._provenance.cache_clear()
    with pytest.raises(DataError, match="nowhere to be found"):
        ZeroShot("rte", limit=2).evaluate(subject)
