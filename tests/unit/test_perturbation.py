import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import ellipe
from torch import nn

from sparsify.allocators.absorption import AbsorptionCorrected
from sparsify.allocators.arithmetic import Arithmetic
from sparsify.allocators.base import allocate
from sparsify.allocators.budget import weighted_mean
from sparsify.allocators.context import Context
from sparsify.allocators.owl import OWL
from sparsify.allocators.spectral import AlphaPruning
from sparsify.analysis.absorption import Reading, absorption
from sparsify.analysis.drift import Drift, drift
from sparsify.analysis.perturbation import Noise, PrunedBlock, branch, normal, plus
from sparsify.data.inputs import as_inputs
from sparsify.errors import NumericsError, UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.statistics import reading
from sparsify.runs import registry

SITES = ("output", "input", "attention", "mlp", "weights")


class ToyBlock(nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.linear = nn.Linear(*matrix.shape, bias=False)
        self.linear.weight.data = matrix

    def forward(self, hidden_states, **_):
        return hidden_states + self.linear(hidden_states)


class Toy(nn.Module):
    """Residual blocks on a stream that starts as the first unit vector for every token."""

    _no_split_modules = ("ToyBlock",)

    def __init__(self, *matrices):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.eye(len(matrices[0]))[:1])
        self.layers = nn.ModuleList(ToyBlock(m) for m in matrices)

    @property
    def base_model(self):
        return self

    def forward(self, input_ids, use_cache=False):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def hooks(view):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in view.model.modules())


@pytest.fixture
def toy():
    """The second block doubles the stream and leaves the other direction alone."""
    return BlockView(Toy(torch.zeros(2, 2), torch.diag(torch.tensor([1.0, 0.0]))))


def test_a_toys_coefficient_is_the_one_by_hand(toy):
    found = drift(toy, torch.zeros(100, 100, dtype=torch.long), Noise(1e-3), seeds=2)
    # h = (1, 0) becomes (2, 0); noise eta (cos, sin) becomes eta (2 cos, sin): relative to the stream, the mean over
    # the circle of sqrt(cos^2 + sin^2 / 4) is a complete elliptic integral.
    r = 2 / math.pi * ellipe(0.75)
    measured = absorption(found)
    assert measured.r.tolist() == pytest.approx([r, 1.0], rel=3e-3)
    assert measured.pass_through.tolist() == pytest.approx([0.5, 1.0])
    assert measured.excess.tolist() == pytest.approx([2 * r, 1.0], rel=3e-3)
    u = math.log(r)
    assert measured.D.tolist() == pytest.approx([-u / 2, u / 2], abs=3e-3)
    assert found.relative[0, 0].flatten().tolist() == pytest.approx([1e-3] * 200, rel=1e-3)
    assert torch.isnan(found.relative[1, 0]).all()


def test_the_pass_through_of_a_stream_that_grows_and_nothing_else():
    view = BlockView(Toy(*[torch.eye(3)] * 4))  # every block doubles whatever it gets
    measured = absorption(drift(view, torch.zeros(2, 5, dtype=torch.long), Noise(1e-2)))
    assert measured.r.tolist() == pytest.approx([1.0] * 4, rel=1e-4)
    assert measured.pass_through.tolist() == pytest.approx([1 / 8, 1 / 4, 1 / 2, 1])


