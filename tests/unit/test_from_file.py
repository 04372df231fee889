"""Allocations of this and of other projects, read from their files."""

import json

import numpy as np
import pytest
from fakes import FakeContext

from sparsify.allocators.base import allocate
from sparsify.allocators.from_file import FromFile, content, read
from sparsify.allocators.spectral import AlphaPruning
from sparsify.errors import DataError, UsageError

BLOCKS = [0.6, 0.7, 0.8]


@pytest.fixture
def table(blocks):
    return blocks(3)


@pytest.fixture
def names(table):
    return [layer.name for layer in table]


def planned(table, file, sparsity=0.7, **options):
    return allocate(FromFile(str(file), **options), table, sparsity, FakeContext(table)).sparsities()


def by_block(names, values=BLOCKS):
    return {name: values[i // 2] for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        ("json", lambda names: json.dumps({"layers": by_block(names), "sparsity": 0.7})),
        ("json", lambda names: json.dumps(by_block(names))),
        ("json", lambda names: json.dumps(BLOCKS)),
        ("json", lambda names: json.dumps({str(i): value for i, value in enumerate(BLOCKS)})),
        ("json", lambda names: json.dumps(list(by_block(names).values()))),
        ("txt", lambda names: "\n".join(f"{name}: {value}" for name, value in by_block(names).items())),
        ("txt", lambda names: "\n".join(map(str, BLOCKS)) + "\n"),
    ],
)
def test_sparsities_by_name_by_matrix_or_by_block(tmp_path, table, names, ending, text):
    file = tmp_path / f"allocation.{ending}"
    file.write_text(text(names))
    assert planned(table, file) == pytest.approx(by_block(names))


def test_what_is_off_by_rounding_is_moved_until_the_budget_is_met(tmp_path, table, names):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([x + 0.01 for x in BLOCKS]))
    assert planned(table, file) == pytest.approx(by_block(names))


def test_kept_shares_as_dlp_releases_them(tmp_path, table, names):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([1 - x for x in BLOCKS]))
    assert planned(table, file, values="kept") == pytest.approx(by_block(names))
    with pytest.raises(UsageError, match=r"Fix: allocator\.values=kept"):
        planned(table, file)


def test_levels_as_evopress_releases_them(tmp_path, table, names):
    """A level is a number of weights: swapping one between matrices of other sizes keeps the budget."""
    file = tmp_path / "a.txt"
    file.write_text("\n".join(f"{name}: {level}" for name, level in zip(names, [2, 0, -3, 1, 0, 0], strict=True)))
    found = planned(table, file, values="levels", level=4)
    sizes = [layer.numel for layer in table]
    expected = [0.7 + 4 * level / size for level, size in zip([2, 0, -3, 1, 0, 0], sizes, strict=True)]
    assert list(found.values()) == pytest.approx(expected)
    with pytest.raises(UsageError, match=r"allocator\.level"):
        FromFile(str(file), values="levels")


def test_exponents_as_alphapruning_releases_them(tmp_path, table, names):
    alphas = [2.0, 2.4, 3.1, 3.3, 4.0, 4.4]
    np.save(tmp_path / "alpha_peak.npy", np.array(alphas))

    class Known(FakeContext):
        def once(self, key, make, *, of_weights=False):
            return dict(zip(names, alphas, strict=True))

    ours = allocate(AlphaPruning(tau=0.2), table, 0.7, Known(table)).sparsities()
    assert planned(table, tmp_path / "alpha_peak.npy", values="alpha", tau=0.2) == pytest.approx(ours)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "[0.7, 0.7]", "2 numbers .* 3 .one a block. or 6"),
        ("a.json", '{"blocks.0.layer0": 0.7}', "1 layers"),
        ("a.json", "{", "none of the known kinds"),
        ("a.json", '["much"]', "none of the known kinds"),
        ("a.txt", "q_proj: a lot", "none of the known kinds"),
        ("a.json", "[0.2, 0.2, 0.2]", "another sparsity.*Fix: sparsity=0.2"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, table, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises((DataError, UsageError), match=words):
        planned(table, tmp_path / name)


def test_a_file_counts_by_content(tmp_path):
    for name, text in (("a.json", "[1]"), ("b.json", "[1]"), ("c.json", "[2]")):
        (tmp_path / name).write_text(text)
    hashes = [content({"file": str(tmp_path / name)}) for name in ("a.json", "b.json", "c.json")]
    assert hashes[0] == hashes[1] != hashes[2]
    with pytest.raises(DataError, match=r"allocator\.file="):
        read(str(tmp_path / "nothing.json"))
