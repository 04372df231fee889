import math
from itertools import pairwise

import pytest
import torch
from fakes import FakeContext

from sparsify.allocators.arithmetic import Arithmetic, beta_grid, legal_maximum, progression
from sparsify.allocators.base import allocate, outlier_mapping
from sparsify.allocators.owl import OWL
from sparsify.allocators.spectral import AlphaPruning, alpha_mid, alpha_peak, spectral_profile, spectrum
from sparsify.allocators.uniform import Uniform
from sparsify.errors import NumericsError, UsageError
from sparsify.model.statistics import NORM


def heavy_tailed(layer):
    """Later blocks have more outliers."""
    return torch.randn(layer.out_features, layer.in_features) ** (1 + 2 * layer.block)


class KnownAlphas(FakeContext):
    """A model whose exponents are `alpha(block)`."""

    def __init__(self, table, alpha):
        super().__init__(table)
        self.alphas = {x.name: alpha(x.block) for x in table}

    def once(self, key, make, *, of_weights=False):
        return self.alphas


def by_block(plan, table):
    values = {x.block: plan.targets[x.name].sparsity for x in table}
    assert all(plan.targets[x.name].sparsity == values[x.block] for x in table), "layers of a block differ"
    return [values[i] for i in sorted(values)]


def mean_of(plan, table):
    return sum(plan.targets[x.name].sparsity * x.numel for x in table) / table.numel


@pytest.mark.parametrize("wanted", [0.0, 0.5, 0.999])
def test_uniform_gives_every_layer_the_budget(wanted, unequal):
    assert set(allocate(Uniform(), unequal, wanted, FakeContext(unequal)).sparsities().values()) == {wanted}


# ATP


@pytest.mark.parametrize(
    ("wanted", "beta", "number"), [(0.7, 0.018, 32), (0.5, 0.004, 7), (0.6, -0.01, 12), (0.8, 0.0, 3)]
)
def test_atp_is_equation_10_with_exact_mean(wanted, beta, number, blocks):
    table = blocks(number)
    plan = allocate(Arithmetic(beta), table, wanted, FakeContext(table))
    expected = [wanted - beta * (number - 1) / 2 + beta * (i - 1) for i in range(1, number + 1)]
    assert by_block(plan, table) == pytest.approx(expected, abs=1e-12)
    assert mean_of(plan, table) == pytest.approx(wanted, abs=1e-12)


def test_the_papers_range_at_70_percent(blocks):
    profile = progression(0.7, 0.018, 32)
    assert (profile[0], profile[-1]) == pytest.approx((0.421, 0.979))


TRIALS = {
    16: {0.5: 33, 0.6: 26, 0.7: 20, 0.8: 13},
    28: {0.5: 18, 0.6: 14, 0.7: 11, 0.8: 7},
    32: {0.5: 16, 0.6: 12, 0.7: 9, 0.8: 6},
    40: {0.5: 12, 0.6: 10, 0.7: 7, 0.8: 5},
    60: {0.5: 8, 0.6: 6, 0.7: 5, 0.8: 3},
    80: {0.5: 6, 0.6: 5, 0.7: 3, 0.8: 2},
}


@pytest.mark.parametrize(
    ("number", "wanted", "trials"), [(n, s, t) for n, row in TRIALS.items() for s, t in row.items()]
)
def test_the_grid_has_the_papers_number_of_trials_and_uniform(number, wanted, trials):
    grid = beta_grid(wanted, number)
    assert grid == pytest.approx([0.002 * i for i in range(trials + 1)])
    assert grid[-1] <= legal_maximum(wanted, number) < grid[-1] + 0.002


@pytest.mark.parametrize(("number", "wanted"), [(2, 0.3), (30, 0.7), (80, 0.5)])
def test_the_legal_maximum_is_where_a_block_reaches_a_bound(number, wanted):
    limit = legal_maximum(wanted, number)
    ends = [wanted - limit * (number - 1) / 2, wanted + limit * (number - 1) / 2]
    assert min(ends[0], 1 - ends[1]) == pytest.approx(0, abs=1e-12)


