"""What people type and hand over by mistake: one paragraph with a fix that fits, never a traceback."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sparsify.commands import cli, export, plan, sweep
from sparsify.errors import UsageError
from sparsify.report import __main__ as report
from sparsify.runs import registry

OWN = ["model={inputs}/model", *(f"data@{p}.text=file" for p in ("calibration", "heldout", "test"))]
TEXTS = [*OWN, *(f"{p}.text.path={{inputs}}/long.txt" for p in ("calibration", "heldout", "test")), "test.stride=1"]


def text(path):
    return [*TEXTS, f"calibration.text.path={path}"]


TYPED = {
    # sparsity and pattern
    "sparsity=nan": "0.7",
    "sparsity=1.0": "0 <= sparsity < 1",
    "sparsity=-0.1": "0 <= sparsity < 1",
    "sparsity=50": "sparsity=0.5",
    "sparsity=abc": "sparsity=0.7",
    "sparsity=false": "sparsity=0.7",
    "sparsity=true": "sparsity=0.7",
    "sparsity=null": "sparsity=",
    "sparsity=[0.5]": "sparsity=0.7",
    "sparsity=": "''",
    "sparsity=1e300": "sparsity=0.7",
    "pattern=3:2": "pattern=2:4",
    "pattern=2:4 sparsity=0.7": "sparsity=0.5",
    "pattern=mixed:1": "M >= 2|2 <= M",
    "pattern=mixed:abc": "mixed:M",
    "pattern=0:4": "1 <= N",
    "pattern='2:4:8'": "N:M",
    "pattern=null": "pattern=unstructured",
    "pattern=2.4": "pattern=2:4",
    "pattern=9999:99999999999": "65536",
    "pattern=2:4 sparsity=null allocator=owl": "allocator=uniform",
    # plain values
    "seed=-1": "0 to 4294967295",
    "seed=1180591620717411303424": "seed=4294967295",
    "seed=1.5": "whole number",
    "seed=abc": "whole number",
    "seed=null": "whole number",
    "seed=true": "whole number",
    "batch_size=0": "batch_size=1",
    "batch_size=1.5": "or null",
    "device=cpuu": "device=auto",
    "device=null": "device=auto",
    "device=cuda:99": "device=auto",
    "device=5": "device=auto",
    "device=meta": "device=auto",
    "dtype=float8": "dtype=float32",
    "dtype=[float32]": "dtype=float32",
    "dtype=null": "float16",
    "results=": "results=",
    "results=''": "results=",
    "results=null": "results=<folder>",
    "keep=maybe": "keep=true",
    "part=5": "part=null",
    "part=nothing": "leave part out",
    "sweep=null": "leave sweep out",
    "sweep.of=abc": "leave sweep out",
    # windows
    "calibration.windows=0": "windows >= 1",
    "calibration.windows=-1": "windows >= 1",
    "calibration.windows=1.5": "whole number",
    "calibration.windows=1e8": "calibration.windows=100000000",
    "calibration.windows=100000000000": "at most",
    "calibration.windows=null": "windows=128",
    "calibration.seqlen=1": "seqlen >= 2",
    "calibration.seqlen=abc": "whole number",
    "calibration.seqlen=10000000000000": "shorter seqlen",
    "test.stride=0": "stride >= 1",
    "test.stride=1e3": "test.stride=1000",
    "test.offset=-1": "0 <= offset",
    "test.sampler=documents": "test.sampler=document",
    "test.bos=maybe": "test.bos=auto",
    "test.bos=1": "true or false",
    "test=null": "leave test out",
    "calibration=abc": "calibration.windows",
    # names
    "model=null": "model=<name>",
    "pruner=null": "wanda",
    "pruner=5": "wanda",
    "pruner={wanda: 1}": "pruner=<name>",
    "pruner=''": "wanda",
    "pruner=wnada": "pruner=wanda",
    "prunner=wanda": "did you mean pruner",
    "pruner.grup=row": "pruner.group",
    "pruner.group=rwo": "pruner.group=row",
    "pruner.version=7": "leave pruner.version out",
    "allocator=owll": "allocator=owl",
    "allocator=owl allocator.lamm=0.1": "allocator.lam",
    "allocator.qqq=1": "configs/",
    "scale=huge": "embedded, paper",
    "scale=null": "embedded",
    "eval=perplexityy": "eval=perplexity",
    "experiment=nothing": "atp/",
    "recovery=abc": "recovery",
    "data@calibration.text=c5": "c4",
    "data@calibration.text=null": "sotu",
    "data@nothing=c4": "every place",
    "hydra/launcher=nothing": "launcher",
    "sparsty=0.5": "did you mean sparsity",
    "model.config={a: 1}": "model.config.a",
    "model.config=5": "a mapping",
    "model.config.model_type=nothing": "configs/model/shape",
    "model.config.hidden_size=abc": "configs/model/shape",
    # evaluations
    "eval=zeroshot": "eval=perplexity",
    "eval=zeroshot eval.tasks=[boolqq]": "did you mean boolq",
    "eval=zeroshot eval.tasks=5": "eval.tasks=[boolq,rte]",
    "eval=zeroshot eval.tasks={boolq: 1}": "eval.tasks",
    "eval.tasks=boolq": "eval=zeroshot",
    "eval=zeroshot eval.limit=0": ">= 1",
    "eval=zeroshot eval.limit=-1": ">= 1",
    "eval=zeroshot eval.limit=1.5": "whole number",
    "eval=zeroshot eval.harness.shots=-1": ">= 0",
    "eval=zeroshot eval.harness.shots=3": "Allowed: 0",
    "eval=zeroshot eval.shots=3": "eval.harness.shots",
    "eval=zeroshot eval.harness=null": "leave eval.harness",
    "eval.test=5": "leave eval.test",
    # components
    "allocator=atp allocator.step=1e-9": "at most 10000",
    "allocator=atp allocator.beta=0.9": "-0.333",
    "allocator=search allocator.trials=100000000000": "trials=1000000",
    "allocator=absorption allocator.inner=owl": "chosen by name",
    "allocator=absorption allocator.seeds=1000000000": "seeds=10000",
    "allocator=blend allocator.parts=null": "a mapping",
    "allocator=blend allocator.weights=[1,2]": "auto",
    "allocator=from_file": "allocator.file=<value>",
    "allocator=from_file allocator.file=/nothing.json": "existing file",
    "pruner=sparsegpt pruner.damp=nan": "finite",
    "pruner=ria pruner.a=-1": "pruner.a=0.5",
    # quantising
    "quantiser=gptqq": "quantiser=gptq",
    "quantiser=gptq quantiser.bits=5": "2, 3, 4, 8",
    "quantiser=gptq quantiser.bits=3.5": "atp_relative",
    "quantiser=gptq quantiser.bits=12": "2 to 8",
    "quantiser=gptq quantiser.bits=four": "quantiser.bits=4",
    "quantiser=gptq quantiser.group=0": "or null",
    "quantiser=gptq quantiser.group=64.0": "quantiser.group=64",
    "quantiser=gptq quantiser.damp=0": "damp > 0",
    "quantiser=gptq quantiser.order=activation": "activations",
    "quantiser=gptq quantiser.allocator=atp": "chosen by name",
    "quantiser=rtn quantiser.damp=0.1": "quantiser",
    "method=joint": "pruner=sparsegpt",
    "method=joint pruner=sparsegpt quantiser=rtn": "quantiser=null",
    "method=joint pruner=sparsegpt pattern=2:4 sparsity=null method.group=6": "method.group=4",
    # the grammar
    "sparsity==0.5": "sparsity=0.5",
    "sparsity=[0.5": "bracket",
    "sparsity=(0.5": "bracket",
    "sparsity='0.5": "quote",
    "=": "key=value",
    "+": "key=value",
    "~": "key=value",
    "~nothing": "leave it out",
    "~sparsity": "sparsity must be given",
    "~pruner": "pruner=wanda",
    "sparsity": "sparsity=<value>",
    "wanda": "pruner=wanda",
    "--sparsity=0.5": "no dashes: sparsity=0.5",
    "-x": "no dashes",
    "+sparsity=0.6": "leave the + out",
    "pruner=wanda,magnitude": "add -m",
    "experiment=atp/beta_curve": "-m experiment=atp/beta_curve",
    # sweeps
    "-m sparsity=": "0 <= sparsity",
    "-m sparsity=choice()": "bracket",
    "-m sparsity=range(0.5,0.5)": "no cells",
    "pruner=wnada,wanda -m": "pruner=wanda",
    "-m experiment=nothing": "atp/",
    "-m seed=0,abc sparsity=0.5": "whole number",
    # models
    "model={x}/nothing": "model=./folder",
    "model={x}/file.txt": "model=./folder",
    "model={x}/empty": "config.json",
    "model={x}/config_only": "folder's files are whole|weights",
    "model={x}/pointer": "git lfs",
    "model={x}/truncated": "whole",
    "model={x}/encoder": "decoder",
    "model={x}/encoder_decoder": "decoder",
    "model={x}/quantised": "quantise after",
    "model=smollm2-135m,org/name": "one sweep each|add -m",
    "model=nobody/nothing": "spelling",
}

TEXT_FILES = {
    "missing.txt": "existing file",
    "empty.txt": "empty",
    "short.txt": "joined sampler",
    "latin.txt": "iconv",
    "binary.txt": "UTF-8",
    "column.jsonl": "text.columns",
    "object.json": "text.columns|one row a line",
    "broken.jsonl": "one row a line",
    "numbers.jsonl": "strings",
    "rows.parquet": "text.columns",
    "no.parquet": "download",
    "no.txt.gz": "download",
    "folder": "/*.txt",
    "pointer.txt": "git lfs pull",
}


COMMANDS = {
    "plan table=tabel1": "table=table1",
    "plan table=": "table1",
    "plan table=../x": "table1",
    "plan sparsity=abc": "sparsity=0.7",
    "plan qqq=1": "--cfg job",
    "plan -m sparsity=0.5": "leave it out",
    "plan --nothing": "no dashes",
    "plan wanda": "pruner=wanda",
    "plan scale=huge": "embedded",
    "plan pruner=null": "wanda",
    "plan results=": "results=<folder>",
    "plan results={x}/file.txt": "results=<folder>",
    "plan sparsity=[0.5": "bracket",
    "plan seed=0,abc": "whole number",
    "plan sparsity=range(0.5,0.5)": "sparsity=0.5,0.6",
    "sweep table=tabel1": "table=table1",
    "sweep sparsity=abc": "sparsity=0.7",
    "sweep -m sparsity=0.5": "leave it out",
    "sweep sparsity=range(0.5,0.5)": "sparsity=0.5,0.6",
    "sweep model=shape/tiny allocator=atp allocator.beta=0.9": "within the bounds",
    "report": "table=table1",
    "report table=tabel1": "table=table1",
    "report table=table1 results={x}/none": "make table1",
    "report table=table1 rows={x}/none.csv": "none.csv",
    "report table=table1 rows={x}/file.txt": "lack columns",
    "report table=table1 --nothing": "no dashes",
    "export": "sparsify.export <key> --to <folder>",
    "export abc": "--to <folder>",
    "export abc --to": "--to <folder>",
    "export abc --nothing x": "--to <folder>",
    "export abc --to {x}/out --results {x}/none": "keep=true",
    "export ../.. --to {x}/out --results {x}/none": "keep=true",
}


@pytest.fixture(scope="module")
def x(tmp_path_factory, inputs, make_model):
    """Folders that are no models, and files that are no texts."""
    import pandas
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    root = tmp_path_factory.mktemp("x")
    (root / "file.txt").write_text("no model")
    (root / "empty").mkdir()
    (root / "folder").mkdir()
    for name in ("config_only", "pointer", "truncated", "quantised"):
        make_model().save_pretrained(root / name)
    (root / "config_only/model.safetensors").unlink()
    (root / "pointer/model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    whole = (root / "truncated/model.safetensors").read_bytes()
    (root / "truncated/model.safetensors").write_bytes(whole[: len(whole) // 2])
    config = json.loads((root / "quantised/config.json").read_text())
    (root / "quantised/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    small = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**small, intermediate_size=16, initializer_range=0.5)).save_pretrained(root / "encoder")
    shape = T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(shape).save_pretrained(root / "encoder_decoder")
    (root / "empty.txt").write_text(" \n")
    (root / "short.txt").write_text("a b " * 10)
    (root / "latin.txt").write_bytes("a é b ".encode("latin-1") * 100)
    (root / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (root / "column.jsonl").write_text('{"body": "a b"}\n' * 50)
    (root / "object.json").write_text('{"body": "a b"}')
    (root / "broken.jsonl").write_text('{"text": "a b"\n')
    (root / "numbers.jsonl").write_text('{"text": 5}\n' * 50)
    pandas.DataFrame({"body": ["a b"] * 50}).to_parquet(root / "rows.parquet")
    (root / "no.parquet").write_text("no")
    (root / "no.txt.gz").write_text("no")
    (root / "pointer.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    return root


@pytest.fixture
def refused(tiny, results, capsys, inputs, x, monkeypatch, tmp_path):
    """Run a command that must be refused in one paragraph with these words."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("SPARSIFY_DATA", raising=False)

    def run(command, arguments, words):
        capsys.readouterr()
        code = command([place(argument, x, inputs) for argument in arguments])
        err = capsys.readouterr().err
        assert code in (1, 2)
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Unexpected" not in err
        assert any(word in err for word in words.split("|")), err

    return run


