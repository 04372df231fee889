import gzip
import json

import pyarrow
import pytest
import torch
from pyarrow import parquet

from sparsify.data.corpora import Corpus
from sparsify.data.windows import Windows, encode, hash_tokens
from sparsify.errors import DataError, UsageError


class Letters:
    """A tokenizer: a beginning-of-text 1, then one token per character."""

    bos_token_id = 1

    def __call__(self, text, verbose=True, add_special_tokens=True):
        return {"input_ids": [*([1] if add_special_tokens else []), *(ord(c) for c in text)]}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Twenty documents of 3 to 60 letters, in file order."""
    monkeypatch.setenv("SPARSIFY_DATA", str(tmp_path))
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(chr(ord("a") + i) * (3 * i + 3))
    return Corpus("letters", {"train": ["*.txt"]})


def cut(corpus, seed=0, **options):
    return Windows(corpus, "train", **options).inputs(Letters(), seed)


def test_joined_windows_tokenise_once_and_cut_in_order(corpus):
    text = "\n\n".join(chr(ord("a") + i) * (3 * i + 3) for i in range(20))
    ids = [1, *map(ord, text)]
    tokens = cut(corpus, seqlen=7).tokens
    assert tokens.tolist() == [ids[i : i + 7] for i in range(0, len(ids) - 6, 7)]
    assert cut(corpus, seqlen=7, windows=3).tokens.tolist() == tokens[:3].tolist()
    assert cut(corpus, seqlen=7, windows=3, stride=2, offset=1).tokens.tolist() == tokens[1:7:2].tolist()


def test_strides_with_different_offsets_do_not_overlap(corpus):
    even, odd = (cut(corpus, seqlen=7, stride=2, offset=offset).tokens for offset in (0, 1))
    assert len(even) + len(odd) == len(cut(corpus, seqlen=7).tokens)


def test_random_windows_of_different_parts_come_from_different_text(corpus):
    ids = cut(corpus, seqlen=2).tokens.flatten()
    one, two = (
        cut(corpus, seqlen=9, windows=n, stride=2, offset=offset, sampler="random").tokens
        for n, offset in ((40, 0), (7, 1))
    )
    assert (one.shape, two.shape) == ((40, 9), (7, 9))
    first, second = ids.tensor_split(2)
    assert all(window.tolist() in first.unfold(0, 9, 1).tolist() for window in one)
    assert not set(one.unique().tolist()) & set(second.unique().tolist()) - {10, *first.tolist()}


def test_drawn_windows_lie_inside_one_document_longer_than_the_window(corpus):
    tokens = cut(corpus, seqlen=10, windows=12, sampler="document").tokens
    assert tokens.shape == (12, 10)
    documents = [bytes([1]).decode() + text for text in corpus.texts("train")]
    for window in tokens.tolist():
        text = "".join(map(chr, window))
        assert any(text in document and len(document) > 10 for document in documents)


@pytest.mark.parametrize("sampler", ["joined", "document", "random"])
def test_the_same_seed_gives_the_same_windows(corpus, sampler):
    first, again, other = (cut(corpus, seed, seqlen=8, windows=10, sampler=sampler) for seed in (3, 3, 4))
    assert torch.equal(first.tokens, again.tokens)
    assert first.provenance == again.provenance
    assert torch.equal(first.tokens, other.tokens) == (sampler == "joined")


@pytest.mark.parametrize(
    "options",
    [
        {"seqlen": 10_000},
        {"seqlen": 10, "windows": 999},
        {"seqlen": 10, "stride": 999},
        {"seqlen": 61, "windows": 1, "sampler": "document"},
    ],
)
def test_a_text_that_is_too_short_is_refused(corpus, options):
    with pytest.raises(DataError, match="letters"):
        cut(corpus, **({"offset": 998} if "stride" in options else {}), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"seqlen": 1},
        {"windows": 0},
        {"stride": 0},
        {"offset": 1},
        {"stride": 2, "offset": 2},
        {"sampler": "document"},
        {"sampler": "random"},
    ],
)
def test_windows_that_make_no_sense_are_refused(corpus, options):
    with pytest.raises(UsageError):
        Windows(corpus, "train", **({"seqlen": 8} | options))


def test_provenance_names_text_and_tokens(corpus):
    cuts = cut(corpus, seqlen=8, windows=4)
    assert cuts.provenance["tokens_sha256"] == hash_tokens(cuts.tokens)
    assert cuts.provenance["source"] == "SPARSIFY_DATA"
    assert {"corpus": "letters", "split": "train"}.items() <= cuts.provenance.items()


def test_a_model_without_tokenizer_gets_seeded_noise(corpus):
    first, again, other = (Windows(corpus, "train", 8, 4).inputs(None, seed).tokens for seed in (0, 0, 1))
    assert first.shape == (4, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_tokenizers_first_token_is_kept():
    assert encode(Letters(), "ab").tolist() == [1, 97, 98]


@pytest.mark.parametrize(
    ("name", "split", "windows", "tag"),
    [
        ("wikitext2", "test", None, "W2@8"),
        ("letters", "test", 4, "letters@8x4"),
        ("c4", "train", 4, "c4-train@8x4"),
    ],
)
def test_the_protocol_tag_names_text_split_length_and_count(name, split, windows, tag):
    assert Windows(Corpus(name), split, 8, windows).protocol == tag


def test_different_windows_have_different_tags():
    text = Corpus("letters")
    specs = [{}, {"stride": 4}, {"stride": 4, "offset": 1}, {"sampler": "document"}, {"sampler": "random"}]
    tags = [Windows(text, "test", 8, 4, **spec).protocol for spec in specs]
    assert len(set(tags)) == len(tags)


def test_wikitext_rows_are_those_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DATA", str(tmp_path))
    (tmp_path / "wiki.test.raw").write_text(" \n = Robert = \n \n Robert is , say , a boulder . \n", newline="")
    rows = Corpus("wikitext2", {"test": ["wiki.test.raw"]}).texts("test")
    assert rows == ["", " = Robert = \n", "", " Robert is , say , a boulder . \n"]
    joined = Windows(Corpus("wikitext2", {"test": ["wiki.test.raw"]}), "test", 5).inputs(Letters(), 0).tokens
    assert "".join(map(chr, joined.flatten()[1:].tolist())).startswith("\n\n = Robert = \n\n\n\n\n Robert")


def test_the_last_line_of_a_raw_file_needs_no_newline(tmp_path):
    file = tmp_path / "a.raw"
    file.write_text(" = A = \n the end")
    assert "".join(Corpus("a", path=str(file)).texts("test")).endswith("the end\n")


@pytest.mark.parametrize("ending", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_texts_are_read_by_their_ending(tmp_path, ending):
    file = tmp_path / f"text.{ending}"
    if ending == "parquet":
        parquet.write_table(pyarrow.table({"text": ["one", "two"]}), file)
    elif ending == "txt":
        file.write_text("one")
    else:
        opener = gzip.open if ending.endswith("gz") else open
        with opener(file, "wt") as handle:
            handle.writelines(json.dumps({"text": text}) + "\n" for text in ("one", "two"))
    assert Corpus("mine", path=str(file)).texts("any") == (["one"] if ending == "txt" else ["one", "two"])


def test_your_data_comes_before_the_assets(tmp_path, monkeypatch):
    for place in ("data", "assets"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text(place)
    corpus = Corpus("a", {"test": ["a.txt"]})
    monkeypatch.setenv("SPARSIFY_ASSETS", str(tmp_path / "assets"))
    monkeypatch.delenv("SPARSIFY_DATA", raising=False)
    assert corpus.texts("test") == ["assets"]
    monkeypatch.setenv("SPARSIFY_DATA", str(tmp_path / "data"))
    assert corpus.texts("test") == ["data"]
    assert corpus.fingerprint("test")["source"] == "SPARSIFY_DATA"


def test_a_missing_text_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DATA", str(tmp_path))
    monkeypatch.setenv("SPARSIFY_ASSETS", str(tmp_path))
    with pytest.raises(DataError, match=r"SPARSIFY_DATA.*assets.*hub.*make setup"):
        Corpus("a", {"test": ["a.txt"]}).texts("test")


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_an_empty_text_is_refused(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match="empty"):
        Corpus("a", path=str(tmp_path / "a.txt")).texts("test")


def test_columns_of_a_row_make_a_document(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"ask": "why", "more": "", "answer": "so"}\n{"ask": "b", "more": "c", "answer": "d"}\n'
    )
    corpus = Corpus("rows", path=str(tmp_path / "rows.jsonl"), columns=("ask", "more", "answer"))
    assert corpus.texts("train") == ["why\nso", "b\nc\nd"]


@pytest.mark.parametrize("sampler", ["joined", "document", "random"])
def test_every_window_or_none_begins_with_bos(corpus, sampler):
    size = {"seqlen": 8, "windows": 4, "sampler": sampler}
    every, none, own = (cut(corpus, bos=bos, **size) for bos in (True, False, "auto"))
    assert (every.tokens[:, 0] == 1).all()
    assert every.tokens.shape == none.tokens.shape == own.tokens.shape == (4, 8)
    assert not (every.tokens[:, 1:] == 1).any()
    assert not (none.tokens == 1).any()
    assert every.provenance["bos"] is True
    tags = [Windows(corpus, "train", bos=bos, **size).protocol for bos in ("auto", True, False)]
    assert [tag.removeprefix(tags[0]) for tag in tags] == ["", "+bos", "-bos"]