def test_one_block_is_uniform(blocks):
    table = blocks(1)
    assert by_block(allocate(Arithmetic(0.3), table, 0.5, FakeContext(table)), table) == [0.5]
    assert beta_grid(0.5, 1) == [0.0]


@pytest.mark.parametrize("beta", [0.0194, -0.0194, 1.0])
def test_a_beta_beyond_the_limit_is_refused_and_the_limit_named(beta, blocks):
    table = blocks(32)
    with pytest.raises(UsageError, match=r"-0\.0193548 <= beta <= 0\.0193548.*allocator\.beta=0\.019"):
        allocate(Arithmetic(beta), table, 0.7, FakeContext(table))


def test_a_beta_at_the_limit_is_legal(blocks):
    table = blocks(32)
    limit = legal_maximum(0.7, 32)
    assert by_block(allocate(Arithmetic(limit), table, 0.7, FakeContext(table)), table)[-1] == pytest.approx(1)


@pytest.mark.parametrize("options", [{"step": 0.0}, {"step": -0.1}])
def test_atp_refuses_bad_hyper_parameters(options):
    with pytest.raises(UsageError):
        Arithmetic(**options)


def test_a_beta_that_is_not_a_number_is_refused():
    with pytest.raises(UsageError):
        Arithmetic(math.nan)


@pytest.mark.parametrize("best", [0.0, 0.006, 0.018])
def test_auto_picks_the_beta_of_lowest_heldout_perplexity(best, blocks):
    table = blocks(32)

    def objective(plan):
        values = by_block(plan, table)
        return 10 + abs(values[1] - values[0] - best)

    plan = allocate(Arithmetic(), table, 0.7, FakeContext(table, score=objective))
    assert plan.notes["beta"] == pytest.approx(best)
    assert by_block(plan, table) == pytest.approx(progression(0.7, best, 32))
    assert [t["beta"] for t in plan.trials] == beta_grid(0.7, 32)
    assert min(t["heldout_perplexity"] for t in plan.trials) == pytest.approx(10)


def test_a_search_without_any_finite_perplexity_is_refused(blocks):
    table = blocks(8)
    with pytest.raises(NumericsError, match="finite"):
        allocate(Arithmetic(), table, 0.7, FakeContext(table, score=lambda plan: math.inf))


def test_unequal_blocks_keep_the_parameter_budget(unequal):
    plan = allocate(Arithmetic(0.1), unequal, 0.6, FakeContext(unequal))
    values = by_block(plan, unequal)
    assert mean_of(plan, unequal) == pytest.approx(0.6, abs=1e-12)
    assert [b - a for a, b in pairwise(values)] == pytest.approx([0.1, 0.1])


# OWL


def outlier_share(table, context, multiple):
    """Percent of a block's |W_ij| sqrt(square_j) above `multiple` times their mean, entry by entry."""
    percents, stats = [], context.stats(frozenset({NORM}))
    for block in sorted({x.block for x in table}):
        scores = [
            abs(w) * math.sqrt(stats[x.name].square[j].item())
            for x in table
            if x.block == block
            for row in context.tensors[x.name].double().tolist()
            for j, w in enumerate(row)
        ]
        mean = sum(scores) / len(scores)
        percents.append(100 * sum(s > multiple * mean for s in scores) / len(scores))
    return percents


@pytest.mark.parametrize(("wanted", "lam", "multiple"), [(0.7, 0.08, 3.0), (0.5, 0.2, 2.0), (0.6, 0.0, 5.0)])
def test_owl_prunes_blocks_with_outliers_less(wanted, lam, multiple, blocks):
    table = blocks(5)
    context = FakeContext(table, weight=heavy_tailed)
    plan = allocate(OWL(M=multiple, lam=lam), table, wanted, context)
    percents = outlier_share(table, context, multiple)
    assert len(set(percents)) > 2
    assert plan.notes["outlier_percent"] == pytest.approx(percents)
    values = by_block(plan, table)
    assert max(values) - min(values) == pytest.approx(2 * lam, abs=1e-12)
    assert sum(values) / 5 == pytest.approx(wanted, abs=1e-12)
    span = max(percents) - min(percents)
    keep = [(p - min(percents)) / span * 2 * lam for p in percents]
    assert values == pytest.approx([1 - (k - sum(keep) / 5 + 1 - wanted) for k in keep], abs=1e-9)


