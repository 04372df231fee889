"""What of a block goes together when an attention head or an MLP channel goes: found by the names of its matrices."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from sparsify.errors import UnsupportedModelError
from sparsify.model.blocks import BlockView

Kind = Literal["heads", "channels"]

QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
OUTPUTS = ("o_proj", "out_proj", "dense")
"""Names of the matrix that reads what the heads give."""

MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("c_fc",), "c_proj"),
)
"""Names of the matrices that make an MLP's channels, and of the one that reads them."""

REASONS = {
    "expert": "channels of experts are not removed",
    "router": "channels of experts are not removed",
    "qkv": "queries, keys and values are one matrix",
    "query_key_value": "queries, keys and values are one matrix",
    "c_attn": "queries, keys and values are one matrix",
    "gate_up": "gate and up are one matrix",
}
"""Why a matrix cannot be cut, by what its name or its module's class has in it."""


@dataclass(frozen=True)
class Coupled:
    """The matrices of a block that lose the same units: its attention heads, or the channels of its MLP.

    With grouped queries a unit of heads is a key/value head with all queries that read it: transformers gives each
    key/value head of a layer the same number of them, so that one query head of a group cannot go by itself.

    Attributes:
        kind: of the units.
        block: index.
        module: the attention or the MLP, whose attributes count them.
        rows: matrices that have rows of every unit, by full name.
        columns: the one that has columns of every unit, by full name.
        widths: rows or columns of a unit in each of them, by full name.
        head_dim: length of a head; None for channels.
    """

    kind: Kind
    block: int
    module: nn.Module
    rows: Mapping[str, nn.Linear]
    columns: Mapping[str, nn.Linear]
    widths: Mapping[str, int]
    head_dim: int | None = None

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """All matrices, by full name."""
        return {**self.rows, **self.columns}

    @property
    def count(self) -> int:
        """Units that there are now."""
        name, reader = next(iter(self.columns.items()))
        return reader.in_features // self.widths[name]

    @property
    def size(self) -> int:
        """Weights of a unit in all matrices, without biases."""
        rows = sum(self.widths[name] * linear.in_features for name, linear in self.rows.items())
        return rows + sum(self.widths[name] * linear.out_features for name, linear in self.columns.items())

    @property
    def queries(self) -> int:
        """Query heads of a unit; one for channels."""
        return self.widths[next(iter(self.columns))] // (self.head_dim or 1)


def coupled_of(view: BlockView) -> list[Coupled]:
    """Heads and channels of every block, in order.

    Raises:
        UnsupportedModelError: as for `coupled`.
    """
    return [group for i, block in enumerate(view.blocks) for group in coupled(block, i, f"{view.prefix}.{i}")]


def coupled(block: nn.Module, index: int, name: str) -> tuple[Coupled, Coupled]:
    """The heads and the channels of a block.

    Args:
        block: of the model.
        index: its place.
        name: its name in the model.

    Raises:
        UnsupportedModelError: a matrix that is of neither, sizes that are not those of whole heads, or a parameter
            that runs over all heads or channels; the message names it.
    """
    siblings: dict[str, dict[str, nn.Module]] = {}
    for path, module in block.named_modules():
        parent, _, leaf = path.rpartition(".")
        siblings.setdefault(parent, {})[leaf] = module
    heads = [_heads(block, index, name, parent, inside) for parent, inside in siblings.items() if _attends(inside)]
    mlps = [_channels(block, index, name, parent, inside, *p) for parent, inside, p in _mlps(siblings)]
    known = {full for group in (*heads, *mlps) for full in group.linears}
    _refuse_others(block, name, known)
    if len(heads) != 1 or len(mlps) != 1:
        got = f"{name}: {len(heads)} attentions and {len(mlps)} MLPs in a {type(block).__name__}"
        raise _unsupported("A block whose units can be removed has one attention and one MLP", got)
    _refuse_spanning(block, name, heads[0], mlps[0])
    return heads[0], mlps[0]


def _attends(inside: Mapping[str, nn.Module]) -> bool:
    names = [*QUERY_KEY_VALUE, next((leaf for leaf in OUTPUTS if leaf in inside), "")]
    return all(isinstance(inside.get(leaf), nn.Linear) for leaf in names)


