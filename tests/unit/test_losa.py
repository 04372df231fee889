import json
import math

import pytest
import torch

import sparsify
from sparsify.allocators.equimarginal import Equimarginal
from sparsify.allocators.similarity import Similarity
from sparsify.allocators.uniform import Uniform
from sparsify.analysis.reconstruction import reconstruction_losses
from sparsify.data.inputs import TokenInputs, as_inputs
from sparsify.errors import NumericsError, UsageError
from sparsify.methods.checkpoint import Checkpoint
from sparsify.methods.losa import LoSA
from sparsify.methods.oneshot import OneShot
from sparsify.methods.tuning import FullFineTuning, LoRA, MaskedLoRA
from sparsify.model.blocks import BlockView
from sparsify.pruners.magnitude import Magnitude
from sparsify.pruners.sparsegpt import SparseGPT
from sparsify.pruners.wanda import Wanda
from sparsify.recipe import Recipe, prune_model
from sparsify.recovery.ranks import step_samples
from sparsify.recovery.schedule import Schedule
from sparsify.recovery.training import Trainer
from sparsify.types import Pattern

QUICK = Schedule(rate=1e-2, batch=2, dropout=0.0, clip=1.0, warmup=0.0)


@pytest.fixture
def text():
    return torch.randint(0, 96, (8, 12), generator=torch.Generator().manual_seed(2))


def run(make_model, tokens, method, *, pruner=None, allocator=None, pattern="unstructured", sparsity=0.7, **options):
    view = BlockView(make_model(num_hidden_layers=3))
    recipe = Recipe.of(
        pruner or Wanda(), allocator or Uniform(), method, pattern, sparsity, stages=options.pop("stages", None)
    )
    return view, prune_model(view, as_inputs(tokens), recipe, heldout=as_inputs(tokens), **options)


def weights(view):
    return {layer.spec.name: layer.weight.clone() for layer in view.layers}


@pytest.mark.parametrize(
    ("pruner", "allocator"),
    [(Wanda(), Uniform()), (SparseGPT(), Similarity(windows=None)), (Magnitude(), Uniform())],
    ids=lambda part: type(part).__name__,
)
def test_the_final_sparsity_is_exactly_what_was_asked_for(make_model, tokens, text, pruner, allocator):
    view, result = run(
        make_model, tokens, LoSA(training=text, schedule=QUICK, steps=2), pruner=pruner, allocator=allocator
    )
    _, expected = run(make_model, tokens, OneShot(), pruner=pruner, allocator=Uniform())
    counted = sum(int((layer.weight == 0).sum()) for layer in view.layers)
    assert counted == sum(row.zeros for row in result.layers)
    assert result.sparsity == pytest.approx(expected.sparsity, abs=2e-2 if allocator != Uniform() else 1e-12)
    result.masks.check(view)
    assert {name for name, _ in view.model.named_parameters()} == {
        name for name, _ in make_model(num_hidden_layers=3).named_parameters()
    }
    json.dumps(result.notes, allow_nan=False)


def test_notes_have_a_row_for_every_step(make_model, tokens, text):
    named = TokenInputs(text, "train", {"source": "letters"})
    _, result = run(make_model, tokens, LoSA(training=named, schedule=QUICK, steps=3, high=12))
    notes = result.notes
    cubic = [0.7 - 0.7 * (1 - t / 3) ** 3 for t in (1, 2, 3)]
    assert notes["step_sparsity"] == pytest.approx(cubic, abs=0.03)
    assert [sum(ranks) for ranks in notes["step_ranks"]] == [3 * 6, 3 * 7, 3 * 8]
    assert len(notes["loss"]) == sum(QUICK.steps(len(step_samples(t, 3, 8))) for t in (1, 2, 3))
    assert notes["training_tokens"] == 8 * 12
    assert notes["training_text"] == {"source": "letters"}


def test_training_helps(make_model, tokens):
    """On the calibration text itself, which a tiny model can learn."""
    schedule = Schedule(rate=2e-2, batch=4, dropout=0.0, clip=1.0, warmup=0.0, epochs=12)
    many = tokens.repeat(4, 1)
    scores = []
    for method in (OneShot(), LoSA(training=many, schedule=schedule, steps=2)):
        view, _ = run(make_model, tokens, method)
        scores.append(sparsify.perplexity(view.model, tokens))
    assert scores[1] < 0.7 * scores[0]