def test_owls_range_is_not_centred():
    values = outlier_mapping([0.0, 0.0, 0.0, 1.0], 0.16, 0.7)
    assert values == pytest.approx([0.74, 0.74, 0.74, 0.58])


def test_a_constant_signal_is_uniform():
    assert outlier_mapping([2.0] * 4, 0.16, 0.7) == pytest.approx([0.7] * 4)


@pytest.mark.parametrize("wanted", [0.0, 0.005, 0.02, 0.05, 0.97])
def test_owl_keeps_the_budget_and_the_bounds_at_the_ends(wanted, blocks):
    table = blocks(5)
    plan = allocate(OWL(M=2.0, lam=0.2), table, wanted, FakeContext(table, weight=heavy_tailed))
    assert mean_of(plan, table) == pytest.approx(wanted, abs=1e-12)
    assert all(0 <= s <= 0.99 for s in plan.sparsities().values())


def test_owl_keeps_the_parameter_budget_of_unequal_blocks(unequal):
    plan = allocate(OWL(M=2.0), unequal, 0.6, FakeContext(unequal, weight=heavy_tailed))
    assert mean_of(plan, unequal) == pytest.approx(0.6, abs=1e-12)


@pytest.mark.parametrize("options", [{"M": 0.0}, {"lam": -0.1}, {"lam": 0.5}])
def test_owl_refuses_bad_hyper_parameters(options):
    with pytest.raises(UsageError):
        OWL(**options)


# AlphaPruning


def hill(tail):
    """1 + n / sum ln(lambda_k / lambda_min) of an ascending tail."""
    return 1 + len(tail) / sum(math.log(value / tail[0]) for value in tail)


def naive_alpha_peak(values, bins=100):
    """Fix-finger: the tail of smallest KS distance among those that start near the peak of the log spectrum."""
    logs = [math.log10(v) for v in values]
    low, width = min(logs), (max(logs) - min(logs)) / bins
    counts = [0] * bins
    for log in logs:
        counts[min(int((log - low) / width), bins - 1)] += 1
    peak = 10 ** (low + counts.index(max(counts)) * width)
    best = (math.inf, None)
    for start, xmin in enumerate(values[:-1]):
        if not math.log10(0.95 * peak) <= xmin <= 1.5 * peak:
            continue
        tail = values[start:]
        alpha = hill(tail)
        gaps = [abs(1 - (v / xmin) ** (1 - alpha) - rank / len(tail)) for rank, v in enumerate(tail)]
        best = min(best, (max(gaps) if alpha > 1 else 1.0, alpha))
    return best[1]


def random_spectra():
    generator = torch.Generator().manual_seed(3)
    for exponent in (1.0, 2.0, 4.0):
        for count in (24, 90, 200):
            noise = torch.rand(count, generator=generator, dtype=torch.float64)
            yield pytest.param((1 - noise).pow(-exponent / 2).sort().values.float(), id=f"pareto{exponent}-{count}")
            matrix = torch.randn(count, 2 * count, generator=generator) / 10
            yield pytest.param(torch.linalg.svdvals(matrix).square().flip(0), id=f"gauss{exponent}-{count}")


@pytest.mark.parametrize("values", list(random_spectra()))
def test_alpha_peak_is_the_fix_finger_exponent(values):
    assert alpha_peak(values) == pytest.approx(naive_alpha_peak(values.double().tolist()), rel=1e-3)


