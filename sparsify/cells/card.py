"""The model card of an exported model, from its record."""

import re
from collections.abc import Iterator

from sparsify.runs import registry
from sparsify.runs.record import Record


def text(record: Record) -> str:
    """Markdown with the front matter of the hub."""
    return "\n".join(_lines(record))


def _lines(record: Record) -> Iterator[str]:
    science, model = record.science, record.execution["model"]
    pruner, allocator = (registry.name_of(group, science[group]) for group in ("pruner", "allocator"))
    pattern = "" if science["pattern"] == "unstructured" else f" in the pattern {science['pattern']}"
    yield from ("---", "library_name: transformers", "tags: [sparsity, pruning]")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model.get("id", ""))):
        yield f"base_model: {model['id']}"
    yield from ("---", "", f"# {science['model']['name']}, {record.sparsity:.1%} sparse", "")
    if "heads" in record.notes:
        yield from _smaller(record, allocator)
    else:
        yield f"Pruned with {pruner} and the layer-wise allocation of {allocator} to {record.sparsity:.4%} zeros"
        yield f"over the linear weights of its blocks{pattern}. Weights are stored dense, zeros included"
        yield f"({science['dtype']})."
    yield from _quantised(record)
    yield from ("", "| measured | value | protocol |", "|---|---:|---|")
    for name, item in record.evaluations.items():
        result = item.result
        error = f" ± {result.stderr:.4g}" if result.stderr is not None else ""
        yield f"| {name}, {result.metric} | {result.value:.5g}{error} | {result.protocol} |"
    yield from ("", "Made with sparsify (layerwise-sparsify) by", "", "```bash")
    yield f"python -m sparsify {record.execution.get('command', '')}"
    yield from (
        "```",
        "",
        f"Run {record.key}, code {record.execution.get('commit')}, {record.execution.get('device')};",
    )
    versions = ", ".join(f"{k} {v}" for k, v in record.execution.get("versions", {}).items())
    yield f"{versions}. Calibration: {_calibration(record)}."
    yield from (
        "",
        "`allocation.json` has the sparsity of every layer; `allocator=from_file` reads it. The licence is that of",
    )
    yield from ("the original model.", "")


def _smaller(record: Record, allocator: str) -> Iterator[str]:
    """What is left of a model that lost heads and channels."""
    notes = record.notes
    yield f"Heads and channels removed by group Taylor importance and the layer-wise allocation of {allocator}:"
    yield f"{record.sparsity:.4%} of the linear weights of its blocks are gone, {notes['parameters_after']:,} of"
    yield f"{notes['parameters_before']:,} parameters left ({record.science['dtype']})."
    if "own_format" in notes:
        yield f"Plain transformers does not open this folder ({notes['own_format']}): `sparsify.load` does."


def _quantised(record: Record) -> Iterator[str]:
    """Bits and size of a quantised model, which notes of its stage or of its method have."""
    if notes := record.quantised:
        size, pruned = f"{notes['bits_per_weight']:.3f} bits a weight", f"{notes['pruned']:.4%}"
        yield f"What is kept is quantised to {notes['mean_bits']:g} bits: {size} with mask, scales and zero points."
        yield f"{pruned} are pruned, other zeros are rounded weights. Weights are stored as what their codes stand for;"
        yield "`quantisation.safetensors` has the grids."


def _calibration(record: Record) -> str:
    source = record.calibration
    if "corpus" not in source:
        return str(source.get("source", "unknown"))
    return f"{source['windows']} windows of {source['seqlen']} tokens of {source['corpus']} ({source['split']})"
