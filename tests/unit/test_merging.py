import pytest
import torch

from sparsify.recovery.merging import merged_weight, unmerged_weight

HALF = [torch.float32, torch.bfloat16, torch.float16]


def sparse(dtype, *shape):
    return torch.where(torch.rand(shape) < 0.6, 0.0, torch.randn(shape)).to(dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_zeros_keep_their_bits_and_nothing_else_becomes_one(dtype):
    weight, product = sparse(dtype, 30, 40), torch.randn(30, 40)
    weight[0, :4] = torch.tensor([-0.0, 1.0, -1.0, 1.0])
    product[0, :4] = torch.tensor([5.0, -1.0, 1.0, -1.0 + 1e-7])  # the last three round to zero in half, two in single
    merged = merged_weight(weight, product)
    assert torch.equal(merged == 0, weight == 0)
    assert torch.signbit(merged[0, 0])
    tiny = torch.finfo(dtype).tiny
    assert merged[0, 1:3].tolist() == [tiny, -tiny]
    usual = (weight != 0) & (merged.abs() != tiny)
    assert torch.equal(merged[usual], (weight.float() + product).to(dtype)[usual])


def test_the_least_number_has_the_sign_of_the_sum():
    weight = torch.tensor([[2.0**-14, -(2.0**-14)]]).half()
    least = merged_weight(weight, torch.tensor([[-(2.0**-14) - 2.0**-30, 2.0**-14 + 2.0**-30]]))
    assert least.tolist() == [[-(2.0**-14), 2.0**-14]]


def test_a_dense_product_fills_the_zeros():
    weight, product = sparse(torch.float32, 8, 8), torch.randn(8, 8)
    assert torch.equal(merged_weight(weight, product, masked=False), weight + product)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("masked", [True, False])
def test_out_again_to_the_bit(dtype, masked):
    weight, product = sparse(dtype, 30, 40), torch.randn(30, 40)
    weight[0, 0] = -0.0
    merged = merged_weight(weight, product, masked=masked)
    back = unmerged_weight(merged, weight, product, masked=masked)
    assert torch.equal(back, weight)
    assert torch.equal(torch.signbit(back), torch.signbit(weight))


@pytest.mark.parametrize("dtype", HALF)
def test_what_was_pruned_meanwhile_is_zero_and_the_rest_as_it_was(dtype):
    weight, product = sparse(dtype, 30, 40), torch.randn(30, 40)
    merged = merged_weight(weight, product)
    pruned = torch.where(merged.abs() < merged.abs().median(), 0, merged)
    back = unmerged_weight(pruned, weight, product)
    assert torch.equal(back, torch.where(pruned == 0, 0, weight))


@pytest.mark.parametrize("dtype", HALF)
def test_what_was_updated_meanwhile_is_off_by_one_rounding(dtype):
    weight, product = sparse(dtype, 30, 40), torch.randn(30, 40)
    updated = torch.where(torch.rand(30, 40) < 0.5, 0.0, torch.randn(30, 40)).to(dtype)  # revives weights, too
    back = unmerged_weight(updated, weight, product)
    assert torch.equal(back == 0, updated == 0)
    exact = updated.double() - product.double()
    bound = exact.abs() * torch.finfo(dtype).eps + 2.0**-22
    assert ((back.double() - exact).abs() <= bound)[updated != 0].all()


def test_an_updated_weight_that_is_all_product_does_not_vanish():
    back = unmerged_weight(torch.full((1, 1), 0.5), torch.ones(1, 1), torch.full((1, 1), 0.5))
    assert back.item() == torch.finfo(torch.float32).tiny
