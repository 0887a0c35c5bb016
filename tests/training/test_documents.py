"""Documents become sequences: every token once, in bounded memory, the same on every reading."""

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankonce.errors import DataError
from rankonce.prompts.encoding import TextEncoder
from rankonce.training import documents
from rankonce.training.documents import (
    Corpus,
    Document,
    cut_document,
    mix_corpora,
    read_json_texts,
    read_parquet_texts,
    read_text_file,
    tokenize_documents,
)
from rankonce.training.steps import cut_into_steps, shuffle_stream


def write_json(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def corpus(name: str, count: int, weight: float = 1.0) -> Corpus:
    def read(_: int) -> Iterator[Document]:
        for number in range(count):
            yield Document(text=f"{name} {number}", place=(number + 1) / count, where=name)

    return Corpus(files=(), description="", read=read, weight=weight)


@pytest.mark.parametrize("length", [2, 3, 6, 7, 8, 63])
@pytest.mark.parametrize("max_tokens", [2, 7, 500])
def test_every_token_of_a_document_is_learnt_exactly_once(length: int, max_tokens: int) -> None:
    ids = tuple(range(100, 100 + length))
    pieces = list(cut_document(ids, max_tokens=max_tokens))
    assert all(len(piece.token_ids) <= max_tokens for piece in pieces)
    learnt = [
        i for one in pieces for i, flag in zip(one.token_ids, one.learnt, strict=True) if flag
    ]
    assert learnt == list(ids[1:])
    # A piece opens with the token before its first learnt one.
    assert [one.token_ids[0] for one in pieces] == [ids[0], *(p.token_ids[-1] for p in pieces[:-1])]


def test_a_document_begins_and_ends_with_special_tokens_and_holds_none(tokenizer: Any) -> None:
    texts = ["Film: {title}", "<s> Film </s><|im_end|> é 🎬", "Yes"]
    encoder = TextEncoder(tokenizer)
    for text, ids in zip(texts, encoder.encode_documents(texts), strict=True):
        special = {i for i, token in tokenizer.added_tokens_decoder.items()}
        # This tokenizer puts no token before a text: the end of another stands there.
        assert (ids[0], ids[-1]) == (tokenizer.eos_token_id, tokenizer.eos_token_id)
        assert special.isdisjoint(ids[1:-1])
        assert tokenizer.decode(ids[1:-1]) == text


def test_a_paragraph_of_a_text_file_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes("\n\nOne\r\nline two\u2028still\n \n\nTwo\n\n\nThree".encode())
    found = list(read_text_file(path))
    assert [document.text for document in found] == ["One\nline two\u2028still", "Two", "Three"]
    assert [document.where for document in found] == [f"{path}: line {n}" for n in (3, 7, 10)]
    assert [document.place for document in found][-1] == 1.0


def test_a_paragraph_without_end_is_cut_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_MAX_CHARACTERS", 10)
    path = tmp_path / "notes.txt"
    path.write_text("é" * 25 + "\nabc\ndefghij\nk\n")
    texts = [document.text for document in read_text_file(path)]
    assert texts == ["é" * 10, "é" * 10, "é" * 5 + "\nabc", "defghij\nk"]


def test_json_lines_and_parquet_give_the_same_texts(tmp_path: Path) -> None:
    texts: list[Any] = ["a\nb", "é", " ", "c"]
    lines = write_json(tmp_path / "texts.jsonl", texts)
    pq.write_table(pa.table({"id": range(5), "text": [*texts, None]}), tmp_path / "texts.parquet")
    found = [list(read_json_texts(lines)), list(read_parquet_texts(tmp_path / "texts.parquet"))]
    assert [[one.text for one in part] for part in found] == [["a\nb", "é", "c"]] * 2
    assert [one.place for one in found[0]][-1] == 1.0
    assert [one.place for one in found[1]] == [1 / 5, 2 / 5, 4 / 5]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "is not JSON"),
        ("[]", "should be an object with a text"),
        ('{"text": 3}', "should be an object with a text"),
        ('{"task": "movie-like"}', "should be an object with a text"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=fault) as caught:
        list(read_json_texts(path))
    assert str(caught.value).startswith(f"{path}: line 3: ")


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"good\n\n\xff\xfe")
    with pytest.raises(DataError, match=r"notes\.txt: behind line 0: is not UTF-8"):
        list(read_text_file(path))


def test_corpora_are_spread_evenly_whatever_their_sizes() -> None:
    found = [one.text for one in mix_corpora([corpus("big", 90), corpus("small", 9)], seed=0)]
    places = [place for place, text in enumerate(found) if text.startswith("small")]
    assert places == [10 + 11 * number for number in range(9)]
    assert len(found) == 99


def test_a_weight_is_how_often_a_corpus_is_read() -> None:
    parts = [corpus("a", 400, weight=2.5), corpus("b", 40)]
    found = [one.text for one in mix_corpora(parts, seed=0)]
    counts = Counter(text for text in found if text.startswith("a"))
    assert set(counts.values()) == {2, 3}
    assert sum(counts.values()) == pytest.approx(1000, abs=40)
    assert [text for text in found if text.startswith("b")] == [f"b {n}" for n in range(40)]
    assert found == [one.text for one in mix_corpora(parts, seed=0)]
    assert found != [one.text for one in mix_corpora(parts, seed=1)]


def test_a_stream_reads_no_further_than_its_buffers_reach(tokenizer: Any) -> None:
    num_read = 0

    def read(_: int) -> Iterator[Document]:
        nonlocal num_read
        for number in range(100_000):
            num_read += 1
            yield Document(text=f"Film {number}", place=number / 100_000, where="")

    part = Corpus(files=(), description="", read=read)
    units = tokenize_documents(
        mix_corpora([part], seed=0), TextEncoder(tokenizer), max_tokens_per_document=64
    )
    stream = shuffle_stream(units, buffer_size=100, seed=0)
    steps = islice(cut_into_steps(stream, targets_per_step=50), 9)
    num_units = sum(map(len, steps))
    assert num_units > 20
    assert num_read <= num_units + 100 + 2 * 64


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_file_larger_than_the_memory_it_takes_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"texts.{kind}"
    texts = [f"{number} " + "Solaris and Stalker. " * 50 for number in range(20_000)]
    if kind == "txt":
        path.write_text("\n\n".join(texts))
    elif kind == "jsonl":
        write_json(path, texts)
    else:
        pq.write_table(pa.table({"text": texts}), path, compression=None)
    assert path.stat().st_size > 20_000_000
    del texts
    reader = {"txt": read_text_file, "jsonl": read_json_texts, "parquet": read_parquet_texts}[kind]
    tables_before = pa.total_allocated_bytes()
    num_documents = most_in_tables = 0
    tracemalloc.start()
    for _ in reader(path):
        num_documents += 1
        most_in_tables = max(most_in_tables, pa.total_allocated_bytes() - tables_before)
    _, most_in_python = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_documents == 20_000
    # 1024 rows of a table of 20 MB are 1 MB, as tables and as texts.
    assert most_in_python < 4_000_000
    assert most_in_tables < 8_000_000
