"""The command line as people type it."""

import pytest

from sparsify.commands import cli
from sparsify.commands.overrides import understood
from sparsify.errors import UsageError
from sparsify.runs import identity, menu, registry


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("calibration.text.path=my.txt", "calibration.text.path=my.txt"),
        ("calibration.text.path=lang=en.txt", "calibration.text.path='lang=en.txt'"),
        ("test.text.path=c4 (1) #2.txt", "test.text.path='c4 (1) #2.txt'"),
        ("test.text.path=größe.txt", "test.text.path='größe.txt'"),
        ("test.text.path='quoted [x].txt'", "test.text.path='quoted [x].txt'"),
        ("test.text.path=a.txt,b c.txt", "test.text.path=a.txt,'b c.txt'"),
        ("allocator.file=o'brien.json", r"allocator.file='o\'brien.json'"),
        ("results=my results", "results='my results'"),
        ("sparsity=0.5,0.7", "sparsity=0.5,0.7"),
    ],
)
def test_paths_need_no_quotes(typed, read):
    assert understood([typed]) == [read]


def test_a_file_with_a_comma_is_one_file(tmp_path):
    file = tmp_path / "a,b.txt"
    file.write_text("text")
    assert understood([f"test.text.path={file}"]) == [f"test.text.path='{file}'"]


def test_folders_and_ids_are_models_one_or_many(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "o'brien").mkdir()
    assert understood(["model=org/name"]) == ["model=hub", "model.id='org/name'"]
    _, ids = understood([f"model={tmp_path}/one,{tmp_path}/o'brien,org/name"])
    config = menu.compose(["model=hub", f"model.id='{tmp_path}/one'"])
    assert ids.count(",") == 2
    assert config["model"]["name"] == "one"
    assert menu.compose(["model=hub", "model.id='org/name'"])["model"]["name"] == "org/name"
    with pytest.raises(UsageError, match=r"model=smollm2-135m and model=org/name, one sweep each"):
        understood(["model=smollm2-135m,org/name"])


def test_noise_in_a_float_is_no_other_cell():
    keys = {identity.run_key(menu.compose([f"sparsity={text}"])) for text in ("0.7", "0.7000000000000001", "7e-1")}
    assert len(keys) == 1


def test_one_task_needs_no_brackets():
    one, many = (
        identity.evaluation_keys(menu.compose(["eval=zeroshot", f"eval.tasks={tasks}"])) for tasks in ("rte", "[rte]")
    )
    assert one == many


@pytest.mark.parametrize("target", ["torch.load", "os.system", "sparsify.runs.provenance.subprocess.run", "sparsify.x"])
def test_a_config_builds_components_only(target):
    with pytest.raises(UsageError, match=f"Only components.*{target}"):
        registry.make({"_target_": "sparsify.pruners.wanda.Wanda", "group": {"_target_": target}})


def test_components_of_ones_own_are_asked_for_by_a_setting(monkeypatch):
    node = {"_target_": "fractions.Fraction", "numerator": 3}
    with pytest.raises(UsageError, match="SPARSIFY_COMPONENTS"):
        registry.make(node)
    monkeypatch.setenv("SPARSIFY_COMPONENTS", "fractions")
    assert registry.make(node) == 3


@pytest.mark.parametrize(
    "argument", ["pruner=../../x", "allocator=/tmp/x", "hydra.callbacks={x: {_target_: os.system}}"]
)
def test_nothing_outside_the_menu_is_loaded(argument):
    with pytest.raises(UsageError):
        understood([argument])


def test_ctrl_c_ends_in_a_line(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "understood", stop)
    assert cli.launch([]) == 130
    assert cli.command("usage", stop, []) == 130
    assert capsys.readouterr().out.count("\n") == 2
