"""The evaluation harness around a live model: stock templates over our rows, and log-likelihoods in few forwards.

Imported on the first evaluation of a task only: lm-eval takes seconds.
"""

import copy
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lm_eval.tasks
import lm_eval.utils
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from jaxtyping import Bool, Float, Int
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from sparsify import paths
from sparsify.data import benchmarks
from sparsify.errors import DataError, NumericsError
from sparsify.evaluation.base import Subject
from sparsify.model.objective import SLICE, head_is_plain, head_logits

VERSION = f"lm-eval {version('lm-eval')}"
SEED = 1234
"""The harness' own seed for drawing examples."""

# The harness compiles its templates for every document anew, which takes longer than a GPU needs for the answers.
lm_eval.utils.env.from_string = lru_cache(maxsize=256)(lm_eval.utils.env.from_string)

Encoded = tuple[Any, list[int], list[int]]
"""A request as the harness hands it over: the texts, the context's tokens, the continuation's."""


@dataclass(frozen=True)
class Scores:
    """What the harness found for one of its tasks: means over `n` documents, by metric."""

    name: str
    metrics: dict[str, float]
    n: int
    version: float | str


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward, padded on the right, and the continuation tokens to score.

    Attributes:
        tokens: distinct inputs; answers of one token after the same context share one.
        row: input of each continuation token.
        position: where in the input its logits are.
        target: the token.
        request: index of the request it belongs to.
    """

    tokens: Int[Tensor, "rows len"]
    row: Int[Tensor, " scored"]
    position: Int[Tensor, " scored"]
    target: Int[Tensor, " scored"]
    request: Int[Tensor, " scored"]


@dataclass
class Suite:
    """Tasks of the harness, kept by the process: their prompts, and the batches of each tokenizer."""

    tasks: dict[str, Any]
    batches: WeakKeyDictionary[Any, dict[Any, list[Batch]]] = field(default_factory=WeakKeyDictionary)


def load(task: str, shots: int, limit: int | None) -> Suite:
    """Rows and templates of a task, read once per process.

    Raises:
        DataError: the rows are nowhere to be found.
    """
    with _quiet():
        return _suite(task, shots, limit, tuple(benchmarks.fingerprint(task).values()))


def scores(task: str, shots: int, limit: int | None, subject: Subject) -> list[Scores]:
    """The harness' metrics for a task, one entry per part (57 for MMLU, one for most).

    Raises:
        DataError: the rows are nowhere to be found.
        NumericsError: a log-likelihood is not finite.
    """
    suite = load(task, shots, limit)
    with _quiet():
        model = LiveModel(subject, suite)
        for built in suite.tasks.values():
            built.set_fewshot_seed(seed=SEED)  # again, where an attempt before this one drew examples and failed
        found = evaluator.evaluate(model, {"tasks": suite.tasks}, limit=limit, log_samples=False, bootstrap_iters=0)
        for built in suite.tasks.values():
            _keep_prompts(built)
    return [_of(name, found) for name in suite.tasks]


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether prompts begin with a token that stands for no text, which is up to the tokenizer."""
    return bool(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])


def _of(name: str, found: dict[str, Any]) -> Scores:
    """Metrics by name; those of a second way to read the answer (`filter`) under `<metric>_<filter>`."""
    results, metrics = found["results"][name], {}
    for key in results:
        metric, comma, how = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            metrics[metric if metric not in metrics else f"{metric}_{how}"] = float(results[key])
    order = sorted(metrics, key=lambda metric: not metric.startswith(("acc", "exact_match")))
    return Scores(name, {m: metrics[m] for m in order}, results["sample_len"], found["versions"][name])


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and remarks of the harness: results and errors are ours to report."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), paths.quiet_hub():
            yield
    finally:
        logger.setLevel(level)


