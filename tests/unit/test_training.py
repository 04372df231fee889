import math

import pytest
import torch
from torch.nn import functional as F

from sparsify.data.examples import Examples, as_examples
from sparsify.data.inputs import as_inputs
from sparsify.errors import NumericsError, UsageError
from sparsify.methods.tuning import _in_single
from sparsify.model.blocks import BlockView
from sparsify.recovery.adapters import Adapters
from sparsify.recovery.loss import TrainingLoss
from sparsify.recovery.passes import padded
from sparsify.recovery.schedule import Schedule
from sparsify.recovery.teacher import dense_copy
from sparsify.recovery.training import Trainer

QUICK = {"rate": 1e-2, "batch": 2, "dropout": 0.0, "clip": 10.0, "warmup": 0.0}


@pytest.fixture
def view(make_model):
    view = BlockView(make_model())
    for layer in view.layers:
        layer.write(layer.weight * (torch.rand_like(layer.weight) > 0.5))
    return view


@pytest.fixture
def text(tokens):
    return as_examples(as_inputs(tokens))


def test_the_rate_rises_and_falls_as_transformers_has_it():
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for shape, make in {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}.items():
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs, ours = make(optimiser, math.ceil(0.3 * 17), 17), Schedule(shape=shape, warmup=0.3)
        for step in range(17):
            assert ours.factor(step, 17) == pytest.approx(theirs.get_last_lr()[0])
            optimiser.step()
            theirs.step()


@pytest.mark.parametrize(
    "wrong", [{"rate": 0.0}, {"warmup": 1.5}, {"dropout": 1.0}, {"distill": -0.1}, {"clip": 0.0}, {"epochs": 0}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        Schedule(**wrong)


def by_hand(model, parameters, text, schedule):
    """The same training in plain loops: one batch after the other, loss over all tokens of the batch."""
    optimiser = torch.optim.AdamW(parameters, lr=schedule.rate, weight_decay=schedule.decay)
    generator = torch.Generator().manual_seed(0)
    order, losses = torch.randperm(len(text), generator=generator).tolist(), []
    total = math.ceil(len(order) / schedule.batch)
    for step in range(total):
        chosen = order[step * schedule.batch : (step + 1) * schedule.batch]
        ids = torch.stack([text.ids[i] for i in chosen])
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimiser.param_groups[0]["lr"] = schedule.rate * (1 - step / total)
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def test_training_is_the_loop_that_everybody_writes(make_model, text):
    results = []
    for trained in (True, False):
        view, schedule = BlockView(make_model()), Schedule(**QUICK)
        with Adapters(view, 4, 4) as adapters:
            parameters = adapters.parameters()
            if trained:
                losses = Trainer(view, parameters, schedule, schedule.steps(len(text))).run(text, 0)
            else:
                losses = by_hand(view.model, parameters, text, schedule)
            results.append((losses, [parameter.detach().clone() for parameter in parameters]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_size_of_a_forward_changes_nothing(view, text):
    runs = []
    for micro in (None, 1, 2):
        schedule = Schedule(**QUICK, micro=micro)
        with Adapters(view, 4, 4) as adapters:
            runs.append(Trainer(view, adapters.parameters(), schedule, 3).run(text, 0))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert runs[0] == pytest.approx(runs[2], rel=1e-5)


def test_modes_are_what_they_were_and_losses_fall(view, text):
    schedule = Schedule(**QUICK | {"epochs": 8})
    with Adapters(view, 4, 4) as adapters:
        losses = Trainer(view, adapters.parameters(), schedule, schedule.steps(len(text))).run(text, 0)
    assert losses[-1] < losses[0]
    assert not any(module.training for module in view.model.modules())


def test_distillation_lowers_the_divergence_from_the_dense_model(make_model, text):
    view = BlockView(make_model())
    dense = view.snapshot()
    for layer in view.layers:
        layer.write(layer.weight * (torch.rand_like(layer.weight) > 0.5))
    pruned = {layer.spec.name: layer.weight.clone() for layer in view.layers}
    teacher = dense_copy(view, dense)
    assert all(torch.equal(layer.weight, pruned[layer.spec.name]) for layer in view.layers)
    schedule = Schedule(**QUICK | {"epochs": 6, "distill": 1.0})
    with Adapters(view, 4, 4) as adapters:
        losses = Trainer(view, adapters.parameters(), schedule, schedule.steps(len(text)), dense=teacher).run(text, 0)
    assert losses[-1] < losses[0]
    ids = torch.stack(text.ids)
    with torch.no_grad():
        assert torch.allclose(teacher(ids).logits, make_model()(ids).logits, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_training_and_says_where(view, text):
    with Adapters(view, 4, 4) as adapters:
        parameters = adapters.parameters()

        def spoil():
            parameters[0].data[0, 0] = math.nan

        trainer = Trainer(view, parameters, Schedule(**QUICK), 3, after=spoil)
        with pytest.raises(NumericsError, match=r"not finite.*nan at step 2 of 3, learning rate 0\.00666667"):
            trainer.run(text, 0)
        assert trainer.step == 1
        assert not any(parameter.isnan().any() for parameter in parameters[1:])


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_padding_and_logits_of_every_position_change_no_gradient(make_model, tokens, distill):
    """What a GPU replays: padded samples, and the loss of all positions with those that do not count dropped."""
    view, found = BlockView(make_model()), []
    text = Examples(tuple(row[: 5 + i] for i, row in enumerate(tokens[:3])), (1, 2, 1))
    teacher = dense_copy(view, {layer.spec.name: layer.weight * 2 for layer in view.layers})
    loss = TrainingLoss(view.model, teacher, distill)
    where = slice(0, 3)
    ids, counted = padded(text, 4, 16, view.device)
    plain = text.batch(where, view.device), text.counted(where, view.device)
    for batch, which, every in [(*plain, False), ({"input_ids": ids, "use_cache": False}, counted, True)]:
        value = loss(batch, which, every=every)
        view.model.zero_grad()
        value.backward()
        found.append([value.detach(), *(layer.stored.grad.clone() for layer in view.layers)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_in_half_precision_are_trained_on_what_they_are(make_model, tokens):
    """The products see every step: autocast would go on with the weights it cast first."""
    view = BlockView(make_model().bfloat16())
    text, schedule = as_examples(as_inputs(tokens[:2])), Schedule(**QUICK | {"epochs": 8})
    with _in_single(view) as parameters:
        losses = Trainer(view, parameters, schedule, 8).run(text, 0)
    assert losses[-1] < losses[0] - 0.1
    assert {parameter.dtype for parameter in view.model.parameters()} == {torch.bfloat16}
