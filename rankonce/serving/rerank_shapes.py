"""Shapes of rerank questions and answers, in the words of the clients that there are.

The question takes the words of all of them; whose they are decides the form of the answer.
"""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

from rankonce.serving.answers import answer_id
from rankonce.serving.fields import Ignored, Priority, Refused, Timeout, TopN, example, only


class Document(BaseModel):
    """A candidate of a rerank question; fields beside these are given back as they came."""

    model_config = ConfigDict(extra="allow")
    text: str | None = None
    title: str | None = None


def _document(value: Any) -> Any:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ValueError('should be text or {"text": "...", "title": "..."}')
    return value


# Words for the same that are never in one question.
_DOCUMENTS = ("documents", "texts", "input")
_BOUNDS = ("top_n", "top_k")
_RETURNS = ("return_documents", "return_text", "return_input")
_INSTRUCTIONS = ("instruction", "instruct")

_QUERY = "how do plants make food"
_TEXTS = ["Photosynthesis turns light into sugar.", "Heat is a film of 1995."]

RerankForm: TypeAlias = Literal["cohere", "voyage", "mixedbread", "tei", "sglang"]


class RerankBody(BaseModel):
    """The rerank question of Cohere and Jina, and of those whose words differ.

    Attributes:
        rank_fields: the fields of a document that are read, in this order, where it has them.
        max_tokens_per_doc: documents are read up to here; the answer says which were longer.
        instruction: stands in the prompt instead of the task's.
    """

    model_config = example(
        {"query": _QUERY, "documents": _TEXTS, "top_k": 1, "truncation": True},
        {"query": _QUERY, "input": _TEXTS, "top_k": 1, "return_input": True},
        {"query": _QUERY, "texts": _TEXTS, "return_text": True},
        {"query": _QUERY, "documents": _TEXTS, "instruct": "Judge as a teacher of biology."},
        {
            "query": _QUERY,
            "documents": [{"title": "Plants", "body": _TEXTS[0], "id": "7"}],
            "rank_fields": ["title", "body"],
            "return_documents": True,
        },
        query=_QUERY,
        documents=_TEXTS,
        top_n=2,
        return_documents=True,
    )
    query: str
    documents: Annotated[
        list[Annotated[Document, BeforeValidator(_document)]],
        Field(min_length=1, validation_alias=AliasChoices(*_DOCUMENTS)),
    ]
    top_n: Annotated[TopN, Field(validation_alias=AliasChoices(*_BOUNDS))] = None
    return_documents: Annotated[bool | None, Field(validation_alias=AliasChoices(*_RETURNS))] = None
    rank_fields: Annotated[list[str], Field(min_length=1)] | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = None
    instruction: Annotated[str | None, Field(validation_alias=AliasChoices(*_INSTRUCTIONS))] = None
    task: str = "search-relevance"
    model: str | None = None
    raw_scores: Annotated[bool | None, only(False, why="scores lie between 0 and 1")] = None
    relevant_spans: Refused = None
    max_chunks_per_doc: Ignored = None
    priority: Priority = 0
    timeout_ms: Timeout = None
    truncate: Ignored = None
    truncation: Ignored = None
    truncation_direction: Ignored = None
    user: Ignored = None

    _names: frozenset[str] = PrivateAttr(default=frozenset())

    @model_validator(mode="wrap")
    @classmethod
    def _keep_names(cls, data: Any, read: ModelWrapValidatorHandler["RerankBody"]) -> "RerankBody":
        if not isinstance(data, dict):
            return read(data)
        for words in (_DOCUMENTS, _BOUNDS, _RETURNS, _INSTRUCTIONS):
            if len(given := [word for word in words if word in data]) > 1:
                raise ValueError(f"{given[1]}: should be left out beside {given[0]}")
        body = read(data)
        body._names = frozenset(data)
        if body.max_tokens_per_doc is not None and body.form in ("tei", "sglang"):
            raise ValueError(
                "max_tokens_per_doc: should be left out, since the answer is a bare list that "
                "cannot say what was cut"
            )
        return body

    @property
    def documents_field(self) -> str:
        """What the question calls its documents."""
        return next((word for word in _DOCUMENTS if word in self._names), "documents")

    @property
    def form(self) -> RerankForm:
        """Whose words the question has, which decides the form of the answer."""
        if "texts" in self._names:
            return "tei"
        if "input" in self._names:
            return "mixedbread"
        if "instruct" in self._names:
            return "sglang"
        return "voyage" if self._names & {"top_k", "truncation"} else "cohere"


class DocumentPart(BaseModel):
    """A document as it came, where it was asked for."""

    model_config = ConfigDict(extra="allow")
    text: str
    title: str | None = None


class RerankedDocument(BaseModel):
    """One document; ``index`` is its place in the question.

    Attributes:
        raw_relevance_score: the model's own, where the other is calibrated.
    """

    index: int
    relevance_score: float
    raw_relevance_score: float | None = None
    document: DocumentPart | None = None


class BilledUnits(BaseModel):
    """What Cohere bills."""

    search_units: int = 1


class ApiVersion(BaseModel):
    """Whose form the answer has."""

    version: str = "2"


class RerankMeta(BaseModel):
    """What Cohere's clients look for."""

    api_version: ApiVersion = Field(default_factory=ApiVersion)
    billed_units: BilledUnits = Field(default_factory=BilledUnits)


class RerankUsage(BaseModel):
    """Tokens of a rerank question, the packed prompt once."""

    prompt_tokens: int
    total_tokens: int


class RerankAnswer(BaseModel):
    """Documents, best first."""

    object: Literal["rerank"] = "rerank"
    id: str = Field(default_factory=lambda: answer_id("rerank"))
    model: str
    results: list[RerankedDocument]
    usage: RerankUsage
    meta: RerankMeta = Field(default_factory=RerankMeta)
    warnings: list[str] = []


class VoyageDocument(BaseModel):
    """One document as Voyage answers, whose documents are texts."""

    index: int
    relevance_score: float
    document: str | None = None


class VoyageAnswer(BaseModel):
    """Documents, best first, in Voyage's form."""

    object: Literal["list"] = "list"
    data: list[VoyageDocument]
    model: str
    usage: RerankUsage
    warnings: list[str] = []


class MixedbreadDocument(BaseModel):
    """One document as Mixedbread answers."""

    index: int
    score: float
    input: DocumentPart | str | None = None
    object: Literal["rank_result"] = "rank_result"


class MixedbreadAnswer(BaseModel):
    """Documents, best first, in Mixedbread's form."""

    object: Literal["list"] = "list"
    data: list[MixedbreadDocument]
    model: str
    usage: RerankUsage
    top_k: int
    return_input: bool
    warnings: list[str] = []


class TeiDocument(BaseModel):
    """One document as Text Embeddings Inference answers, in a bare list."""

    index: int
    score: float
    text: str | None = None


class SglangDocument(BaseModel):
    """One document as SGLang answers, in a bare list."""

    score: float
    document: str | None = None
    index: int


AnyRerankAnswer: TypeAlias = (
    RerankAnswer | VoyageAnswer | MixedbreadAnswer | list[TeiDocument] | list[SglangDocument]
)
