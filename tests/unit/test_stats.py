import pytest
import torch

from sparsify.errors import UsageError
from sparsify.model.statistics import GRAM, NORM, Accumulator, LayerStats

BOTH = frozenset({NORM, GRAM})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_add_up_to_means_over_windows(dtype):
    windows = torch.randn(5, 7, 6).to(dtype)
    accumulator = Accumulator(BOTH)
    for batch in windows.split(2):
        accumulator.fold(batch, len(batch))
    stats = accumulator.finalise(len(windows))
    exact = windows.double()
    square = sum(window.square().sum(dim=0) for window in exact) / 5
    gram = sum(2 * window.T @ window for window in exact) / 5
    assert stats.square.dtype == stats.gram.dtype == torch.float32
    torch.testing.assert_close(stats.square.double(), square, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.gram.double(), gram, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.norm, square.sqrt().float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_leaves_the_activations_alone(dtype):
    x = torch.randn(3, 4, 5).to(dtype)
    before = x.clone()
    accumulator = Accumulator(BOTH)
    accumulator.fold(x, len(x))
    accumulator.fold(x, len(x))
    assert torch.equal(x, before)


def test_sums_of_half_precision_do_not_overflow():
    accumulator = Accumulator(BOTH)
    accumulator.fold(torch.full((1, 4, 2), 60000.0, dtype=torch.float16), 1)
    stats = accumulator.finalise(1)
    assert stats.square.tolist() == [1.44e10] * 2
    assert torch.isfinite(stats.gram).all()


def test_only_what_is_needed_is_collected():
    accumulator = Accumulator(frozenset({GRAM}))
    accumulator.fold(torch.ones(1, 2, 3), 1)
    stats = accumulator.finalise(1)
    assert NORM not in stats
    with pytest.raises(UsageError, match="needs"):
        _ = stats.norm


def test_tokens_may_come_without_a_window_axis():
    flat, windows = Accumulator(BOTH), Accumulator(BOTH)
    x = torch.randn(3, 4, 5)
    flat.fold(x.flatten(0, 1), 3)
    windows.fold(x, 3)
    torch.testing.assert_close(flat.finalise(3).square, windows.finalise(3).square)
    torch.testing.assert_close(flat.finalise(3).gram, windows.finalise(3).gram)


def test_the_squared_norm_is_the_released_running_mean_to_the_last_bit():
    windows = torch.randn(4, 30, 6)
    accumulator, released = Accumulator(frozenset({NORM})), torch.zeros(6)
    for n, window in enumerate(windows):
        accumulator.fold(window[None], 1)
        released *= n / (n + 1)  # WrappedGPT.add_batch
        released += torch.norm(window.T, p=2, dim=1) ** 2 * torch.tensor(1 / (n + 1))
    assert torch.equal(accumulator.finalise(4).square, released)


def test_a_derived_quantity_is_made_once():
    stats, calls = LayerStats(1), []
    made = [stats.once("key", lambda: calls.append(1) or "value") for _ in range(3)]
    assert made == ["value"] * 3
    assert len(calls) == 1