def _mlps(
    siblings: Mapping[str, Mapping[str, nn.Module]],
) -> Iterator[tuple[str, Mapping[str, nn.Module], tuple[tuple[str, ...], str]]]:
    """Parents of an MLP's matrices, with the names that fit."""
    for parent, inside in siblings.items():
        for makers, reader in MLPS:
            if all(isinstance(inside.get(leaf), nn.Linear) for leaf in (*makers, reader)):
                yield parent, inside, (makers, reader)
                break


def _linears(prefix: str, inside: Mapping[str, nn.Module], names: tuple[str, ...]) -> dict[str, nn.Linear]:
    found = {leaf: inside[leaf] for leaf in names}
    return {f"{prefix}.{leaf}": linear for leaf, linear in found.items() if isinstance(linear, nn.Linear)}


def _heads(block: nn.Module, index: int, name: str, parent: str, inside: Mapping[str, nn.Module]) -> Coupled:
    module, prefix = block.get_submodule(parent), f"{name}.{parent}".rstrip(".")
    output = next(leaf for leaf in OUTPUTS if leaf in inside)
    rows, columns = _linears(prefix, inside, QUERY_KEY_VALUE), _linears(prefix, inside, (output,))
    query, key, value = (linear.out_features for linear in rows.values())
    read, head_dim = next(iter(columns.values())).in_features, getattr(module, "head_dim", None)
    whole = isinstance(head_dim, int) and head_dim > 0 and key % head_dim == 0 and query % key == 0
    if not isinstance(head_dim, int) or not whole or value != key or read != query:
        got = f"{prefix} ({type(module).__name__}): {query} rows of queries, {key} of keys, {value} of values, "
        raise _unsupported("This attention is not one of whole heads", f"{got}{read} columns, head_dim={head_dim}")
    widths = [query // key * head_dim, head_dim, head_dim, query // key * head_dim]
    return Coupled("heads", index, module, rows, columns, dict(zip((*rows, *columns), widths, strict=True)), head_dim)


def _channels(
    block: nn.Module,
    index: int,
    name: str,
    parent: str,
    inside: Mapping[str, nn.Module],
    makers: tuple[str, ...],
    reader: str,
) -> Coupled:
    module, prefix = block.get_submodule(parent), f"{name}.{parent}".rstrip(".")
    rows, columns = _linears(prefix, inside, makers), _linears(prefix, inside, (reader,))
    read = next(iter(columns.values())).in_features
    if odd := next((full for full, linear in rows.items() if linear.out_features != read), None):
        got = f"{odd}: {rows[odd].out_features} rows for {read} columns of {reader}"
        raise _unsupported("The matrices of this MLP do not have the same channels", got)
    return Coupled("channels", index, module, rows, columns, dict.fromkeys((*rows, *columns), 1))


def _refuse_others(block: nn.Module, name: str, known: set[str]) -> None:
    """A matrix that is of no unit would stand in the budget and could not be removed."""
    owners = {path: path.rpartition(".")[0] for path, parameter in block.named_parameters() if parameter.ndim >= 2}
    others = {path: owner for path, owner in owners.items() if f"{name}.{owner}" not in known}
    kinds = {path: type(block.get_submodule(owner)).__name__ for path, owner in others.items()}
    reasons = {path: _reason(f"{path} {kind}".lower()) for path, kind in kinds.items()}
    if path := next((path for path, reason in reasons.items() if reason), next(iter(others), None)):
        got = f"{name}.{path} ({kinds[path]}): {reasons[path] or 'it is of no head and no channel'}"
        raise _unsupported("This matrix cannot be cut into heads or channels", got)


def _reason(text: str) -> str | None:
    return next((why for part, why in REASONS.items() if part in text), None)


def _refuse_spanning(block: nn.Module, name: str, heads: Coupled, mlp: Coupled) -> None:
    """Vectors beside the biases of the matrices are for one head, or for the hidden states."""
    biases = {id(linear.bias) for group in (heads, mlp) for linear in group.linears.values()}
    hidden = next(iter(heads.rows.values())).in_features
    for path, parameter in block.named_parameters():
        if parameter.ndim == 1 and id(parameter) not in biases and len(parameter) not in (1, hidden, heads.head_dim):
            got = f"{name}.{path} of length {len(parameter)}"
            raise _unsupported("This parameter runs over several heads or channels", got)


def _unsupported(what: str, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        what,
        got=got,
        allowed="Linear modules q_proj, k_proj, v_proj and o_proj; gate_proj, up_proj and down_proj, or fc1 and fc2",
        fix="method=oneshot, which zeroes weights in any model",
    )
