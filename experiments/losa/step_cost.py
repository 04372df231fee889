"""What a training step with masked low-rank adapters costs beside PEFT's LoRA: peak memory and seconds, same run.

    python experiments/losa/step_cost.py                                        # shape/llama2-7b, bf16, one GPU
    python experiments/losa/step_cost.py --batch 4 --dropout 0.1                # as LoSA was released
    python experiments/losa/step_cost.py --model smollm2-135m --device cpu --tokens 64 --batch 1 --steps 2

One model with 70% zeros is given one kind of adapter after the other, several times over, and trained on random tokens:
forward, backward (blocks recomputed in it, for every kind), AdamW on the adapters. Memory is the allocator's peak over
the steps, weights included. Prints a table of ratios, then JSON. Wanted: 1.3 times LoRA's memory, 1.5 times its time.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsify
from sparsify.model.blocks import BlockView
from sparsify.model.gradients import recomputing
from sparsify.recovery.adapters import Adapters
from sparsify.recovery.lowrank import has_kernel

MEMORY, TIME = 1.3, 1.5
"""How much of LoRA's we allow ourselves."""

SCALE = 2.0


@dataclass(frozen=True)
class Setting:
    """What is measured; the options of the command line."""

    model: str
    device: str
    dtype: str
    tokens: int
    batch: list[int]
    rank: int
    rank_max: int
    dropout: float
    sparsity: float
    warmup: int
    steps: int
    rounds: int