@lru_cache(maxsize=32)
def _suite(task: str, shots: int, limit: int | None, data: tuple[str, ...]) -> Suite:
    """Built once per process; `data` is part of the cache key only."""
    rows = benchmarks.rows(task)
    manager = _manager(benchmarks.find(task).template)
    names = [task] if task in manager.all_subtasks else [n for n in manager.all_subtasks if n.startswith(f"{task}_")]
    members = [{"task": name, **({} if rows is None else _source(name, task, rows, limit))} for name in names]
    try:
        tasks: dict[str, Any] = manager.load([{"group": "local", "task": members}])["tasks"]
    except Exception as error:
        if rows is None:
            raise benchmarks.nowhere(task) from error
        raise
    for built in tasks.values():
        built.set_config(key="num_fewshot", value=shots)
        _keep_documents(built)
    return Suite(tasks)


@cache
def _manager(template: str) -> lm_eval.tasks.TaskManager:
    """Knows the templates of one folder; reading all of them takes ten seconds."""
    folder = Path(lm_eval.tasks.__file__).parent / template
    return lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)


def _source(name: str, task: str, rows: dict[str, list[benchmarks.Row]], limit: int | None) -> dict[str, Any]:
    """What to change in a template so that it reads our rows: of a part of a task its own, and no more than needed."""
    part = name.removeprefix(task).removeprefix("_")
    sets = {split: [row for row in found if not part or row["subject"] == part] for split, found in rows.items()}
    measured = "test" if "test" in sets else "validation"
    sets[measured] = sets[measured][:limit]
    splits = {"training_split": "train", "validation_split": "validation", "test_split": "test"}

    def datasets(**_: Any) -> dict[str, Dataset]:
        # A fingerprint of our own: theirs is a hash of all rows, and fails where packages lie in unusual folders.
        return {
            split: Dataset(InMemoryTable.from_pylist(found), fingerprint=f"{name}-{split}")
            for split, found in sets.items()
        }

    return {"custom_dataset": datasets, **{key: split if split in sets else None for key, split in splits.items()}}


def _keep_documents(task: Any) -> None:
    """Hand out the documents that were read with the task: the harness would process all of them at every look."""
    documents = list(task.task_docs)
    setattr(task, "test_docs" if task.has_test_docs() else "validation_docs", lambda: documents)


def _keep_prompts(task: Any) -> None:
    """Hand out the prompts already built from now on: making them takes longer than scoring them on a GPU."""

    def rewind(**_: Any) -> None:
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}

    task.build_all_requests = rewind


