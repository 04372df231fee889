"""What every evaluator promises: a number with its protocol, and a model left as it was. Found by the registry."""

import json

import pytest
from fakes import state_of

from sparsify import perplexity
from sparsify.cells.cell import Cell
from sparsify.data.corpora import Corpus
from sparsify.data.windows import Windows
from sparsify.errors import UsageError
from sparsify.evaluation.base import Subject
from sparsify.evaluation.perplexity import Perplexity
from sparsify.model.blocks import BlockView
from sparsify.runs import menu, registry
from sparsify.types import Evaluation

SIZES = [f"{part}.{size}" for part in ("calibration", "heldout", "test") for size in ("windows=2", "seqlen=16")]


@pytest.mark.parametrize("name", registry.names("eval"))
def test_every_evaluator_measures_and_leaves_the_model_as_it_was(name, make_model):
    cell = Cell.of(menu.compose(["model=shape/tiny", "device=cpu", f"eval={name}", *SIZES]))
    view = BlockView(make_model(vocab_size=1024))
    dense, before = view.snapshot(), state_of(view.model)
    assert cell.evaluators
    for evaluator in cell.evaluators.values():
        subject = Subject(view, None, lambda spec: spec.inputs(None, 0), dense)
        if hasattr(evaluator, "task"):  # random weights have no tokenizer
            with pytest.raises(UsageError, match="tokenizer"):
                evaluator.evaluate(subject)
            continue
        result = evaluator.evaluate(subject)
        assert isinstance(result, Evaluation)
        assert result.protocol
        tree = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert Evaluation.from_json(tree, name) == result
        assert not dense.changed()
        assert state_of(view.model) == before, "an evaluator leaves modules, hooks and flags as it found them"
        assert evaluator.evaluate(subject) == result, "an evaluator gives the same number twice"


def test_the_perplexity_evaluator_reports_value_protocol_and_text(make_model, tmp_path):
    from sparsify.evaluation.base import Subject

    windows = Windows(Corpus("noise", path=str(tmp_path)), "test", 8, 3)
    model, inputs = make_model(vocab_size=1000), windows.inputs(None, 0)
    asked = []
    subject = Subject(BlockView(model), None, lambda spec: asked.append(spec) or inputs, {}, batch_size=2)
    measured = Perplexity(windows).evaluate(subject)
    assert asked == [windows]
    assert measured.to_json() == {
        "metric": "perplexity",
        "value": perplexity(model, inputs.tokens, batch_size=2),
        "protocol": "noise@8x3",
        "text": inputs.provenance,
    }
