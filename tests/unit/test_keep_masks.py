import pytest
import torch

from sparsify.errors import NumericsError
from sparsify.model.blocks import BlockView
from sparsify.model.masks import Masks, packed, unpacked


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 16), (7, 9)])
def test_a_mask_is_one_bit_a_weight(shape):
    mask = torch.rand(shape) > 0.5
    bits = packed(mask)
    assert len(bits) == -(-mask.numel() // 8)
    assert torch.equal(unpacked(bits, shape), mask)


def test_the_first_weight_is_the_lowest_bit():
    assert packed(torch.tensor([[True, False, False, False, False, False, False, True, True]])).tolist() == [129, 1]


def test_masks_are_kept_by_layer(make_model):
    view, masks = BlockView(make_model()), Masks()
    first, second = view.layers[:2]
    masks[first.spec.name] = first.weight > 0
    assert list(masks) == [first.spec.name]
    assert torch.equal(masks[first.spec.name], first.weight > 0)
    other = Masks()
    other.put(first.spec.name, masks.bits()[first.spec.name], first.weight.shape)
    assert torch.equal(other[first.spec.name], masks[first.spec.name])
    assert second.spec.name not in masks


def test_zeros_that_no_longer_stand_are_named(make_model):
    view, masks = BlockView(make_model()), Masks()
    layer = view.layers[3]
    masks[layer.spec.name] = layer.weight > 0
    with pytest.raises(NumericsError, match=layer.spec.name):
        masks.check(view)
    layer.write(layer.weight * (layer.weight > 0))
    masks.check(view)