@pytest.mark.parametrize("site", SITES)
def test_a_drift_is_that_of_two_whole_forwards(make_model, tokens, site):
    """Follow one disturbance by hand: the model run with the block's output replaced."""
    view = BlockView(make_model(num_hidden_layers=3))
    noise, kept, block = Noise(0.05, site), {}, view.blocks[1]
    found = drift(view, tokens, noise, blocks=(1,))
    spied = noise.disturbed

    class Spy(Noise):
        def disturbed(self, *arguments):
            kept["out"] = spied(*arguments)
            return kept["out"]

    drift(view, tokens, Spy(0.05, site), blocks=(1,))
    clean = view.model.model(tokens, output_hidden_states=True).hidden_states
    handle = block.register_forward_hook(lambda *_: kept["out"])
    states = []
    last = view.blocks[2].register_forward_hook(lambda _m, _a, out: states.append(out))
    view.model.model(tokens)
    handle.remove()
    last.remove()
    before_norm = []
    spy = view.blocks[2].register_forward_hook(lambda _m, _a, out: before_norm.append(out))
    view.model.model(tokens)
    spy.remove()
    for k, (state, true) in {1: (kept["out"], clean[2]), 2: (states[0], before_norm[0])}.items():
        expected = (state - true).double().norm(dim=-1) / true.double().norm(dim=-1)
        torch.testing.assert_close(found.relative[0, k, 0], expected.mean(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("source", [*(Noise(0.01, site) for site in SITES), "pruned"])
def test_the_model_is_left_alone_even_by_an_exception(make_model, tokens, source, monkeypatch):
    view = BlockView(make_model())
    dense = view.snapshot()
    source = PrunedBlock(registry.build("pruner", "wanda"), 0.5) if source == "pruned" else source
    drift(view, tokens, source)
    for place in ("drift._inner", "perturbation.plus" if isinstance(source, Noise) else "drift._turn"):
        with monkeypatch.context() as patch:
            patch.setattr(f"sparsify.analysis.{place}", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                drift(view, tokens, source)
    assert hooks(view) == 0
    assert all(torch.equal(dense[x.spec.name], x.weight) for x in view.layers)
    assert not any("forward" in vars(block) for block in view.blocks)


def test_a_pruned_block_drifts_as_far_as_its_sparsity(make_model, tokens):
    view = BlockView(make_model())
    wanda = registry.build("pruner", "wanda")
    sizes = [float(drift(view, tokens, PrunedBlock(wanda, s)).relative[0, 0].mean()) for s in (0.1, 0.5, 0.9)]
    assert sizes == sorted(sizes)
    assert sizes[0] > 0


def test_noise_has_exactly_the_size_asked_for():
    x = torch.randn(4, 7, 16) * torch.rand(4, 7, 1) * 100
    e = plus(x, normal(x, torch.Generator().manual_seed(0)), 0.3) - x
    torch.testing.assert_close(e.norm(dim=-1), 0.3 * x.norm(dim=-1))


@pytest.mark.parametrize("site", SITES)
def test_the_same_seed_gives_the_same_drift_whatever_the_batches_and_blocks(make_model, tokens, site):
    # Where batch x seqlen x dim is a multiple of 16, torch draws the same numbers in one go and in several.
    view, tokens = BlockView(make_model(hidden_size=12, num_attention_heads=1, num_key_value_heads=1)), tokens[:6, :11]
    whole = drift(view, tokens, Noise(0.1, site), seeds=2, batch_size=6)
    for size in (1, 2, 5):
        again = drift(view, tokens, Noise(0.1, site), seeds=2, batch_size=size)
        torch.testing.assert_close(again.relative, whole.relative, equal_nan=True)
    part = drift(view, tokens, Noise(0.1, site), seeds=2, blocks=(1,))
    torch.testing.assert_close(part.relative[0], whole.relative[1], equal_nan=True)
    assert not torch.equal(whole.relative[0, 1, 0], whole.relative[0, 1, 1])


def test_noise_below_the_resolution_is_refused(make_model, tokens):
    view = BlockView(make_model())
    with pytest.raises(UsageError, match=r"rounding of float32.*eta >= 4\.8e-07.*larger eta"):
        drift(view, tokens, Noise(1e-7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_is_followed_in_single_precision(make_model, tokens, dtype):
    half = BlockView(make_model().to(dtype))
    same = BlockView(make_model().to(dtype).float())
    before = {name: tensor.data_ptr() for name, tensor in half.model.state_dict().items()}
    found, expected = (drift(view, tokens, Noise(1e-4)) for view in (half, same))
    torch.testing.assert_close(found.relative, expected.relative, rtol=0.02, atol=0, equal_nan=True)
    assert all(tensor.data_ptr() == before[name] for name, tensor in half.model.state_dict().items())
    assert {tensor.dtype for tensor in half.model.parameters()} == {dtype}


@pytest.mark.parametrize("site", SITES[:4])
def test_spared_tokens_are_left_alone(make_model, tokens, site):
    view = BlockView(make_model())
    all_but_last = drift(view, tokens, Noise(0.1, site, spared=11))
    assert torch.all(all_but_last.relative[0, 0] > 0)
    assert torch.all((all_but_last.start[0] > 0).nonzero()[:, -1] >= 11)
    with pytest.raises(UsageError, match=r"Every token is spared.*Got: spared=12.*spared < 12"):
        drift(view, tokens, Noise(0.1, site, spared=12))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Noise, {"eta": 0.0}),
        (Noise, {"eta": math.inf}),
        (Noise, {"spared": -1}),
        (Noise, {"site": "weights", "spared": 1}),
        (Reading, {"clip": 0.0}),
        (Reading, {"clip": math.inf}),
        (PrunedBlock, {"sparsity": 1.5}),
    ],
)
def test_settings_out_of_range_are_refused(kind, options):
    with pytest.raises(UsageError):
        kind(**options)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (Noise, {"eta": "big"}, "a number above 0"),
        (Noise, {"spared": 1.5}, "whole number"),
        (Noise, {"site": "head"}, "Unknown site"),
        (Reading, {"norm": "tokn"}, "token, frobenius"),
        (Reading, {"average": "mean"}, "geometric, token_ratios"),
        (Reading, {"clip": "big"}, "a number above 0"),
        (PrunedBlock, {"pruner": "wanda"}, "pruner@allocator.source.pruner=wanda"),
        (PrunedBlock, {"sparsity": "much"}, "0 < sparsity < 1"),
        (AbsorptionCorrected, {"inner": "owl"}, "allocator@allocator.inner=<name>"),
        (AbsorptionCorrected, {"source": None}, "perturbation@allocator.source=<name>"),
        (AbsorptionCorrected, {"reading": None}, "allocator.reading.average=<name>"),
        (AbsorptionCorrected, {"seeds": 1.5}, "seeds is a whole number"),
        (AbsorptionCorrected, {"windows": "two"}, ">= 1, or null"),
        (AbsorptionCorrected, {"grid": 0.2}, "list of strengths"),
        (AbsorptionCorrected, {"grid": [0.2, "x"]}, "list of strengths"),
        (AbsorptionCorrected, {"control": "none at all"}, "permuted, ramp, first"),
    ],
)
def test_what_its_type_forbids_is_said_where_types_are_not_checked(kind, options, said):
    given = SimpleNamespace(**{**vars(kind()), **options})  # the tests check types, and would refuse these first
    with pytest.raises(UsageError, match=said):
        kind.__post_init__(given)


