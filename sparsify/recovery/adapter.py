"""A low-rank adapter in one module: two parameters more, and another forward for that instance."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.errors import NumericsError, UsageError
from sparsify.model.prunable import Layer
from sparsify.recovery.lowrank import masked_lowrank_linear
from sparsify.recovery.merging import merged_weight, unmerged_weight

A, B = "lowrank_a", "lowrank_b"
"""What the parameters are called in the module that has them."""
IN_USE = "lowrank_in_use"
"""Ones for the components that take part, in a buffer: a captured graph reads it, and outlives a change of rank."""


@dataclass
class Adapter:
    """y = x (W + scale M.(BA))^T + bias, M = (W != 0), with the first `rank` of the stored components.

    Whatever a module's class computes, with an adapter without dropout it computes this.

    Attributes:
        layer: a matrix that a module of its own holds.
        rank: components in use.
        stored: components that there is room for.
        scale: of the product.
        dropout: on the adapter's input, in train mode.
        masked: False for plain LoRA, x W^T + scale (x A^T) B^T: its product is dense.
    """

    layer: Layer
    rank: int
    stored: int
    scale: float
    dropout: float
    masked: bool
    _own: Callable[[Tensor], Tensor] | None = field(default=None, init=False)
    _base: Tensor | None = field(default=None, init=False)
    _versions: list[int] = field(default_factory=list, init=False)

    def attach(self, generator: torch.Generator) -> None:
        """Into the module, with fresh components."""
        spec, weight, module = self.layer.spec, self.layer.weight, self.layer.module
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for name, shape in {A: (self.stored, spec.in_features), B: (spec.out_features, self.stored)}.items():
            zeros = torch.zeros(shape, dtype=dtype, device=weight.device)
            module.register_parameter(name, nn.Parameter(zeros))
        self._own = module.__dict__.get("forward")  # something else may have replaced its class's
        module.register_buffer(IN_USE, torch.zeros(self.stored, dtype=dtype, device=weight.device), persistent=False)
        self.use(self.rank)
        self.renew(0, self.rank, generator)
        self._switch(adapted=True)

    def detach(self) -> None:
        """Out of the module; its weight stays as it is now."""
        if self._base is None:
            self._switch(adapted=False)
        self._base = None
        for name in (A, B, IN_USE):
            delattr(self.layer.module, name)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A [stored, in] and B [out, stored]."""
        return getattr(self.layer.module, A), getattr(self.layer.module, B)

    def forward(self, x: Float[Tensor, "*tok inp"]) -> Float[Tensor, "*tok out"]:
        """What the module computes while it is adapted and not merged."""
        module, (stored_a, stored_b) = self.layer.module, self.factors
        a, b = stored_a, stored_b * getattr(module, IN_USE)
        weight, drops = self.layer.oriented(self.layer.stored), self.dropout > 0 and module.training
        if self.masked and not drops:
            return masked_lowrank_linear(x, weight, module.bias, a, b, self.scale)
        dropped = F.dropout(x, self.dropout) if drops else x
        if self.masked:
            return self._plain(x) + masked_lowrank_linear(dropped, weight, None, a, b, self.scale, base=False)
        return self._plain(x) + self.scale * F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype))

    def use(self, rank: int) -> None:
        """Let the first so many components take part, and no others."""
        self.rank = rank
        in_use = getattr(self.layer.module, IN_USE)
        in_use[:rank], in_use[rank:] = 1, 0

    @torch.no_grad()
    def renew(self, low: int, high: int, generator: torch.Generator) -> None:
        """Make components what PEFT starts with: A uniform within 1/sqrt(in) (Kaiming, a = sqrt 5), B zero."""
        if low < high:
            a, b = self.factors
            bound = 1 / math.sqrt(self.layer.spec.in_features)
            drawn = torch.empty(high - low, self.layer.spec.in_features).uniform_(-bound, bound, generator=generator)
            a[low:high] = drawn.to(a)
            b[:, low:high] = 0

    @torch.no_grad()
    def fold(self, low: int, high: int) -> None:
        """Add the product of components to the weight for good, and take it from them."""
        self._write(merged_weight(self.layer.weight, self._product(low, high), masked=self.masked))
        self.factors[1][:, low:high] = 0

    @torch.no_grad()
    def merge(self, near: bool) -> None:
        """Add the product to the weight; the module's forward is its own then.

        Args:
            near: keep the weight before on its device, else on the host.
        """
        weight = self.layer.weight
        merged = merged_weight(weight, self._product(), masked=self.masked)
        self._write(merged, before=weight.clone() if near else _on_host(weight))
        self._versions = [factor._version for factor in self.factors]
        self._switch(adapted=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the product out of the weight again (`unmerged_weight`); without effect if it is not in."""
        if self._base is None:
            return
        if self._versions != [factor._version for factor in self.factors]:
            raise UsageError(
                "An adapter that changed since it was merged cannot be taken out of the weight",
                got=self.layer.spec.name,
                fix="unmerge before training or loading",
            )
        base = self._base.to(self.layer.weight.device, non_blocking=True)
        self._write(unmerged_weight(self.layer.weight, base, self._product(), masked=self.masked))
        self._switch(adapted=True)

    def _product(self, low: int = 0, high: int | None = None) -> Float[Tensor, "out inp"]:
        """The product scale BA of components from low to high, of those in use by default, as precise as they are."""
        a, b = self.factors
        high = self.rank if high is None else high
        return (self.scale * b[:, low:high]) @ a[low:high]

    def _write(self, weight: Float[Tensor, "out inp"], before: Tensor | None = None) -> None:
        if not torch.isfinite(weight).all():
            raise NumericsError(
                f"{self.layer.spec.name} is not finite with its adapter",
                got=weight.dtype,
                fix="a lower learning rate, or dtype=bfloat16 or float32 if this is float16",
            )
        self.layer.write(weight)
        self._base = before

    def _plain(self, x: Tensor) -> Tensor:
        """The module's own forward."""
        module = self.layer.module
        y: Tensor = self._own(x) if self._own is not None else type(module).forward(module, x)
        return y

    def _switch(self, *, adapted: bool) -> None:
        module = self.layer.module
        if adapted:
            module.forward = self.forward  # a bound method: a copy of the model gets an adapter of its own
        elif self._own is not None:
            module.forward = self._own
        else:
            del module.forward


def _on_host(weight: Tensor) -> Tensor:
    copy = torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda)
    return copy.copy_(weight, non_blocking=True)
