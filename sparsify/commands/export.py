"""`python -m sparsify.export KEY --to FOLDER`: a kept model as a folder that plain transformers opens."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn

from sparsify.commands import cli
from sparsify.errors import UsageError
from sparsify.runs import console
from sparsify.runs.records import Store


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one paragraph, as all commands do."""

    def error(self, message: str) -> NoReturn:
        fix = "python -m sparsify.export <key> --to <folder>"
        raise UsageError("The export was not understood", got=message, fix=fix)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = _Parser(
        prog="python -m sparsify.export",
        description="Write the model of a cell that was run with keep=true as a Hugging Face folder: weights with the "
        "zeros in place, config, tokenizer, a card with the record's numbers, and the allocation as JSON.",
        epilog="python -m sparsify allocator=atp sparsity=0.7 keep=true, then "
        "python -m sparsify.export <the key it printed> --to pruned",
    )
    parser.add_argument("key", help="of the run, or its first digits")
    parser.add_argument("--to", required=True, type=Path, metavar="FOLDER", help="a new folder")
    results = os.environ.get("SPARSIFY_RESULTS", "results")
    parser.add_argument("--results", default=results, type=Path, help=f"where the records are ({results})")
    return parser


def main(arguments: list[str]) -> int:
    """Export and say what was written."""
    try:
        options = parser().parse_args(arguments)
        from sparsify.cells.export import export

        done = export(Store(options.results), options.key, options.to)
    except Exception as error:
        return cli.exit_code(error)
    what = "removed" if done.removed else "zero"
    console.say(f"wrote {options.to}: {done.sparsity:.4f} of {done.weights:,} prunable weights are {what}")
    if done.own_format is None:
        console.say(f'open it with AutoModelForCausalLM.from_pretrained("{options.to}")')
    else:
        console.say(f"plain transformers does not open it: {done.own_format}")
        console.say(f'open it with sparsify.load("{options.to}")')
    return 0