def test_unknown_blocks_and_branches_are_refused(toy):
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(UsageError, match="No such block"):
        drift(toy, tokens, Noise(0.1), blocks=(2,))
    with pytest.raises(UsageError, match="attention branch"):
        branch(toy.blocks[0], "attention")
    with pytest.raises(UsageError, match="every block"):
        absorption(drift(toy, tokens, Noise(0.1), blocks=(0,)))


def made(relative, norm=None):
    """A drift of one token per window, whose states are of length one unless said otherwise."""
    measure = torch.as_tensor(relative, dtype=torch.float64)
    each = torch.arange(len(measure))
    norm = torch.ones(len(measure), measure.shape[-1], 1).double() if norm is None else norm
    start = measure[each, each][..., None] * norm[:, None]
    return Drift(measure, measure, measure, start, measure[:, -1][..., None] * norm[-1], norm, tuple(each.tolist()))


def test_readings_differ_where_the_paper_is_open():
    nan = math.nan
    found = made([[[[1.0, 2.0]], [[2.0, 2.0]]], [[[nan, nan]], [[1.0, 4.0]]]])  # R_0: 1, 2; R_L: 2, 2
    assert absorption(found).r.tolist() == pytest.approx([1.5, 1.0])
    assert absorption(found, Reading("ratio_of_means")).r.tolist() == pytest.approx([4 / 3, 1.0])
    assert absorption(found, Reading("geometric")).r.tolist() == pytest.approx([math.sqrt(2), 1.0])
    assert absorption(found, Reading("token_ratios")).r.tolist() == pytest.approx([1.5, 1.0])
    u = math.log(1.5)
    assert absorption(found, Reading(last=False)).D.tolist() == pytest.approx([0.0, u])
    assert absorption(found, Reading(clip=0.1)).u.tolist() == pytest.approx([0.1, 0.0])
    deep = torch.full((3, 3, 1, 1), 4.0).double()
    deep[[0, 1, 2], [0, 1, 2]] = 1.0
    three = made(deep, torch.tensor([1.0, 2.0, 4.0]).double()[:, None, None])
    rooted = absorption(three, Reading(per_depth=True))
    assert rooted.r.tolist() == pytest.approx([2.0, 4.0, 1.0])
    assert rooted.pass_through.tolist() == pytest.approx([0.5, 0.5, 1.0])
    assert np.isclose(float(absorption(three).D.sum()), 0.0)


