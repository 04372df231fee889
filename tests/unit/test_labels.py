import pytest

from sparsify.runs import labels, menu, planning


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ([], "wanda + uniform, 50%"),
        (["sparsity=0"], "dense"),
        (["pattern=2:8", "sparsity=null"], "wanda + uniform, 75% 2:8"),
        (["allocator=atp", "allocator.beta=0.010", "sparsity=0.725"], "wanda + atp(beta=0.01), 72.5%"),
        (["allocator=owl", "allocator.lam=0.1", "pruner.group=matrix"], "wanda(group=matrix) + owl(lam=0.1), 50%"),
        (["allocator=absorption"], "wanda + absorption, 50%"),
        (
            ["allocator=absorption", "allocator@allocator.inner=alphapruning", "allocator.inner.tau=0.2"],
            "wanda + absorption(inner=alphapruning(tau=0.2)), 50%",
        ),
        (
            ["allocator=absorption", "perturbation@allocator.source=noise", "allocator.source.spared=1"],
            "wanda + absorption(source=noise(spared=1)), 50%",
        ),
        (
            ["allocator=absorption", "allocator.reading.norm=frobenius"],
            "wanda + absorption(reading.norm=frobenius), 50%",
        ),
        (["seed=3", "calibration.sampler=random"], "wanda + uniform, 50%, calibration.sampler=random, seed=3"),
        (["data@calibration.text=c4"], "wanda + uniform, 50%, calibration.text=c4"),
        (["method.regime=dense"], "wanda + uniform, 50%, method=oneshot(regime=dense)"),
        (["quantiser=gptq"], "wanda + uniform, 50%, quantiser=gptq"),
        (
            ["quantiser=rtn", "quantiser.bits=3.5", "allocator@quantiser.allocator=atp_relative"],
            "wanda + uniform, 50%, quantiser=rtn(allocator=atp_relative, bits=3.5)",
        ),
        (["method=joint", "method.bits=3", "pruner=sparsegpt"], "sparsegpt + uniform, 50%, method=joint(bits=3)"),
        (
            ["recovery=full", "tuning=generated"],
            "wanda + uniform, 50%, recovery=full(training=written by the dense model, 4096 samples)",
        ),
        (["scale=paper"], "wanda + uniform, 50%"),
        (["scale=paper", "allocator=equimarginal"], "wanda + equimarginal, 50%"),
        (["scale=paper", "allocator=equimarginal", "allocator.steps=7"], "wanda + equimarginal(steps=7), 50%"),
        (["device=cpu", "batch_size=3", "eval=zeroshot"], "wanda + uniform, 50%"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_label_shows_what_differs_from_the_defaults(overrides, label):
    assert labels.describe(menu.compose(overrides)) == f"smollm2-135m, {label}"


def test_what_papers_use_for_a_model_is_no_difference():
    assert labels.describe(menu.compose(["model=llama2-7b", "allocator=owl"])) == "llama2-7b, wanda + owl, 50%"


@pytest.mark.parametrize(
    "sweep",
    ["allocator=owl allocator.lam=0.05,0.08,0.1", "seed=0,1", "pruner.group=row,matrix", "calibration.windows=2,3"],
)
def test_no_two_cells_of_a_sweep_look_the_same(sweep):
    jobs = planning.grid(sweep.split())
    assert len({labels.describe(menu.compose(job)) for job in jobs}) == len(jobs)
