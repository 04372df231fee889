"""Drift and absorption of a disturbance as an evaluation: the curves of `sparsify.analysis` on a choice of windows."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.analysis.absorption import Reading, absorption
from sparsify.analysis.drift import Drift, drift
from sparsify.analysis.perturbation import Source
from sparsify.data.inputs import first
from sparsify.data.windows import Windows
from sparsify.evaluation.base import Subject
from sparsify.types import Evaluation, Measurement, check_whole

MOST = 10_000
"""Draws, or followed blocks, whose drifts are all kept."""


@dataclass(frozen=True)
class AbsorptionCurves:
    """What later blocks make of a disturbance of each block, for the model as it stands (dense at sparsity 0).

    Source: arXiv 2606.15161, by second-hand notes; what each curve is stands in `analysis.absorption.Absorption`.

    Attributes:
        windows: which text.
        source: the disturbance.
        reading: how coefficients are read off the drift.
        limit: windows of the text that are used; None for all.
        seeds: draws of the noise.
        followed: disturbed blocks whose whole drift is kept, spread evenly from the first to the last but one.
    """

    windows: Windows
    source: Source
    reading: Reading = field(default_factory=Reading)
    limit: int | None = 8
    seeds: int = 3
    followed: int = 5
    version: int = 2

    def __post_init__(self) -> None:
        check_whole("limit", self.limit, or_null=True)
        check_whole("seeds", self.seeds, most=MOST)
        check_whole("followed", self.followed, most=MOST)

    def check(self, subject: Subject) -> None:
        """The text is there, and the model can read its windows."""
        subject.check(self.windows)

    def evaluate(self, subject: Subject) -> Evaluation:
        """`r` (value: geometric mean over all blocks but the last); `more` has the other coefficients by block, how
        large the disturbance is where it is put in (`size`), how it falls, and the drift and the turn (1 - cosine) of
        the followed blocks, with the drift if the disturbance were only handed on; `first_token` is the share of the
        disturbance's squared length that the first token carries.
        """
        inputs = first(subject.inputs(self.windows), self.limit)
        drifts = drift(
            subject.view,
            inputs,
            self.source,
            seeds=self.seeds,
            batch_size=subject.batch_size,
            progress=subject.progress,
        )
        read = absorption(drifts, self.reading)
        inner = read.r[:-1] if len(read.r) > 1 else read.r
        return Evaluation(
            **_curve("r", read.r, read.stderr, value=float(inner.log().mean().exp())).to_json(),
            protocol=f"{self.windows.protocol}, first {len(inputs)}, {self.seeds} draws",
            text=inputs.provenance,
            more=(
                *(_curve(name, getattr(read, name)) for name in ("u", "D", "pass_through", "excess")),
                *self._followed(drifts),
            ),
        )

    def _followed(self, drifts: Drift) -> list[Measurement]:
        """Means over windows and seeds; a followed block's curves run from that block to the last."""
        relative, relative_error = drifts.over_windows(drifts.relative)
        cosine, cosine_error = drifts.over_windows(drifts.cosine)
        handed_on, _ = drifts.over_windows(drifts.handed_on())
        blocks = relative.shape[1]
        token = (drifts.start[..., 0].square() / drifts.start.square().sum(-1)).mean((1, 2))
        more = [_curve("size", relative.diagonal()), _curve("falls", _falls(relative)), _curve("first_token", token)]
        for block in sorted({round(x) for x in torch.linspace(0, max(blocks - 2, 0), self.followed).tolist()}):
            more += [
                _curve(f"relative.{block + 1}", relative[block, block:], relative_error[block, block:]),
                _curve(f"turned.{block + 1}", 1 - cosine[block, block:], cosine_error[block, block:]),
                _curve(f"handed_on.{block + 1}", handed_on[block, block:]),
            ]
        return more


def _falls(relative: Float[Tensor, "blocks blocks"]) -> Float[Tensor, " blocks"]:
    """Share of the steps from a disturbed block to the last in which its drift falls; one for the last block."""
    steps = [row[block:].diff() for block, row in enumerate(relative)]
    return torch.tensor([float((step < 0).double().mean()) if len(step) else 1.0 for step in steps])


def _curve(
    metric: str,
    values: Float[Tensor, " some"],
    stderr: Float[Tensor, " some"] | None = None,
    value: float | None = None,
) -> Measurement:
    """A curve with its last value, or another, and its standard errors where there are any."""
    curve = values.tolist()
    errors = None if stderr is None or bool(stderr.isnan().any()) else stderr.tolist()
    return Measurement(metric=metric, value=curve[-1] if value is None else value, curve=curve, curve_stderr=errors)