@pytest.mark.parametrize("eta", [1e-5, 1e-2, 1.0])
def test_the_angle_of_a_small_disturbance_is_not_lost_in_rounding(make_model, tokens, eta):
    found = drift(BlockView(make_model()), tokens, Noise(eta), blocks=(0,), seeds=20)
    turned = float((1 - found.cosine[0, 0]).mean())
    # Noise has no preferred direction: 1 - cos is eta^2 / 2 while that is small, and of the order of one beside it.
    assert turned == pytest.approx(eta**2 / 2, rel=0.1 if eta < 0.1 else 0.6)


@pytest.mark.parametrize(
    ("reading", "r"),
    [(Reading(), 1 / 5), (Reading(norm="frobenius"), 2 / math.sqrt(39)), (Reading("token_ratios"), 1 / 5)],
)
def test_what_is_only_handed_on_is_all_of_the_pass_through(reading, r):
    """One of four tokens is disturbed; the second block makes the tokens 1, 2, 3 and 5 long around the same error."""
    norm = torch.tensor([[[1.0, 1, 1, 1]], [[1.0, 2, 3, 5]]]).double()
    e = torch.tensor([0.0, 0, 0, 0.1]).double()
    relative, whole = torch.full((2, 2, 2, 1, 1), math.nan).double()
    for k in (0, 1):
        relative[: k + 1, k] = (e / norm[k]).mean()
        whole[: k + 1, k] = e.norm() / norm[k].norm()
    tokens = e.expand(2, 1, 1, 4)
    read = absorption(Drift(relative, whole, relative, tokens, tokens, norm, (0, 1)), reading)
    assert read.r.tolist() == pytest.approx([r, 1.0])
    assert read.pass_through.tolist() == pytest.approx([r, 1.0])


def test_the_standard_error_is_that_of_the_windows_mean():
    """Two draws of a window are not two windows."""
    ends = torch.tensor([1.0, 2.0, 4.0, 5.0]).double()
    measure = torch.ones(2, 2, 2, 4).double()
    measure[0, 1] = ends
    found = absorption(made(measure))
    assert found.stderr.tolist() == pytest.approx([float(ends.std()) / 2, 0.0])
    alone = absorption(made([[[[1.0]], [[2.0]]], [[[math.nan]], [[1.0]]]]))
    assert math.isnan(float(alone.stderr[0]))


