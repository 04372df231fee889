import importlib.util
import json
import sys

import pytest

from sparsify import paths
from sparsify.model.blocks import BlockView


@pytest.fixture(scope="module")
def script():
    file = paths.root() / "experiments" / "losa" / "step_cost.py"
    spec = importlib.util.spec_from_file_location("step_cost", file)
    module = sys.modules["step_cost"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("reference", ["peft LoRA", "minimal LoRA"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_kind_of_adapter_takes_its_steps_and_leaves(script, make_model, monkeypatch, reference, dropout):
    lora = script.peft_lora if reference == "peft LoRA" else script.minimal_lora
    monkeypatch.setattr(script, "REFERENCE", reference)
    monkeypatch.setattr(script, "KINDS", {reference: lora, "masked": script.ours, "unmasked": script.dense})
    view = BlockView(make_model().requires_grad_(False).train())
    keys = list(view.model.state_dict())
    setting = script.Setting("tiny", "cpu", "float32", 8, [2], 4, 6, dropout, 0.7, 1, 2, 2)
    costs = script.measure(view, setting, 2)
    assert [len(cost.seconds) for cost in costs.values()] == [4, 4, 4]
    assert list(view.model.state_dict()) == keys
    assert not any("forward" in vars(module) for module in view.model.modules())
    lines = script.table(costs, 2, 8).splitlines()
    assert lines[0] == "2 x 8 tokens"
    assert "1.000x" in lines[1]
    row = json.loads(json.dumps(script.summary(costs, 2)))
    assert row["time_ratio"] == pytest.approx(costs["masked"].median / costs[reference].median)
    assert row["memory_ratio"] is None  # there is no count of it on a CPU