@dataclass
class Cost:
    """Steps of one kind of adapter at one batch size."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@contextmanager
def ours(view: BlockView, setting: Setting, masked: bool = True) -> Iterator[list[nn.Parameter]]:
    """Our adapters."""
    options: dict[str, Any] = {"scale": SCALE, "dropout": setting.dropout, "masked": masked}
    with Adapters(view, setting.rank, setting.rank_max, **options) as adapters:
        yield adapters.parameters()


@contextmanager
def dense(view: BlockView, setting: Setting) -> Iterator[list[nn.Parameter]]:
    """Ours without the mask."""
    with ours(view, setting, masked=False) as parameters:
        yield parameters


@contextmanager
def peft_lora(view: BlockView, setting: Setting) -> Iterator[list[nn.Parameter]]:
    """PEFT's LoRA on the same linear layers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=setting.rank,
        lora_alpha=round(SCALE * setting.rank),
        lora_dropout=setting.dropout,
        target_modules=[layer.spec.name for layer in view.layers],
    )
    wrapped = get_peft_model(view.model, config)
    try:
        yield [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    finally:
        wrapped.unload()


@contextmanager
def minimal_lora(view: BlockView, setting: Setting) -> Iterator[list[nn.Parameter]]:
    """LoRA in a few lines, for where PEFT is not installed: adapters and their products in single precision."""
    trained = []
    for layer in view.layers:
        spec, where = layer.spec, layer.weight.device
        a = nn.Parameter(torch.randn(setting.rank, spec.in_features, device=where) / spec.in_features**0.5)
        b = nn.Parameter(torch.zeros(spec.out_features, setting.rank, device=where))
        layer.module.forward = _with_lora(layer.module.forward, a, b, setting.dropout)
        trained += [a, b]
    try:
        yield trained
    finally:
        for layer in view.layers:
            del layer.module.forward


def _with_lora(own: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, dropout: float) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y, dropped = own(x), F.dropout(x.float(), dropout)
        return (y + SCALE * F.linear(F.linear(dropped, a), b)).to(y.dtype)

    return forward


HAS_PEFT = find_spec("peft") is not None
REFERENCE = "peft LoRA" if HAS_PEFT else "minimal LoRA"
KINDS = {REFERENCE: peft_lora if HAS_PEFT else minimal_lora, "masked": ours, "unmasked": dense}


def clock(device: torch.device) -> float:
    """Seconds, after everything that was started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train(view: BlockView, parameters: list[nn.Parameter], tokens: Tensor, steps: int) -> list[float]:
    """Seconds of each step."""
    optimiser, seconds = torch.optim.AdamW(parameters, lr=1e-5), []
    for _ in range(steps):
        start = clock(view.device)
        optimiser.zero_grad()
        view.model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimiser.step()
        seconds.append(clock(view.device) - start)
    return seconds


def measure(view: BlockView, setting: Setting, batch: int) -> dict[str, Cost]:
    """Every kind in turn, again and again: what slows the machine down slows down all of them."""
    costs = {kind: Cost() for kind in KINDS}
    ids = torch.randint(3, view.model.config.vocab_size, (batch, setting.tokens), device=view.device)
    for _ in range(setting.rounds):
        for kind, attached in KINDS.items():
            gc.collect()  # what the kind before has left in cycles
            with attached(view, setting) as parameters, recomputing(view.blocks):
                train(view, parameters, ids, setting.warmup)
                if view.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(view.device)
                costs[kind].seconds += train(view, parameters, ids, setting.steps)
            if view.device.type == "cuda":
                costs[kind].peak = max(costs[kind].peak, torch.cuda.max_memory_allocated(view.device))
            del parameters
    return costs


def prepared(setting: Setting) -> BlockView:
    """The model in train mode, with zeros at random places of every matrix."""
    model, _ = sparsify.load(setting.model, dtype=setting.dtype, device=setting.device)
    view = BlockView(model.train())
    for layer in view.layers:
        layer.weight[torch.rand(layer.weight.shape, device=view.device) < setting.sparsity] = 0
    return view


def table(costs: dict[str, Cost], batch: int, tokens: int) -> str:
    """A line for each kind: seconds and GiB, and how many times the reference's."""
    reference, lines = costs[REFERENCE], [f"{batch} x {tokens} tokens"]
    for kind, cost in costs.items():
        time_ratio = cost.median / reference.median
        memory = (
            f"{cost.peak / 2**30:8.2f} GiB {cost.peak / reference.peak:6.3f}x" if reference.peak else "  (not on a CPU)"
        )
        lines.append(f"  {kind:<14}{cost.median * 1e3:10.1f} ms {time_ratio:6.3f}x {memory}")
    return "\n".join(lines)


def summary(costs: dict[str, Cost], batch: int) -> dict[str, Any]:
    """JSON-ready: figures of each kind, and whether ours stays within what we allow ourselves."""
    reference, masked = costs[REFERENCE], costs["masked"]
    time_ratio = masked.median / reference.median
    memory_ratio = masked.peak / reference.peak if reference.peak else None
    return {
        "batch": batch,
        "kinds": {
            kind: {"seconds": cost.seconds, "median": cost.median, "peak": cost.peak} for kind, cost in costs.items()
        },
        "time_ratio": time_ratio,
        "memory_ratio": memory_ratio,
        "within": time_ratio <= TIME and (memory_ratio is None or memory_ratio <= MEMORY),
    }


def understood() -> Setting:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shape/llama2-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", help="bfloat16 on an accelerator, float32 on a CPU")
    parser.add_argument("--tokens", type=int, default=1024, help="in a sample")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rank-max", type=int, default=16, help="components that ours stores")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--warmup", type=int, default=3, help="steps before those that count, in every round")
    parser.add_argument("--steps", type=int, default=5, help="that count, in every round")
    parser.add_argument("--rounds", type=int, default=2)
    given = vars(parser.parse_args())
    given["dtype"] = given["dtype"] or ("float32" if given["device"] == "cpu" else "bfloat16")
    return Setting(**given)


def main() -> None:
    """Measure every batch size and print."""
    setting = understood()
    if not HAS_PEFT:
        print("peft is not installed: the reference is a minimal LoRA of this file")
    view, results = prepared(setting), []
    name = torch.cuda.get_device_name(view.device) if view.device.type == "cuda" else "CPU"
    print("effective weights:", "one Triton kernel" if has_kernel(view.device) else "torch, several passes")
    ranks = f"rank {setting.rank} of {setting.rank_max}"
    print(f"{setting.model}, {setting.dtype}, {name}, {ranks}, dropout {setting.dropout}")
    for batch in setting.batch:
        costs = measure(view, setting, batch)
        print(table(costs, batch, setting.tokens), flush=True)
        results.append(summary(costs, batch))
    print(json.dumps({"device": name, "reference": REFERENCE, "setting": asdict(setting), "results": results}))


if __name__ == "__main__":
    main()