def test_what_is_not_finite_or_moves_nothing_is_said(toy):
    class Broken(Noise):
        def disturbed(self, walk, block, run, clean, draw):
            return clean * math.nan if block else clean + 1

    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(NumericsError, match="block 2 of 2"):
        drift(toy, tokens, Broken(0.1))

    class Idle(Noise):
        def disturbed(self, walk, block, run, clean, draw):
            return clean

    with pytest.raises(NumericsError, match="moved nothing"):
        absorption(drift(toy, tokens, Idle(0.1)))


def context_of(view, tokens, losses=None, **options):
    """A context whose objective is a table of losses by the first block's sparsity, in the order asked."""
    asked = []

    def score(plan):
        asked.append(plan)
        return losses[len(asked) - 1]

    return Context(view, as_inputs(tokens), as_inputs(tokens), try_plan=score, **options), asked


@pytest.fixture
def view(make_model):
    return BlockView(make_model(num_hidden_layers=4))


def spent(plan, view):
    return weighted_mean([plan.targets[x.name].sparsity for x in view.table], [x.numel for x in view.table])


def by_block(plan, view):
    return np.array([plan.targets[view.layers_of(b)[0].spec.name].sparsity for b in range(len(view.blocks))])


@pytest.mark.parametrize("control", ["none", "flipped", "permuted", "ramp", "first"])
def test_the_correction_is_d_over_its_bound_and_keeps_the_budget(view, tokens, control):
    context, _ = context_of(view, tokens)
    allocator = AbsorptionCorrected(Arithmetic(0.02), 0.3, Noise(0.1), windows=3, control=control)
    plan = allocate(allocator, view.table, 0.5, context)
    assert spent(plan, view) == pytest.approx(0.5)
    base = by_block(allocate(Arithmetic(0.02), view.table, 0.5, context), view)
    moved = by_block(plan, view) - base
    d = absorption(drift(view, tokens[:3], Noise(0.1))).D.numpy() / (2 * math.log(3))
    expected = {
        "first": d * [1, 0, 0, 0],
        "none": d,
        "flipped": -d,
        "ramp": np.linspace(-1, 1, 4) * np.sqrt((d**2).mean() / (5 / 9)),
    }
    shift = np.array(plan.notes["correction"])
    if control == "permuted":
        assert sorted(shift) == pytest.approx(sorted(d))
    else:
        assert shift == pytest.approx(expected[control])
    assert moved - moved.mean() == pytest.approx(0.3 * (shift - shift.mean()))


@pytest.mark.parametrize("inner", [Arithmetic(0.02), AlphaPruning(tau=0.9, clip=False)])
def test_strength_zero_is_the_inner_allocation(view, tokens, inner):
    context, _ = context_of(view, tokens)
    base = allocate(inner, view.table, 0.7, context)
    plan = allocate(AbsorptionCorrected(inner, 0.0), view.table, 0.7, context)
    assert (plan.targets, plan.ledger) == (base.targets, base.ledger)


def test_what_the_inner_allocator_tried_and_noted_is_kept(view, tokens):
    context, _ = context_of(view, tokens, losses=[9.0, 7.0, 8.0, 9.0, 6.0, 5.0])
    inner = Arithmetic("auto", step=0.1)
    plan = allocate(AbsorptionCorrected(inner, grid=[0.0, 0.2]), view.table, 0.5, context)
    assert [set(trial) - {"heldout_perplexity"} for trial in plan.trials] == [{"beta"}] * 4 + [{"strength"}] * 2
    owl, context = OWL(), context_of(view, tokens)[0]
    noted = allocate(owl, view.table, 0.5, context).notes["outlier_percent"]
    assert allocate(AbsorptionCorrected(owl, 0.2), view.table, 0.5, context).notes["inner.outlier_percent"] == noted


