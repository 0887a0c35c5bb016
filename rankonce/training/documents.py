"""Texts become units of pretraining: read as streams, mixed, tokenised in batches, cut to length.

Only what one batch takes is in memory, however large the files are. A reading is a function of the
files and a seed, so that a run that was stopped reads the same texts again and goes on behind them.
"""

import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq

from rankonce.errors import DataError, RequestError
from rankonce.prompts.encoding import TextEncoder
from rankonce.training.sequences import TokenSequence

# Texts that are tokenised together.
_TEXTS_PER_BATCH = 64
_ROWS_PER_BATCH = 1024
_BYTES_PER_READ = 1 << 16
# Where a paragraph of a text file ends at the latest.
_MAX_CHARACTERS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text.

    Attributes:
        place: the part of its corpus that is read up to it, 0 to 1; never falls.
        where: file and line, for errors.
    """

    text: str
    place: float
    where: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Texts that can be read again and again, in the same order.

    Attributes:
        files: what is read.
        description: what the files were taken for.
        read: gives the documents; the seed chooses wordings where texts are made of rows.
        weight: times that it is read in an epoch; of 0.5 a random half is read.
    """

    files: tuple[Path, ...]
    description: str
    read: Callable[[int], Iterator[Document]]
    weight: float = 1.0


def read_text_file(path: Path) -> Iterator[Document]:
    """Read plain text in UTF-8; a blank line ends a document.

    Line breaks within a document stay. One of more than a million characters is cut after a line.

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    size = max(1, path.stat().st_size)
    lines: list[str] = []
    characters = done = first = number = 0
    try:
        with path.open(encoding="utf-8") as file:
            while line := file.readline(_MAX_CHARACTERS):
                number += 1
                done += len(line.encode())
                if line.strip():
                    first = first if lines else number
                    lines.append(line.rstrip("\n"))
                    characters += len(line)
                if lines and (not line.strip() or characters >= _MAX_CHARACTERS):
                    text = "\n".join(lines)
                    yield _document(text, min(1.0, done / size), f"{path}: line {first}")
                    lines, characters = [], 0
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: behind line {number}: is not UTF-8: {error.reason}") from error
    if lines:
        yield _document("\n".join(lines), 1.0, f"{path}: line {first}")


def read_json_texts(path: Path) -> Iterator[Document]:
    """Read JSON lines with a ``text`` each; blank texts are left out.

    Raises:
        DataError: names the file, the line and what is wrong.
    """
    size = max(1, path.stat().st_size)
    done = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            done += len(raw)
            if not raw.strip():
                continue
            where = f"{path}: line {number}"
            try:
                record = json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: is not JSON: {error}") from error
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(f'{where}: should be an object with a text, as {{"text": "…"}}')
            if text.strip():
                yield _document(text, done / size, where)


def read_parquet_texts(path: Path) -> Iterator[Document]:
    """Read the column ``text`` of a Parquet file; blank texts are left out."""
    num_rows = pq.read_metadata(path).num_rows
    for row, (text,) in enumerate(read_parquet_rows(path, ["text"]), start=1):
        if text and text.strip():
            yield _document(text, row / num_rows, f"{path}: row {row}")


def read_parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Read the rows of some columns, batch by batch."""
    # By default the columns are read whole before the first batch comes.
    with pq.ParquetFile(path, buffer_size=_BYTES_PER_READ, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=list(columns)):
            yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def _document(text: str, place: float, where: str) -> Document:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: text holds half of a surrogate pair") from error
    return Document(text=text, place=place, where=where)


def mix_corpora(corpora: Sequence[Corpus], *, seed: int) -> Iterator[Document]:
    """Read corpora side by side, each spread evenly over the whole and as often as it weighs.

    The next document comes from the corpus of which the least is read, so that a small corpus
    neither comes first nor is used up early, whatever the lengths.
    """
    streams = [
        _read_weighted(corpus, Random(f"{seed} {number}")) for number, corpus in enumerate(corpora)
    ]
    return heapq.merge(*streams, key=lambda document: document.place)


def _read_weighted(corpus: Corpus, random: Random) -> Iterator[Document]:
    whole, share = int(corpus.weight), corpus.weight % 1
    for turn in range(whole + (share > 0)):
        documents = corpus.read(random.getrandbits(32))
        part = 1.0 if turn < whole else share
        for document in documents:
            if part == 1 or random.random() < part:
                place = (turn + document.place * part) / corpus.weight
                yield replace(document, place=place)


def tokenize_documents(
    documents: Iterable[Document], encoder: TextEncoder, *, max_tokens_per_document: int
) -> Iterator[TokenSequence]:
    """Tokenise documents, a batch at a time, and cut them to length.

    Raises:
        DataError: names the document that would become a special token.
    """
    stream = iter(documents)
    while batch := list(islice(stream, _TEXTS_PER_BATCH)):
        try:
            encoded = encoder.encode_documents([document.text for document in batch])
        except RequestError as error:
            raise DataError(f"{_first_refused(batch, encoder)}: {error}") from error
        for ids in encoded:
            yield from cut_document(ids, max_tokens=max_tokens_per_document)


def cut_document(ids: Sequence[int], *, max_tokens: int) -> Iterator[TokenSequence]:
    """Cut a document into sequences of at most ``max_tokens``; nothing is dropped.

    Pieces overlap in one token: the last of a piece, learnt there, opens the next one and is not
    learnt again. So every token but the document's first is learnt exactly once.
    """
    for start in range(0, len(ids) - 1, max_tokens - 1):
        piece = tuple(ids[start : start + max_tokens])
        yield TokenSequence(token_ids=piece, learnt=(False, *[True] * (len(piece) - 1)))


def _first_refused(documents: Iterable[Document], encoder: TextEncoder) -> str:
    for document in documents:
        try:
            encoder.encode_documents([document.text])
        except RequestError:
            return document.where
    return "text"
