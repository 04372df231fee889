"""The masked product against the plain formula, and what it keeps for the backward pass."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparsify.recovery.lowrank import effective_weight, has_kernel, masked_lowrank_linear, zero_where_zero_

OUT, INP, RANK, SCALE = 12, 20, 3, 2.0


def case(dtype=torch.float64, *, transposed=False, bias=True):
    """x, W with zeros, bias, A, B; the adapter in single precision where the rest is in half."""
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.randn(INP, OUT).T if transposed else torch.randn(OUT, INP)
    weight = torch.where(torch.rand(OUT, INP) < 0.7, 0.0, weight).to(dtype)
    leaves = {
        "x": torch.randn(2, 5, INP, dtype=dtype),
        "bias": torch.randn(OUT, dtype=dtype) if bias else None,
        "a": torch.randn(RANK, INP, dtype=wide),
        "b": torch.randn(OUT, RANK, dtype=wide),
    }
    return weight, {name: leaf if leaf is None else leaf.requires_grad_() for name, leaf in leaves.items()}


def brute(x, weight, bias, a, b, scale, base=True):
    """As the paper writes it, by autograd."""
    delta = scale * (weight != 0) * (b @ a)
    return F.linear(x, weight + delta if base else delta, bias)


def gradients(function, weight, leaves, **options):
    given = [leaf for leaf in (weight, *leaves.values()) if leaf is not None and leaf.requires_grad]
    y = function(leaves["x"], weight, leaves["bias"], leaves["a"], leaves["b"], SCALE, **options)
    return y.detach(), torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), given)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["W frozen", "W trained"])
def test_output_and_gradients_are_those_of_the_formula(transposed, bias, base, trained):
    weight, leaves = case(transposed=transposed, bias=bias)
    weight.requires_grad_(trained and base)
    y, found = gradients(masked_lowrank_linear, weight, leaves, base=base)
    expected_y, expected = gradients(brute, weight, leaves, base=base)
    torch.testing.assert_close(y, expected_y)
    assert len(found) == 3 + bias + (trained and base)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_is_near_the_formula_in_double(dtype):
    weight, leaves = case(dtype)
    y, found = gradients(masked_lowrank_linear, weight, leaves)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    expected_y, expected = gradients(brute, weight.double(), exact)
    tolerance = 8 * torch.finfo(dtype).eps
    assert y.dtype == dtype
    for one, other in zip((y, *found), (expected_y, *expected), strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()
    assert [g.dtype for g in found] == [dtype, dtype, torch.float32, torch.float32]


def test_gradcheck():
    weight, leaves = case()
    assert torch.autograd.gradcheck(
        lambda x, bias, a, b: masked_lowrank_linear(x, weight, bias, a, b, SCALE), tuple(leaves.values())
    )


def test_nothing_dense_is_kept_but_the_parameter_itself():
    weight, leaves = case(torch.float32)
    a, b = torch.randn(16, INP, requires_grad=True), torch.randn(OUT, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        masked_lowrank_linear(leaves["x"], weight, leaves["bias"], a[:RANK], b[:, :RANK], SCALE)
    storages = {t.untyped_storage().data_ptr() for t in (weight, leaves["x"], a, b)}
    assert len(kept) == 4
    assert {t.untyped_storage().data_ptr() for t in kept} == storages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_under_activation_checkpointing(dtype):
    weight, leaves = case(dtype)

    def recomputed(*args):
        return checkpoint(masked_lowrank_linear, *args, use_reentrant=False)

    for one, other in zip(
        gradients(recomputed, weight, leaves)[1], gradients(masked_lowrank_linear, weight, leaves)[1], strict=True
    ):
        assert torch.equal(one, other)


def test_autocast_computes_in_its_precision_and_keeps_no_copy_of_the_weight():
    weight, leaves = case(torch.float32)
    kept = []
    saved = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), saved:
        y = masked_lowrank_linear(leaves["x"], weight, leaves["bias"], leaves["a"], leaves["b"], SCALE)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert not [t for t in kept if t.shape == weight.shape and t.data_ptr() != weight.data_ptr()]
    expected = brute(*(leaves["x"], weight, leaves["bias"], leaves["a"], leaves["b"]), SCALE)
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
    assert {leaf.grad.dtype for leaf in leaves.values()} == {torch.float32}


@pytest.mark.parametrize("transposed", [False, True])
def test_the_effective_weight_lies_as_the_weight_and_has_its_zeros(transposed):
    weight, leaves = case(torch.float32, transposed=transposed)
    whole = effective_weight(weight, leaves["a"].detach(), leaves["b"].detach(), SCALE)
    assert whole.stride() == weight.stride()
    assert torch.equal(whole == 0, weight == 0)


def test_zeros_win_over_whatever_stood_there():
    values = torch.tensor([[1.0, float("inf"), float("nan"), 4.0, 5.0]])
    weight = torch.tensor([[0.0, -0.0, 0.0, -1e-40, 2.0]])
    assert zero_where_zero_(values, weight).tolist() == [[0.0, 0.0, 0.0, 4.0, 5.0]]


def test_there_is_no_kernel_without_an_accelerator():
    assert not has_kernel(torch.device("cpu"))
