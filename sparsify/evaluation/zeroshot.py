"""Accuracy on question sets, as the evaluation harness (lm-eval) measures it."""

import math
from dataclasses import dataclass
from typing import Any

from sparsify.data import benchmarks
from sparsify.errors import UsageError
from sparsify.evaluation.base import Subject
from sparsify.types import Evaluation, Measurement, check_whole


@dataclass(frozen=True)
class ZeroShot:
    """One task of the harness with its stock template: prompts, answers and metrics are the harness' own.

    The papers report `acc` (the answer of highest log-likelihood), never `acc_norm` (per character), which is kept
    beside it. Differs from the harness in that log-likelihoods are float32 whatever the dtype of the model.

    Attributes:
        task: a name of `sparsify.data.benchmarks`.
        limit: only the first so many documents (of each subject of MMLU); the protocol says so.
        shots: examples in the prompt; None is the custom of the task (MMLU 5, GSM8K 8, all others none).
    """

    task: str
    limit: int | None = None
    shots: int | None = None
    version: int = 1

    def __post_init__(self) -> None:
        benchmark = benchmarks.find(self.task)
        for name, value, least in (("limit", self.limit, 1), ("shots", self.shots, 0)):
            check_whole(name, value, least, or_null=True)
        if self.shots not in (None, benchmark.shots) and not benchmark.examples:
            what = f"{self.task} has no examples to put into its prompt"
            raise UsageError(what, got=f"shots={self.shots}", allowed=benchmark.shots)

    @property
    def protocol(self) -> str:
        """`boolq@0-shot`, and with a limit `boolq@0-shot, first 20`."""
        tag = f"{self.task}@{self._shots}-shot"
        return tag if self.limit is None else f"{tag}, first {self.limit}"

    @property
    def _shots(self) -> int:
        return benchmarks.find(self.task).shots if self.shots is None else self.shots

    def check(self, subject: Subject) -> None:
        """The rows are there, and a tokenizer that reads them.

        Raises:
            UsageError: the model has no tokenizer.
            DataError: the rows are nowhere to be found.
        """
        if subject.tokenizer is None:
            raise UsageError(
                "Tasks need a tokenizer", got="random weights", fix="model=smollm2-135m or eval=perplexity"
            )
        from sparsify.evaluation import harness  # lm-eval takes seconds to import

        harness.load(self.task, self._shots, self.limit)

    def evaluate(self, subject: Subject) -> Evaluation:
        """`acc` (`exact_match` for GSM8K) with its standard error and number of documents; other metrics in `more`.

        Raises:
            NumericsError: a log-likelihood is not finite.
        """
        self.check(subject)
        from sparsify.evaluation import harness

        scores = harness.scores(self.task, self._shots, self.limit, subject)
        first, *more = _measurements(self.task, scores)
        details = {
            "task": self.task,
            "limit": self.limit,
            "task_version": scores[0].version,
            "data": benchmarks.provenance(self.task),
            "harness": harness.VERSION,
            "bos": harness.starts_with_bos(subject.tokenizer),
        }
        return Evaluation(**first.to_json(), protocol=self.protocol, more=tuple(more), details=details)


def _measurements(task: str, scores: list[Any]) -> list[Measurement]:
    """The metrics over all documents, then the first metric of each part where the task has parts (subjects)."""
    n = sum(score.n for score in scores)
    overall = [
        _measurement(metric, sum(score.metrics[metric] * score.n for score in scores) / n, n)
        for metric in scores[0].metrics
    ]
    metric = overall[0].metric
    parts = [(f"{metric}_{score.name.removeprefix(task + '_')}", score) for score in scores if len(scores) > 1]
    return overall + [_measurement(name, score.metrics[metric], score.n) for name, score in parts]


def _measurement(metric: str, value: float, n: int) -> Measurement:
    counted = n > 1 and metric.startswith(("acc", "exact_match"))  # a mean of zeros and ones
    error = math.sqrt(value * (1 - value) / (n - 1)) if counted else None
    return Measurement(metric=metric, value=value, n=n, stderr=error)
