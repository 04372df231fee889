import pytest
import torch

from sparsify.stats import Accumulator, LayerStats, gram_of

BOTH = frozenset({"norm", "gram"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_add_up_to_means_over_windows(dtype):
    windows = torch.randn(5, 7, 6).to(dtype)
    accumulator = Accumulator(BOTH)
    for batch in windows.split(2):
        accumulator.fold(batch)
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
    accumulator.fold(x)
    accumulator.fold(x)
    assert torch.equal(x, before)


def test_sums_of_half_precision_do_not_overflow():
    accumulator = Accumulator(frozenset({"norm", "gram"}))
    accumulator.fold(torch.full((1, 4, 2), 60000.0, dtype=torch.float16))
    stats = accumulator.finalise(1)
    assert stats.square.tolist() == [1.44e10] * 2
    assert torch.isfinite(stats.gram).all()


def test_only_what_is_needed_is_collected():
    accumulator = Accumulator(frozenset({"gram"}))
    accumulator.fold(torch.ones(1, 2, 3))
    stats = accumulator.finalise(1)
    assert stats.square is None
    with pytest.raises(LookupError):
        _ = stats.norm


def test_a_gram_matrix_sums_over_tokens():
    assert gram_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [[10.0, 14.0], [14.0, 20.0]]


def test_a_derived_quantity_is_made_once():
    stats, calls = LayerStats(1), []
    made = [stats.once("key", lambda: calls.append(1) or "value") for _ in range(3)]
    assert made == ["value"] * 3
    assert len(calls) == 1
