"""LoSA: prune a little more, share out ranks, train low-rank adapters under the masks, and again; then merge."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsify.allocators.budget import scale
from sparsify.allocators.profile import Profile
from sparsify.analysis.reconstruction import reconstruction_losses
from sparsify.data.examples import Examples
from sparsify.errors import NumericsError, UsageError
from sparsify.methods.base import Method, MethodResult
from sparsify.methods.blockwise import LayerResult
from sparsify.methods.job import Job
from sparsify.model.blocks import BlockView
from sparsify.model.masks import Masks
from sparsify.recovery.adapters import Adapters, check_scale
from sparsify.recovery.ranks import allocate_ranks, mean_rank, step_samples, step_sparsity
from sparsify.recovery.schedule import Schedule
from sparsify.recovery.teacher import dense_copy
from sparsify.recovery.training import Trainer, peak_memory
from sparsify.types import SparsityPlan, check_whole


@dataclass(frozen=True, kw_only=True)
class LoSA(Method):
    """Dynamic low-rank sparse adaptation: T steps of pruning and training with masked adapters.

    Source: LoSA (arXiv 2502.14816), Algorithm 1, and its released code where the text is silent. Step t
    (1) merges the adapters into the weights; (2) asks the cell's allocator (LoSA's own is `similarity`) for
    sparsities of mean Theta_f - Theta_f (1 - t/T)^3; (3) prunes with the cell's pruner; (4) measures every block's
    reconstruction loss against the dense model; (5) takes the adapters out again; (6) gives block i a rank in
    proportion to its loss, of mean first_rank + growth (t - 1); (7) trains the adapters, W x + scale M.(BA) x with
    M = (W != 0), on its share of the text. At the end the adapters are merged, and every zero stays.

    Deviations, undone by `released=true`: weights that were pruned may come back, with the dense model's value, so
    that each step and the last have exactly the sparsity that was asked for (the release's zeros never grow back, and
    a block whose share falls ends up too sparse); as many components are stored as ranks are allocated (the release
    stores eight and allocates up to sixteen); a block whose rank falls keeps what was trained; no sample is seen by
    two steps; ranks add up exactly. Under a fixed N:M every step prunes to the pattern: only the masks are chosen anew.

    Attributes:
        training: the text: a spec with `inputs(tokenizer, seed)`, `Inputs`, or token ids [n, seqlen].
        schedule: of the training.
        steps: T.
        allocate: ask the allocator in `every` step, on the model as it is then; or `first`, once, for the last step's
            sparsity on the dense model, and scale that down for the steps before (for allocators that search).
        ranks: `error`, by reconstruction loss; or `uniform`.
        first_rank: mean rank of the first step.
        growth: of the mean rank from step to step.
        low: rank that no block is below.
        high: rank that no block is above.
        scale: of the product BA.
        released: do as the released code does.
    """

    training: Any = None
    schedule: Schedule = field(default_factory=Schedule)
    steps: int = 5
    allocate: Literal["every", "first"] = "every"
    ranks: Literal["error", "uniform"] = "error"
    first_rank: int = 6
    growth: int = 1
    low: int = 1
    high: int = 16
    scale: float = 2.0
    released: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "first_rank": 1, "low": 1, "high": 1, "growth": 0}.items():
            check_whole(name, getattr(self, name), least)
        if self.ranks not in ("error", "uniform") or self.allocate not in ("every", "first"):
            raise UsageError(
                "Unknown rule",
                got=f"ranks={self.ranks}, allocate={self.allocate}",
                allowed="ranks: error, uniform; allocate: every, first",
            )
        check_scale(self.scale)
        last = mean_rank(self.steps, self.first_rank, self.growth)
        if not self.low <= self.first_rank <= last <= self.high:
            raise UsageError(
                "The mean rank of every step lies between the bounds of a block's rank",
                got=f"mean ranks {self.first_rank} to {last}, low={self.low}, high={self.high}",
                fix=f"method.high={max(last, 16)}",
            )

    @property
    def stored(self) -> int:
        """Components that there is room for: the release's eight are too few for its own ranks."""
        return min(8, self.high) if self.released else self.high

    def block_ranks(self, t: int, errors: Mapping[int, float]) -> dict[int, int]:
        """A rank for every block, by its reconstruction loss, no higher than what is stored."""
        mean = mean_rank(t, self.first_rank, self.growth)
        if self.ranks == "uniform":
            return dict.fromkeys(errors, min(mean, self.stored))
        ranks = allocate_ranks(list(errors.values()), mean, self.low, self.high, released=self.released)
        return {block: min(rank, self.stored) for block, rank in zip(errors, ranks, strict=True)}

    def shares(self, samples: int) -> list[range]:
        """The samples of every step."""
        steps = range(1, self.steps + 1)
        return [step_samples(t, self.steps, samples, released=self.released) for t in steps]

    def prepare(self, job: Job) -> None:
        self.shares(len(job.examples(self.training)))

    def apply(self, view: BlockView, job: Job) -> MethodResult:
        dense = job.dense()
        teacher = dense_copy(view, dense) if self.schedule.distill else None
        rank, schedule = min(self.first_rank, self.stored), self.schedule
        with (
            peak_memory(view.device) as peak,
            Adapters(view, rank, self.stored, scale=self.scale, dropout=schedule.dropout, seed=job.seed) as adapters,
        ):
            result = _Run(self, view, job, job.examples(self.training), dense, teacher, adapters).result()
            adapters.merge()
            return replace(result, notes={**result.notes, **peak()})