@pytest.mark.parametrize("values", list(random_spectra()))
def test_alpha_mid_is_the_exponent_of_the_upper_half(values):
    assert alpha_mid(values) == pytest.approx(hill(values.double().tolist()[len(values) // 2 :]), rel=1e-3)


def test_a_heavy_tail_has_a_small_exponent():
    places = (torch.arange(1, 401) - 0.5) / 400
    heavy, light = ((1 - places).pow(-1 / (alpha - 1)) for alpha in (2.0, 5.0))
    assert alpha_mid(heavy) == pytest.approx(2.0, abs=0.1)
    assert alpha_mid(light) == pytest.approx(5.0, abs=0.3)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_the_spectrum_is_that_of_the_smaller_correlation_matrix(shape):
    weight = torch.randn(shape)
    small = weight @ weight.T if shape[0] < shape[1] else weight.T @ weight
    torch.testing.assert_close(spectrum(weight), torch.linalg.eigvalsh(small), rtol=1e-3, atol=1e-4)


def test_a_rank_deficient_matrix_has_an_exponent():
    weight = torch.cat([torch.zeros(4, 40), torch.randn(20, 40)])
    assert alpha_peak(spectrum(weight)) == pytest.approx(alpha_peak(spectrum(weight[4:])), rel=1e-3)


@pytest.mark.parametrize("mapping", ["block", "layer"])
@pytest.mark.parametrize("estimator", ["alpha_peak", "alpha_mid"])
def test_alphapruning_is_linear_in_alpha_within_tau_and_meets_the_budget(mapping, estimator, make_table):
    table = make_table(*([[(24, 16), (12, 24)]] * 4))
    context = FakeContext(table)
    tau, wanted = 0.3, 0.6
    plan = allocate(AlphaPruning(tau, estimator, mapping), table, wanted, context)
    alphas = plan.notes["alpha"]
    if mapping == "block":
        means = [sum(alphas[x.name] for x in table if x.block == b) / 2 for b in range(4)]
        alphas = {x.name: means[x.block] for x in table}
    low, high = min(alphas.values()), max(alphas.values())
    phi = {name: 1 - tau + 2 * tau * (a - low) / (high - low) for name, a in alphas.items()}
    eta = wanted * table.numel / sum(phi[x.name] * x.numel for x in table)
    assert plan.sparsities() == pytest.approx({name: eta * p for name, p in phi.items()}, abs=1e-9)
    assert min(plan.sparsities().values()) == pytest.approx((1 - tau) * eta)
    assert max(plan.sparsities().values()) == pytest.approx((1 + tau) * eta)
    assert mean_of(plan, table) == pytest.approx(wanted, abs=1e-12)


RISING = {"clip": (True, 0.99), "as released": (False, 1.0)}


@pytest.mark.parametrize("name", RISING)
def test_at_high_sparsity_clipping_keeps_the_budget_and_the_release_does_not(name, blocks):
    clip, top = RISING[name]
    table = blocks(6)
    context = KnownAlphas(table, lambda block: 3.0 if block > 1 else 2.0)
    plan = allocate(AlphaPruning(tau=0.5, clip=clip), table, 0.8, context)
    released = spectral_profile(table, context.alphas, 0.5, 0.8)
    assert max(released.values()) > 1
    assert max(plan.sparsities().values()) == top
    assert plan.ledger.raw == pytest.approx(0.8)
    assert plan.ledger.num_clipped == 8
    if clip:
        assert mean_of(plan, table) == pytest.approx(0.8, abs=1e-9)
    else:
        assert mean_of(plan, table) == pytest.approx(plan.ledger.clipped) != pytest.approx(0.8)
        assert plan.sparsities() == {layer: min(value, 1.0) for layer, value in released.items()}


def test_equal_alphas_are_uniform(blocks):
    table = blocks(3)
    plan = allocate(AlphaPruning(), table, 0.7, KnownAlphas(table, lambda block: 3.0))
    assert by_block(plan, table) == pytest.approx([0.7] * 3)


@pytest.mark.parametrize("options", [{"tau": 1.0}, {"tau": -0.1}])
def test_alphapruning_refuses_bad_hyper_parameters(options):
    with pytest.raises(UsageError):
        AlphaPruning(**options)
