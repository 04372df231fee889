"""Training on two processes is training on one: same losses, same weights, up to the order of sums."""

import os
import socket
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import json, os, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import sparsify

torch.set_num_threads(1)
sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=0.2)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
tokens = torch.randint(0, 96, (5, 12), generator=torch.Generator().manual_seed(1))
text = torch.randint(0, 96, (21, 12), generator=torch.Generator().manual_seed(2))
schedule = {"batch": 4, "dropout": 0.0, "rate": 0.01, "clip": 1.0}
result = sparsify.prune(model, tokens, sparsity=0.6, training=text, method=("losa", {"steps": 2, "schedule": schedule}),
                        allocator="uniform")
weights = torch.cat([p.flatten() for n, p in model.named_parameters() if "proj" in n])
torch.save({"loss": result.notes["loss"], "ranks": result.notes["step_ranks"], "weights": weights}, sys.argv[1])
"""


def run(folder, processes):
    """The script on so many processes; what each of them saved."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = folder / "train.py"
    script.write_text(SCRIPT)
    running = []
    for rank in range(processes):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
        }
        several = {name: str(value) for name, value in place.items()} if processes > 1 else {}
        command = [sys.executable, str(script), str(folder / f"{processes}.{rank}.pt")]
        running.append(subprocess.Popen(command, env={**os.environ, **several}, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-2000:]
    return [torch.load(folder / f"{processes}.{rank}.pt", weights_only=True) for rank in range(processes)]


def test_two_processes_give_what_one_gives(tmp_path):
    (alone,), both = run(tmp_path, 1), run(tmp_path, 2)
    assert both[0]["loss"] == both[1]["loss"]
    assert torch.equal(both[0]["weights"], both[1]["weights"])
    assert both[0]["ranks"] == alone["ranks"]
    assert both[0]["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert torch.allclose(both[0]["weights"], alone["weights"], atol=2e-3)