@dataclass
class _State:
    """What the last whole step left, beside the model and its adapters; a checkpoint has it as JSON."""

    step: int = 0
    plan: SparsityPlan | None = None
    rows: list[LayerResult] = field(default_factory=list)
    masks: Masks = field(default_factory=Masks)
    log: list[dict[str, Any]] = field(default_factory=list)
    goal: dict[str, float] | None = None  # of `allocate=first`

    def to_json(self) -> str:
        assert self.plan is not None
        plan = [self.plan.to_rows(), asdict(self.plan.ledger), list(self.plan.trials), dict(self.plan.notes)]
        return json.dumps([self.step, plan, [row.to_row() for row in self.rows], self.log, self.goal])

    @classmethod
    def from_json(cls, text: str, masks: Masks) -> "_State":
        step, (targets, ledger, trials, notes), rows, log, goal = json.loads(text)
        plan = replace(SparsityPlan.from_rows(targets, ledger), trials=tuple(trials), notes=notes)
        return cls(step, plan, [LayerResult(**row) for row in rows], masks, log, goal)


@dataclass
class _Run:
    """The steps of one run."""

    method: LoSA
    view: BlockView
    job: Job
    text: Examples
    dense: Mapping[str, Tensor]
    teacher: nn.Module | None
    adapters: Adapters

    def __post_init__(self) -> None:
        self.shares, schedule = self.method.shares(len(self.text)), self.method.schedule
        total = sum(schedule.steps(len(share)) for share in self.shares)
        self.trainer = Trainer(self.view, self.adapters.parameters(), schedule, total, dense=self.teacher)

    def result(self) -> MethodResult:
        done, steps = self._resumed(), self.method.steps
        for t in range(done.step + 1, steps + 1):
            self.job.progress("step", t - 1, steps)
            done = self._step(t, done)
            self._save(done)
        self.job.progress("step", steps, steps)
        assert done.plan is not None
        return MethodResult(done.plan, done.rows, done.masks, self._notes(done))

    def _notes(self, done: _State) -> dict[str, Any]:
        """Curves by step, and by step and block; totals."""
        by_step = {f"step_{name}": [row[name] for row in done.log] for name in done.log[0] if name != "loss"}
        return by_step | {
            "loss": [loss for row in done.log for loss in row["loss"]],
            "trainable": done.log[-1]["trainable"],
            "training_tokens": sum(map(len, self.text.ids)),
            "training_text": dict(self.text.provenance),
            "without_adapter": [skipped.name for skipped in self.adapters.skipped],
        }

    def _step(self, t: int, done: _State) -> _State:
        method, view, job, began = self.method, self.view, self.job, time.perf_counter()
        self.adapters.merge()
        if not method.released:
            self._revive()
        plan, goal = self._plan(t, done.goal)
        masks = Masks()
        rows = job.prune(plan, masks=masks)
        errors = reconstruction_losses(view, self.dense, job.calibration, batch_size=job.batch_size)
        self.adapters.unmerge()
        ranks = method.block_ranks(t, {block: errors[block] for block in self.adapters.ranks})
        self.adapters.set_ranks(ranks, keep=not method.released)
        pruned = time.perf_counter()
        losses = self._train(t)
        row = {
            "sparsity": view.sparsity(),
            "block_sparsity": _by_block(rows),
            "reconstruction": errors,
            "ranks": list(ranks.values()),
            "trainable": self.adapters.num_trainable(),
            "loss": losses,
            "prune_seconds": pruned - began,
            "train_seconds": time.perf_counter() - pruned,
        }
        return _State(t, plan, rows, masks, [*done.log, row], goal)

    @torch.no_grad()
    def _revive(self) -> None:
        """Give pruned weights the dense model's values, so that the next masks are chosen among all."""
        for layer in self.view.layers:
            weight = layer.weight
            layer.write(torch.where(weight == 0, self.dense[layer.spec.name].to(weight.device), weight))

    def _plan(self, t: int, goal: dict[str, float] | None) -> tuple[SparsityPlan, dict[str, float] | None]:
        """The step's plan, and the last step's where that is known."""
        job, method = self.job, self.method
        fixed = job.pattern.kept is not None
        wanted = job.sparsity if fixed else step_sparsity(t, method.steps, job.sparsity)
        if method.allocate == "every" or fixed:
            return job.plan(wanted, changed=True), None  # adapters are no part of the dense model
        if goal is None:
            first = job.plan(job.sparsity, changed=True)
            goal = dict(first.sparsities())
            if t == method.steps:
                return first, goal
        return Profile(goal, adjust=scale).fitted(self.view.table, wanted, job.pattern), goal

    def _train(self, t: int) -> list[float]:
        if self.method.schedule.restart:
            self.trainer.restart(self.method.schedule.steps(len(self.shares[t - 1])))
        share, seed = self.shares[t - 1], 1_000_003 * self.job.seed + t
        try:
            return self.trainer.run(self.text.take(slice(share.start, share.stop)), seed, self.job.progress)
        except NumericsError as error:  # the checkpoint is that of the step before
            got = f"{error.got}, in step {t} of {self.method.steps} of the method"
            raise NumericsError(error.what, got=got, fix=error.fix) from error

    def _fingerprint(self) -> str:
        """What a checkpoint has to agree in to be resumed: settings, seed and texts."""
        job, method = self.job, replace(self.method, training=None)
        asked = [method, job.pruner, job.allocator, job.pattern, job.sparsity, job.seed]
        return json.dumps([*map(repr, asked), job.calibration.digest, self.text.digest])

    def _save(self, done: _State) -> None:
        self.job.checkpoint.save(
            {
                "fingerprint": self._fingerprint(),
                "done": done.to_json(),
                "masks": {name: bits.clone() for name, bits in done.masks.bits().items()},
                "weights": {layer.spec.name: layer.weight.detach().cpu().clone() for layer in self.view.layers},
                "adapters": self.adapters.state_dict(),
                "trainer": None if self.method.schedule.restart else self.trainer.state_dict(),
            }
        )

    @torch.no_grad()
    def _resumed(self) -> _State:
        """Where a killed run was after its last whole step."""
        saved, masks = self.job.checkpoint.load(), Masks()
        if not isinstance(saved, Mapping) or saved.get("fingerprint") != self._fingerprint():
            return _State()
        for layer in self.view.layers:
            name = layer.spec.name
            layer.write(saved["weights"][name].to(layer.weight.device))
            if name in saved["masks"]:
                masks.put(name, saved["masks"][name], tuple(layer.weight.shape))
        self.adapters.load_state_dict(saved["adapters"])
        if saved["trainer"] is not None:
            self.trainer.load_state_dict(saved["trainer"])
        return _State.from_json(saved["done"], masks)


def _by_block(rows: list[LayerResult]) -> list[float]:
    """Counted zeros over weights of every block."""
    zeros: dict[int, list[int]] = {}
    for row in rows:
        counts = zeros.setdefault(row.block, [0, 0])
        counts[0] += row.zeros
        counts[1] += row.numel
    return [none / all_ for none, all_ in zeros.values()]
