"""Whether heads and channels can be taken out of a model: tried on a few tokens before anything is done."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.data.inputs import Inputs
from sparsify.errors import UnsupportedModelError
from sparsify.model.blocks import BlockView
from sparsify.model.coupled import Coupled, coupled_of
from sparsify.model.dense import DenseModel
from sparsify.model.removal import remove, silence
from sparsify.model.sizes import follow

CLOSE = 5e-2
"""How far hidden states of the same computation may be apart, relative to their length: rounding in half precision."""


@torch.no_grad()
def try_removal(view: BlockView, inputs: Inputs, dense: DenseModel) -> None:
    """Silence some units, unequally many by block; then remove them, and refuse a model that gives something else.

    Args:
        view: the dense model, as it was when this returns or raises.
        inputs: of which a few are taken.
        dense: to go back to.

    Raises:
        UnsupportedModelError: the smaller model does not run, or does not give what the silenced one gave.
    """
    groups = coupled_of(view)
    few, kind = inputs.few(), type(view.model).__name__
    lost = {id(group): _few_units(group) for group in groups}
    try:
        for group in groups:
            silence(group, range(group.count - lost[id(group)], group.count))
        silenced = _states(view, few)
        small = _smaller(view, groups, few, lost)
    except (RuntimeError, ValueError, AttributeError, IndexError, TypeError) as error:
        raise UnsupportedModelError(
            f"{kind} does not run with fewer heads and channels",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            fix="method=oneshot, which zeroes weights in any model",
        ) from error
    finally:
        view.restore(dense)
    _compare(silenced, small, kind)


def _few_units(group: Coupled) -> int:
    """None or one head, one or two channels, by turns from block to block; one at least stays."""
    wanted = (group.block + 1) % 2 if group.kind == "heads" else 1 + group.block % 2
    return min(wanted, group.count - 1)


def _smaller(view: BlockView, groups: list[Coupled], inputs: Inputs, lost: Mapping[int, int]) -> Float[Tensor, "..."]:
    for group in groups:
        remove(group, range(group.count - lost[id(group)]))
    view.refresh()
    follow(view)
    return _states(view, inputs)


def _states(view: BlockView, inputs: Inputs) -> Float[Tensor, "..."]:
    """The hidden states that the model hands to its head."""
    batch = inputs.batch(slice(0, len(inputs)), view.device)
    states: Tensor = view.model.base_model(**batch).last_hidden_state  # type: ignore[operator]
    return states.float()


def _compare(silenced: Float[Tensor, "*tok dim"], small: Float[Tensor, "*tok dim"], kind: str) -> None:
    far = float(((silenced - small).norm(dim=-1) / silenced.norm(dim=-1).clamp_min(1e-30)).max())
    if not far <= CLOSE:
        raise UnsupportedModelError(
            f"{kind} computes something else with fewer heads and channels than with the same ones at zero",
            got=f"a relative difference of {far:.3g}",
            fix="method=oneshot, which zeroes weights in any model",
        )