class LiveModel(HFLM):  # type: ignore[misc]
    """The harness' view of a model in memory, which stays as it is.

    Requests are sorted by length and packed by tokens, equal inputs are run once, and logits are made for the
    continuations alone, in float32.
    """

    def __init__(self, subject: Subject, suite: Suite) -> None:
        training, on_cpu = subject.model.training, next(subject.model.parameters()).device.type == "cpu"
        self._encoded: dict[Any, list[int]] = {}
        super().__init__(
            pretrained=subject.model,
            tokenizer=copy.deepcopy(subject.tokenizer),  # the harness gives it a padding token
            batch_size=subject.batch_size or (4 if on_cpu else 32),  # of generation
        )
        subject.model.train(training)
        self._suite = suite
        self._tokens_per_forward = 2_048 if on_cpu else 32_768
        self._rows_per_forward = subject.batch_size
        known = suite.batches.setdefault(subject.tokenizer, {})
        self._batches = known.setdefault((self.max_length, self._tokens_per_forward, self._rows_per_forward), [])

    def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
        """Token ids of a text; the last few are kept, as the answers to a question share their context."""
        key = (string, args, *sorted(options.items()))
        if key not in self._encoded:
            if len(self._encoded) >= 16:
                self._encoded.clear()
            self._encoded[key] = super().tok_encode(string, *args, **options)
        return self._encoded[key]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of every continuation, and whether greedy decoding would give it."""
        if not self._batches:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            return found
        return self._score(len(requests))

    def _loglikelihood_tokens(self, requests: list[Encoded], **_: Any) -> list[tuple[float, bool]]:
        self._batches += pack(requests, self.max_length, self._tokens_per_forward, self._rows_per_forward)
        return self._score(len(requests))

    @torch.no_grad()
    def _score(self, n: int) -> list[tuple[float, bool]]:
        totals = torch.zeros(n, dtype=torch.float64, device=self.device)
        misses = torch.zeros(n, dtype=torch.float64, device=self.device)
        plain = head_is_plain(self.model, self._batches[0].tokens[:1, :8].to(self.device))
        for batch in self._batches:
            request = batch.request.to(self.device)
            logs, hits = score_batch(self.model, batch, plain)
            totals.index_add_(0, request, logs.double().to(self.device))
            misses.index_add_(0, request, (~hits).double().to(self.device))
        if not torch.isfinite(totals).all():
            name = next(iter(self._suite.tasks), None)
            raise NumericsError("A log-likelihood is not finite", got=name, fix="dtype=float32 if it is half precision")
        return list(zip(totals.tolist(), (misses == 0).tolist(), strict=True))


def pack(requests: list[Encoded], longest: int, tokens: int, rows: int | None) -> list[Batch]:
    """Batches of at most so many padded tokens (and rows), longest inputs first; too long ones lose their beginning.

    Raises:
        DataError: a continuation is empty, or longer than the model's context.
    """
    inputs: dict[tuple[int, ...], list[int]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        if not 0 < len(continuation) <= longest:
            raise DataError("An answer does not fit the model", got=f"{len(continuation)} tokens", allowed=longest)
        inputs.setdefault(tuple((context + continuation)[-(longest + 1) : -1]), []).append(index)
    ordered = sorted(inputs, key=len, reverse=True)
    batches = []
    while ordered:
        size = max(1, min(tokens // len(ordered[0]), rows or len(ordered)))
        batches.append(_batch({key: inputs[key] for key in ordered[:size]}, requests))
        ordered = ordered[size:]
    return batches


def _batch(inputs: dict[tuple[int, ...], list[int]], requests: list[Encoded]) -> Batch:
    tokens = torch.zeros(len(inputs), max(map(len, inputs)), dtype=torch.int32)
    scored: list[tuple[int, int, int, int]] = []
    for row, (key, indices) in enumerate(inputs.items()):
        tokens[row, : len(key)] = torch.tensor(key)
        for index in indices:
            continuation = requests[index][2]
            start = len(key) - len(continuation)
            scored += [(row, start + i, token, index) for i, token in enumerate(continuation)]
    return Batch(tokens, *torch.tensor(scored).T)


def score_batch(
    model: nn.Module, batch: Batch, plain: bool
) -> tuple[Float[Tensor, " scored"], Bool[Tensor, " scored"]]:
    """Log-probability of each continuation token, and whether it is the most likely one.

    Args:
        model: a transformers causal language model.
        batch: inputs and what to score.
        plain: whether `head_logits` gives the model's own logits.
    """
    device = next(model.parameters()).device
    tokens, target = batch.tokens.to(device), batch.target.to(device)
    at = batch.row.to(device), batch.position.to(device)
    if plain:
        states = model.base_model(tokens, use_cache=False).last_hidden_state  # type: ignore[operator]
        slices = (head_logits(model, part).float() for part in _pick(states, at).split(SLICE))
    else:
        slices = (part.float() for part in _pick(model(tokens, use_cache=False).logits, at).split(SLICE))
    logs, hits = [], []
    for logits, token in zip(slices, target.split(SLICE), strict=True):
        right = token.to(logits.device)
        logs.append(logits.gather(-1, right[:, None])[:, 0] - logits.logsumexp(-1))
        hits.append(logits.argmax(-1) == right)
    return torch.cat(logs), torch.cat(hits)


def _pick(values: Float[Tensor, "b seq dim"], at: tuple[Tensor, Tensor]) -> Float[Tensor, "scored dim"]:
    """Rows of some positions, wherever the values are (a model may be spread over devices)."""
    row, position = (where.to(values.device) for where in at)
    return values[row, position]