def test_a_killed_run_goes_on_to_the_same_weights(make_model, tokens, text, tmp_path, monkeypatch):
    for schedule in (QUICK, Schedule(rate=1e-2, batch=2, dropout=0.1, restart=False, shape="cosine")):
        method = LoSA(training=text, schedule=schedule, steps=3)
        whole, expected = run(make_model, tokens, method, pruner=SparseGPT())
        saves, save = [], Checkpoint.save

        def dying(self, state, saves=saves, save=save):
            save(self, state)
            if self.file is not None and self.file.name == "checkpoint.pt":
                saves.append(1)
                if len(saves) == 2:
                    raise KeyboardInterrupt

        folder = tmp_path / schedule.shape
        with monkeypatch.context() as patched:
            patched.setattr(Checkpoint, "save", dying)
            with pytest.raises(KeyboardInterrupt):
                run(make_model, tokens, method, pruner=SparseGPT(), checkpoint=Checkpoint(folder))
        resumed, result = run(make_model, tokens, method, pruner=SparseGPT(), checkpoint=Checkpoint(folder))
        for name, weight in weights(whole).items():
            assert torch.equal(weights(resumed)[name], weight)
        assert result.notes["loss"] == expected.notes["loss"]
        assert result.plan == expected.plan


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(make_model, tokens, text, tmp_path, monkeypatch):
    """The third step of the method fails in its second step of the optimiser, and goes on from the second's end."""
    method = LoSA(training=text, schedule=QUICK, steps=3)
    whole, expected = run(make_model, tokens, method)
    backward, calls = Trainer._backward, []

    def spoilt(self, *arguments):
        calls.append(1)
        lowered = backward(self, *arguments)
        return math.nan if len(calls) == 4 else lowered

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_backward", spoilt)
        said = r"not finite.*nan at step 2 of 3, learning rate 0\.00666667, in step 3 of 3 of the method"
        with pytest.raises(NumericsError, match=said):
            run(make_model, tokens, method, checkpoint=Checkpoint(tmp_path))
    assert json.loads(Checkpoint(tmp_path).load()["done"])[0] == 2
    resumed, result = run(make_model, tokens, method, checkpoint=Checkpoint(tmp_path))
    assert all(torch.equal(weights(resumed)[name], weight) for name, weight in weights(whole).items())
    assert result.notes["loss"] == expected.notes["loss"]


def test_a_checkpoint_of_something_else_is_not_gone_on_with(make_model, tokens, text, tmp_path):
    first = LoSA(training=text, schedule=QUICK, steps=2)
    run(make_model, tokens, first, checkpoint=Checkpoint(tmp_path))
    other = LoSA(training=text, schedule=QUICK, steps=2, scale=1.0)
    _, fresh = run(make_model, tokens, other)
    _, after = run(make_model, tokens, other, checkpoint=Checkpoint(tmp_path))
    assert after.notes["loss"] == fresh.notes["loss"]


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", None), ("mixed:8", 0.5)])
def test_patterns_hold_at_the_end(make_model, tokens, text, pattern, sparsity):
    view, result = run(
        make_model, tokens, LoSA(training=text, schedule=QUICK, steps=2), pattern=pattern, sparsity=sparsity
    )
    group = Pattern.parse(pattern).group
    for layer in view.layers:
        kept = result.plan.targets[layer.spec.name].kept
        counts = (layer.weight != 0).reshape(layer.weight.shape[0], -1, group).sum(dim=2)
        assert (counts <= kept).all()


def test_allocation_once_is_scaled_down_for_the_steps_before(make_model, tokens, text):
    class Asked(Uniform):
        calls = []

        def profile(self, layers, sparsity, context):
            Asked.calls.append(sparsity)
            return Similarity(windows=None, d=0.1).profile(layers, sparsity, context)

    _, result = run(
        make_model, tokens, LoSA(training=text, schedule=QUICK, steps=3, allocate="first"), allocator=Asked()
    )
    assert Asked.calls == [0.7]
    first, last = result.notes["step_block_sparsity"][0], result.notes["step_block_sparsity"][-1]
    assert [a / b for a, b in zip(first, last, strict=True)] == pytest.approx(
        [result.notes["step_sparsity"][0] / 0.7] * 3, abs=0.06
    )


@pytest.mark.parametrize("allocate", ["every", "first"])
def test_allocators_that_prune_in_trials_leave_the_adapters_alone(make_model, tokens, text, allocate):
    method = LoSA(training=text, schedule=QUICK, steps=2, allocate=allocate)
    allocator = Equimarginal(steps=4, windows=None, batch=4, settle_every=2)
    _, result = run(make_model, tokens, method, allocator=allocator)
    assert result.sparsity == pytest.approx(0.7, abs=0.02)
    assert len(result.notes["loss"]) == 4  # two batches in each step


def test_the_release_keeps_zeros_and_stores_eight_components(make_model, tokens, text):
    method = LoSA(training=text, schedule=QUICK, steps=3, first_rank=8, released=True)
    _, result = run(make_model, tokens, method, allocator=Similarity(windows=None, d=0.2))
    assert method.stored == 8
    assert max(max(ranks) for ranks in result.notes["step_ranks"]) <= 8
    assert result.sparsity >= 0.7 - 1e-9