def place(argument, x, inputs):
    return argument.replace("{x}", str(x)).replace("{inputs}", str(inputs))


def spaced(line):
    """Split at spaces outside braces."""
    return re.findall(r"(?:\{[^}]*\}|\S)+", line)


@pytest.mark.parametrize("line", TYPED)
def test_what_is_typed_by_mistake_is_one_paragraph(refused, tiny, results, line):
    refused(cli.main, [*tiny, f"results={results}", *spaced(line)], TYPED[line])


@pytest.mark.parametrize("name", TEXT_FILES)
def test_a_text_that_is_none_is_one_paragraph(refused, tiny, results, name):
    refused(cli.main, [*tiny, f"results={results}", *text(f"{{x}}/{name}")], TEXT_FILES[name])


@pytest.mark.parametrize("line", COMMANDS)
def test_other_commands_refuse_in_one_paragraph(refused, line):
    name, *arguments = spaced(line)
    refused({"plan": plan, "sweep": sweep, "report": report, "export": export}[name].main, arguments, COMMANDS[line])


def senseless(default):
    """Values that a field with this default cannot have, whatever it means."""
    of_any = [{"a": 1}, [{"a": 1}], [math.nan]]
    if isinstance(default, bool):
        return [*of_any, "abc", "", 1, 0.5, None, math.nan]
    if isinstance(default, int):
        return [*of_any, "abc", "", 1.5, True, math.nan, math.inf, 1e300, 10**30, -(10**30), -1]
    if isinstance(default, float):
        return [*of_any, "abc", "", True, None, math.nan, math.inf, -math.inf, 10**400]
    if isinstance(default, str):
        return [*of_any, True]
    return [math.nan, True, 5, "abc"]


FIELDS = {
    f"{group}/{name}.{key}": (group, name, str(key), value)
    for group in registry.COMPONENTS
    for name in registry.names(group)
    for key, value in OmegaConf.to_container(registry.composed(group, name), resolve=True).items()
    if not str(key).startswith("_") and key != "version" and value is not None
}


@pytest.mark.parametrize("field", FIELDS)
def test_no_field_takes_a_value_of_another_kind(field):
    group, name, key, default = FIELDS[field]
    for value in senseless(default):
        given = {"file": "x.json", key: value} if name == "from_file" else {key: value}
        with pytest.raises(UsageError) as error:
            registry.build(group, (name, given))
        assert key in str(error.value)
        assert "\n" not in str(error.value)
        assert "does not fit" not in str(error.value)


def test_there_are_enough_rows():
    assert len(FIELDS) > 50
    assert len(TYPED) + len(TEXT_FILES) + len(COMMANDS) >= 150


def test_calls_of_the_library_refuse_in_one_error():
    """In a process of its own: here every call is checked against its annotations first."""
    script = Path(__file__).with_name("library_inputs.py")
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr
