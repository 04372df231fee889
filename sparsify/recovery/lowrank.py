"""The masked low-rank product y = x (W + scale M.(BA))^T + bias, M = (W != 0), with nothing dense kept for later."""

import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None, None]


def masked_lowrank_linear(
    x: Float[Tensor, "*tok inp"],
    weight: Float[Tensor, "out inp"],
    bias: Float[Tensor, " out"] | None,
    a: Float[Tensor, "rank inp"],
    b: Float[Tensor, "out rank"],
    scale: float,
    *,
    base: bool = True,
) -> Float[Tensor, "*tok out"]:
    """A linear layer with a low-rank product under its own mask: x (W + scale M.(BA))^T + bias, M = (W != 0).

    Source: LoSA (arXiv 2502.14816), Eq. 1. The sum of both matrices is made for each product and dropped after it, in
    the forward and once more in the backward pass: what is kept until then are x, A, B and the parameter itself (the
    release makes W x and the masked product's x apart, the latter under activation checkpointing). Products are in the
    weight's dtype, or autocast's where that is on; A and B get their gradients in their own.

    Args:
        x: input.
        weight: W, a parameter or a view of one.
        bias: or None.
        a: A, in single precision where the weight is in half.
        b: B, likewise.
        scale: of the product.
        base: whether W itself takes part; without it x (scale M.(BA))^T, for inputs of the adapter alone (dropout).
    """
    dtype = weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
    y: Tensor = _MaskedLowRank.apply(x, weight, bias, a, b, scale, base, dtype)  # type: ignore[no-untyped-call]
    return y


def effective_weight(
    weight: Float[Tensor, "out inp"],
    a: Float[Tensor, "rank inp"],
    b: Float[Tensor, "out rank"],
    scale: float,
    *,
    base: bool = True,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "out inp"]:
    """W + scale M.(BA), or the second term alone: one new matrix that lies as W does.

    Where Triton works, one kernel reads W and writes the sum (`fused`); elsewhere torch passes over it for a copy, the
    product and the zeros.

    Args:
        weight: W.
        a: A.
        b: B.
        scale: of the product.
        base: whether W is added.
        dtype: of the products and the result; None for the weight's.
    """
    weight = weight.to(dtype or weight.dtype)
    left, right = (scale * b).to(weight.dtype), a.to(weight.dtype)
    if weight.dtype != torch.float64 and has_kernel(weight.device):
        from sparsify.recovery.fused import masked_sum

        return masked_sum(weight, left, right, base=base)
    whole = torch.empty_like(weight)
    if base:
        torch.addmm(weight, left, right, out=whole)
    else:
        torch.mm(left, right, out=whole)
    return zero_where_zero_(whole, weight)


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for this device; a warning says why if only the latter fails."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    one = torch.ones(1, 1, device=device)
    try:
        from sparsify.recovery.fused import masked_sum

        masked_sum(one, one, one, base=True)
    except Exception as error:  # no C compiler, a driver that is too old: each raises something else
        warnings.warn(f"Triton does not work here ({error!r}); adapters are slower without it", stacklevel=2)
        return False
    return True


def zero_where_zero_(values: Float[Tensor, "out inp"], weight: Float[Tensor, "out inp"]) -> Float[Tensor, "out inp"]:
    """Zeros where the weight has them, in place, whatever stood there.

    That is what the backward pass of a hard shrinkage with threshold zero does, in one kernel; a comparison and a
    product would be two, with a matrix of flags between them.
    """
    torch.ops.aten.hardshrink_backward.grad_input(values, weight, 0.0, grad_input=values)
    return values


class _MaskedLowRank(torch.autograd.Function):
    """`masked_lowrank_linear`; G = dY^T X is the only dense matrix of the backward pass beside the weight's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        base: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale, ctx.base, ctx.dtype = scale, base, dtype
        return F.linear(x, effective_weight(weight, a, b, scale, base=base, dtype=dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        """With G = dY^T X: dA = scale B^T (M.G), dB = scale (M.G) A^T, dW = G; dX = dY (W + scale M.(BA))."""
        x, weight, a, b = ctx.saved_tensors
        of_x, of_weight, of_bias, *of_adapters = ctx.needs_input_grad[:5]
        dx = dw = dbias = da = db = None
        if of_x:
            dx = dy @ effective_weight(weight, a, b, ctx.scale, base=ctx.base, dtype=ctx.dtype)
        rows = dy.reshape(-1, dy.shape[-1])
        if of_bias:
            dbias = rows.sum(dim=0)
        if any(of_adapters) or (of_weight and ctx.base):
            gradient = rows.T @ x.reshape(-1, x.shape[-1])
            dw = gradient.to(weight.dtype, copy=True) if of_weight and ctx.base else None
            zero_where_zero_(gradient, weight.to(ctx.dtype))
            db = (gradient @ a.T.to(ctx.dtype)).to(b.dtype) * ctx.scale
            da = (b.T.to(ctx.dtype) @ gradient).to(a.dtype) * ctx.scale
        return dx, dw, dbias, da, db, None, None, None