def test_reconstruction_losses_by_hand(make_model, tokens):
    view = BlockView(make_model())
    dense = view.snapshot()

    def outputs():
        seen = []
        hooks = [
            b.register_forward_hook(lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o))
            for b in view.blocks
        ]
        with torch.no_grad():
            view.model(tokens)
        for hook in hooks:
            hook.remove()
        return seen

    true = outputs()
    for layer in view.layers:
        layer.write(layer.weight * (torch.rand_like(layer.weight) > 0.5))
    found = reconstruction_losses(view, dense, tokens, batch_size=2)
    for loss, y, z in zip(found, true, outputs(), strict=True):
        error = (y - z).square().sum(dim=(0, 1)) / y.square().sum(dim=(0, 1))
        assert loss == pytest.approx(float(error.mean()), rel=1e-4)


def test_masked_lora_keeps_zeros_and_lora_does_not(make_model, tokens, text):
    for stage, sparse in (
        (MaskedLoRA(training=text, schedule=QUICK), True),
        (LoRA(training=text, schedule=QUICK), False),
    ):
        _, result = run(make_model, tokens, OneShot(), stages={"recovery": stage})
        assert result.notes["recovery.sparsity_before"] == pytest.approx(0.7, abs=0.03)
        assert (result.sparsity == result.notes["recovery.sparsity_before"]) is sparse
        assert result.sparsity > 0.6 if sparse else result.sparsity < 0.05
        assert result.notes["recovery.loss"][-1] < result.notes["recovery.loss"][0] + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_survivors_are_trained_and_nothing_else(make_model, tokens, text, dtype):
    view = BlockView(make_model().to(dtype))
    norms = {n: p.clone() for n, p in view.model.named_parameters() if "norm" in n or "embed" in n}
    places = {n: p.data_ptr() for n, p in view.model.named_parameters()}
    recipe = Recipe.of(
        Wanda(),
        Uniform(),
        OneShot(),
        "unstructured",
        0.5,
        stages={"recovery": FullFineTuning(training=text, schedule=QUICK)},
    )
    result = prune_model(view, as_inputs(tokens), recipe)
    assert result.sparsity == pytest.approx(0.5, abs=0.02)
    plain = BlockView(make_model().to(dtype))
    prune_model(plain, as_inputs(tokens), Recipe.of(Wanda(), Uniform(), OneShot(), "unstructured", 0.5))
    assert all(not torch.equal(a.weight, b.weight) for a, b in zip(view.layers, plain.layers, strict=True))
    assert all(torch.equal(p, norms[n]) for n, p in view.model.named_parameters() if n in norms)
    assert {n: p.data_ptr() for n, p in view.model.named_parameters()} == places


def test_without_text_the_model_is_not_touched(make_model, tokens):
    for stages, method in (({}, LoSA()), ({"recovery": MaskedLoRA()}, OneShot())):
        view = BlockView(make_model())
        before = weights(view)
        recipe = Recipe.of(Wanda(), Uniform(), method, "unstructured", 0.5, stages=stages)
        with pytest.raises(UsageError, match="text to train on"):
            prune_model(view, as_inputs(tokens), recipe)
        assert all(torch.equal(before[name], weight) for name, weight in weights(view).items())


@pytest.mark.parametrize(
    ("t", "T", "n", "released", "expected"),
    [
        (1, 5, 10_000, True, range(1000, 2000)),
        (4, 5, 10_000, True, range(4000, 5000)),
        (5, 5, 10_000, True, range(4000, 10_000)),
        (1, 5, 10_000, False, range(0, 1000)),
        (5, 5, 10_000, False, range(4000, 10_000)),
        (1, 1, 7, False, range(0, 7)),
    ],
)
def test_samples_of_a_step(t, T, n, released, expected):
    assert step_samples(t, T, n, released=released) == expected


def test_too_few_samples_are_refused(make_model, tokens, text):
    with pytest.raises(UsageError, match="samples of its own"):
        run(make_model, tokens, LoSA(training=text[:5], schedule=QUICK, steps=3))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"first_rank": 20}, {"low": 9}, {"scale": 0.0}, {"growth": 5}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        LoSA(**wrong)


def test_the_library_call_trains(make_model, tokens, text):
    model = make_model()
    method = ("losa", {"steps": 2, "schedule": {"batch": 2}})
    result = sparsify.prune(model, tokens, sparsity=0.5, method=method, training=text)
    assert result.sparsity == pytest.approx(0.5, abs=0.02)
    assert not any("lowrank" in name for name, _ in model.named_parameters())
    tuned = sparsify.prune(make_model(), tokens, sparsity=0.5, recovery="masked_lora", training=text)
    assert tuned.sparsity == pytest.approx(0.5, abs=0.02)