def test_the_strength_is_chosen_on_heldout_text(view, tokens):
    context, asked = context_of(view, tokens, losses=[9.0, 7.0, 8.0])
    plan = allocate(AbsorptionCorrected(Arithmetic(0.0), grid=[0.0, 0.2, 0.4]), view.table, 0.5, context)
    assert (plan.notes["strength"], len(asked)) == (0.2, 3)
    assert [trial["heldout_perplexity"] for trial in plan.trials] == [9.0, 7.0, 8.0]
    assert plan.targets == asked[1].targets


def test_a_strength_that_breaks_the_model_is_not_chosen(view, tokens):
    context, _ = context_of(view, tokens, losses=[math.nan, 8.0])
    plan = allocate(AbsorptionCorrected(Arithmetic(0.0), grid=[0.0, 0.2]), view.table, 0.5, context)
    assert plan.notes["strength"] == 0.2
    assert [trial["heldout_perplexity"] for trial in plan.trials] == [None, 8.0]
    context, _ = context_of(view, tokens, losses=[math.nan, math.inf])
    with pytest.raises(NumericsError, match="No strength"):
        allocate(AbsorptionCorrected(Arithmetic(0.0), grid=[0.0, 0.2]), view.table, 0.5, context)


def test_the_budget_is_met_where_the_correction_meets_the_bounds(view, tokens):
    context, _ = context_of(view, tokens)
    plan = allocate(AbsorptionCorrected(Arithmetic(0.0), 8.0, Noise(0.1)), view.table, 0.8, context)
    assert spent(plan, view) == pytest.approx(0.8)
    assert {0.0, 0.99} & {round(x, 6) for x in by_block(plan, view)}


def test_answers_belong_to_a_text_of_a_shape_or_to_the_weights(view, tokens):
    memo = {}
    texts = (tokens[:4], tokens[:4].reshape(8, 6), tokens[:4])
    contexts = [Context(view, as_inputs(text), memo=memo) for text in texts]
    assert [context.once("of text", lambda i=i: i) for i, context in enumerate(contexts)] == [0, 1, 0]
    assert [context.once("of weights", lambda i=i: i, of_weights=True) for i, context in enumerate(contexts)] == [0] * 3


def test_a_pruned_block_takes_the_wanted_sparsity(view, tokens):
    context, _ = context_of(view, tokens)
    wanda = registry.build("pruner", "wanda")
    open_ended = allocate(AbsorptionCorrected(Arithmetic(0.0), 0.2, PrunedBlock(wanda)), view.table, 0.6, context)
    given = allocate(AbsorptionCorrected(Arithmetic(0.0), 0.2, PrunedBlock(wanda, 0.6)), view.table, 0.6, context)
    assert open_ended.sparsities() == given.sparsities()
    with pytest.raises(UsageError, match="some zeros"):
        drift(view, tokens, PrunedBlock(wanda))


BY_MORE = {
    name for name in registry.names("pruner") if reading(registry.build("pruner", name).needs, "gradient", "pair")
}


@pytest.mark.parametrize("pruner", sorted(set(registry.names("pruner")) - BY_MORE))
def test_any_pruner_of_inputs_disturbs(view, tokens, pruner):
    found = drift(view, tokens, PrunedBlock(registry.build("pruner", pruner), 0.7))
    assert (found.start > 0).any(-1).all()


@pytest.mark.parametrize("pruner", sorted(BY_MORE))
def test_a_block_alone_is_not_pruned_by_more_than_its_inputs(pruner):
    with pytest.raises(UsageError, match=r"source\.pruner=wanda"):
        PrunedBlock(registry.build("pruner", pruner), 0.7)


@pytest.mark.parametrize("options", [{"strength": -0.1}, {"grid": []}, {"grid": [-1.0]}, {"seeds": 0}, {"windows": 0}])
def test_a_correction_out_of_range_is_refused(options):
    with pytest.raises(UsageError):
        AbsorptionCorrected(**options)
