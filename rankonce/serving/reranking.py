"""Documents and answers of rerank questions, in the words of whoever asks.

The words of a question say whose client it is, and the answer has that client's form:
``documents`` Cohere and Jina, with ``top_k`` or ``truncation`` Voyage, with ``instruct`` SGLang,
``input`` Mixedbread, ``texts`` Text Embeddings Inference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rankonce.errors import RequestError
from rankonce.prompts.tasks import Task
from rankonce.records import Item, ScoreResult
from rankonce.serving.prompts import PromptReader
from rankonce.serving.rerank_shapes import (
    AnyRerankAnswer,
    Document,
    DocumentPart,
    MixedbreadAnswer,
    MixedbreadDocument,
    RerankAnswer,
    RerankBody,
    RerankedDocument,
    RerankUsage,
    SglangDocument,
    TeiDocument,
    VoyageAnswer,
    VoyageDocument,
)


@dataclass(frozen=True, kw_only=True)
class ReadDocuments:
    """The documents of a question as candidates.

    Attributes:
        cut: places of those that were longer than ``max_tokens_per_doc``.
    """

    candidates: tuple[Item, ...]
    cut: tuple[int, ...]

    def warnings(self, body: RerankBody) -> list[str]:
        """Say which documents were cut."""
        if not self.cut:
            return []
        places = ", ".join(map(str, self.cut))
        return [
            f"{body.documents_field}: read up to max_tokens_per_doc, {body.max_tokens_per_doc} "
            f"tokens; longer were {places}"
        ]


def read_documents(body: RerankBody, reader: PromptReader) -> ReadDocuments:
    """Make candidates of documents.

    Raises:
        RequestError: names the document that has no text, or a field of another type.
    """
    candidates, cut = [], []
    for index, document in enumerate(body.documents):
        fields = _fields(document, body, f"{body.documents_field}[{index}]")
        if body.max_tokens_per_doc is not None:
            text = reader.cut(fields["text"], body.max_tokens_per_doc)
            if text != fields["text"]:
                cut.append(index)
            fields["text"] = text
        candidates.append(Item(fields=fields))
    return ReadDocuments(candidates=tuple(candidates), cut=tuple(cut))


def write_rerank(
    body: RerankBody,
    documents: ReadDocuments,
    result: ScoreResult,
    task: Task,
    *,
    model: str,
) -> AnyRerankAnswer:
    """Write an answer in the form of the question.

    Args:
        model: the name of what scored.
    """
    places = sorted(range(len(documents.candidates)), key=lambda i: result.candidates[i].rank)
    places = places[: body.top_n]
    scores = {index: relevance(task, result.candidates[index].value) for index in places}
    texts = {index: str(documents.candidates[index].fields["text"]) for index in places}
    returned = body.return_documents
    usage = RerankUsage(
        prompt_tokens=result.usage.prompt_tokens, total_tokens=result.usage.prompt_tokens
    )
    notes = [*documents.warnings(body), *result.warnings]
    if body.form == "tei":
        return [
            TeiDocument(index=i, score=scores[i], text=texts[i] if returned else None)
            for i in places
        ]
    if body.form == "sglang":
        # SGLang gives documents back unless told otherwise.
        return [
            SglangDocument(
                index=i, score=scores[i], document=None if returned is False else texts[i]
            )
            for i in places
        ]
    if body.form == "voyage":
        return VoyageAnswer(
            data=[
                VoyageDocument(
                    index=i, relevance_score=scores[i], document=texts[i] if returned else None
                )
                for i in places
            ],
            model=model,
            usage=usage,
            warnings=notes,
        )
    parts = {
        index: _as_it_came(body.documents[index], texts[index]) if returned else None
        for index in places
    }
    if body.form == "mixedbread":
        return MixedbreadAnswer(
            data=[MixedbreadDocument(index=i, score=scores[i], input=parts[i]) for i in places],
            model=model,
            usage=usage,
            top_k=len(places),
            return_input=bool(returned),
            warnings=notes,
        )
    return RerankAnswer(
        model=model,
        results=[
            RerankedDocument(
                index=i,
                relevance_score=scores[i],
                raw_relevance_score=_raw(task, result, i),
                document=parts[i],
            )
            for i in places
        ],
        usage=usage,
        warnings=notes,
    )


def in_rerank_words(message: str, body: RerankBody) -> str:
    """Name the fields of a fault as the question does."""
    renamed = message.replace("candidates[", f"{body.documents_field}[")
    renamed = renamed.replace(".fields.text:", ".text:")
    return renamed.removeprefix("profile.") if renamed.startswith("profile.query:") else renamed


def relevance(task: Task, value: float) -> float:
    """Bring a ranking value into 0..1."""
    if task.ranking.kind == "log_odds":
        return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
    grades = [label.grade or 0.0 for label in task.labels]
    lowest, highest = min(grades), max(grades)
    scaled = (value - lowest) / (highest - lowest) if highest > lowest else 0.0
    # Rounding may leave the interval by an ulp.
    return min(1.0, max(0.0, scaled))


def _raw(task: Task, result: ScoreResult, index: int) -> float | None:
    value = result.candidates[index].raw_value
    return None if value is None else relevance(task, value)


def _fields(document: Document, body: RerankBody, path: str) -> dict[str, str]:
    named = document.model_dump(exclude_none=True)
    if body.rank_fields is None:
        if "text" not in named:
            raise RequestError(f"{path}.text: is required and missing")
        return {name: named[name] for name in ("title", "text") if name in named}
    wanted = [name for name in body.rank_fields if name in named]
    if not wanted:
        raise RequestError(f"{path}: should have one of the rank_fields {body.rank_fields}")
    for name in wanted:
        if not isinstance(named[name], str):
            raise RequestError(f"{path}.{name}: should be text")
    return {"text": _join(named, wanted)}


def _join(named: dict[str, str], wanted: Sequence[str]) -> str:
    return "\n".join(named[name] for name in wanted)


def _as_it_came(document: Document, text: str) -> DocumentPart:
    return DocumentPart(**{"text": text, **document.model_dump(exclude_none=True)})
