"""Each rerank client gets the form that it reads, with the same scores in all of them."""

import asyncio
from collections.abc import Iterator
from typing import Any

import cohere
import httpx
import pytest

from tests.serving.conftest import Served, build_ranker, serving

QUERY = "Heat"
TEXTS = ["Heat is a film of 1995.", "Alien is a film of 1979.", "Plants make food of light."]


@pytest.fixture(scope="module")
def url(plain: Served) -> str:
    return str(plain.http.base_url).rstrip("/")


@pytest.fixture(scope="module")
def scores(plain: Served) -> dict[int, float]:
    """The relevance of every text, as Cohere's form gives it."""
    answer = post(plain, query=QUERY, documents=TEXTS)
    return {one["index"]: one["relevance_score"] for one in answer["results"]}


def post(served: Served, path: str = "/v1/rerank", **question: Any) -> Any:
    response = served.http.post(path, json=question)
    assert response.status_code == 200, response.text
    return response.json()


def best(scores: dict[int, float], number: int) -> list[int]:
    return sorted(scores, key=lambda index: -scores[index])[:number]


@pytest.fixture(scope="module")
def clients(url: str) -> Iterator[dict[str, Any]]:
    """Cohere's clients of both versions."""
    with httpx.Client() as session:
        options: dict[str, Any] = {"base_url": url, "httpx_client": session}
        yield {
            "v1": cohere.Client("no key", **options),
            "v2": cohere.ClientV2("no key", **options),
        }


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_cohere_client_of_both_versions_reads_the_answer(
    clients: dict[str, Any], version: str, scores: dict[int, float]
) -> None:
    client = clients[version]
    answer = client.rerank(model="tiny", query=QUERY, documents=TEXTS, top_n=2)
    found = {one.index: one.relevance_score for one in answer.results}
    assert list(found) == best(scores, 2)
    assert found == pytest.approx({index: scores[index] for index in found}, abs=1e-5)
    assert answer.meta.billed_units.search_units == 1
    assert answer.id.startswith("rerank-")


def test_the_async_cohere_client_reads_the_answer(url: str, scores: dict[int, float]) -> None:
    async def ask() -> list[int]:
        async with httpx.AsyncClient() as session:
            client = cohere.AsyncClientV2("no key", base_url=url, httpx_client=session)
            answer = await client.rerank(model="tiny", query=QUERY, documents=TEXTS, priority=3)
        return [one.index for one in answer.results]

    assert asyncio.run(ask()) == best(scores, 3)


def test_the_cohere_client_of_version_1_ranks_by_fields_and_gets_documents_back(
    plain: Served, clients: dict[str, Any]
) -> None:
    documents = [{"name": "Heat", "body": text, "url": str(n)} for n, text in enumerate(TEXTS)]
    answer = clients["v1"].rerank(
        query=QUERY,
        documents=documents,
        rank_fields=["name", "body"],
        return_documents=True,
        max_chunks_per_doc=10,
    )
    joined = post(plain, query=QUERY, documents=[f"Heat\n{text}" for text in TEXTS])
    expected = {one["index"]: one["relevance_score"] for one in joined["results"]}
    for one in answer.results:
        assert one.relevance_score == pytest.approx(expected[one.index], abs=1e-5)
        document = one.document.model_dump()
        assert document == {"text": f"Heat\n{TEXTS[one.index]}", **documents[one.index]}


def test_the_cohere_client_sees_which_field_was_wrong(clients: dict[str, Any]) -> None:
    with pytest.raises(cohere.errors.BadRequestError) as raised:
        clients["v2"].rerank(model="tiny", query=QUERY, documents=["a", ""])
    assert raised.value.body["error"]["param"] == "documents[1].text"


def test_a_document_longer_than_max_tokens_per_doc_is_cut_and_the_answer_says_so(
    plain: Served, scores: dict[int, float]
) -> None:
    long = f"{TEXTS[0]} And so on and on."
    length = len(plain.tokenizer(TEXTS[0]).input_ids)
    answer = post(
        plain,
        query=QUERY,
        documents=[TEXTS[0], long, "Up."],
        max_tokens_per_doc=length,
        return_documents=True,
    )
    found = {one["index"]: one["relevance_score"] for one in answer["results"]}
    assert found[1] == pytest.approx(scores[0], abs=1e-5)
    assert found[0] == pytest.approx(scores[0], abs=1e-5)
    assert (
        f"documents: read up to max_tokens_per_doc, {length} tokens; longer were 1"
        in (answer["warnings"])
    )
    uncut = post(plain, query=QUERY, documents=TEXTS, max_tokens_per_doc=4096)
    assert not any("max_tokens_per_doc" in warning for warning in uncut["warnings"])


def test_jina_gets_its_documents_back(plain: Served) -> None:
    documents: list[Any] = [TEXTS[0], {"text": TEXTS[1], "title": "Alien"}, {"text": TEXTS[2]}]
    answer = post(plain, query=QUERY, documents=documents, top_n=3, return_documents=True)
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 0
    found = {one["index"]: one["document"] for one in answer["results"]}
    assert found == {0: {"text": TEXTS[0]}, 1: documents[1], 2: documents[2]}


@pytest.mark.parametrize("words", [{"top_k": 2}, {"top_k": 2, "truncation": True}])
def test_voyage_reads_data(plain: Served, scores: dict[int, float], words: dict[str, Any]) -> None:
    answer = post(plain, query=QUERY, documents=TEXTS, return_documents=True, **words)
    assert answer["object"] == "list"
    assert [one["index"] for one in answer["data"]] == best(scores, 2)
    for one in answer["data"]:
        assert one["relevance_score"] == pytest.approx(scores[one["index"]], abs=1e-5)
        assert one["document"] == TEXTS[one["index"]]
    assert answer["usage"]["total_tokens"] > 0


def test_voyage_may_leave_top_k_null(plain: Served, scores: dict[int, float]) -> None:
    answer = post(plain, query=QUERY, documents=TEXTS, top_k=None, truncation=True)
    assert [one["index"] for one in answer["data"]] == best(scores, 3)
    assert all(set(one) == {"index", "relevance_score"} for one in answer["data"])


def test_mixedbread_reads_data_with_score_and_input(
    plain: Served, scores: dict[int, float]
) -> None:
    answer = post(plain, query=QUERY, input=TEXTS, top_k=2, return_input=True)
    assert [one["index"] for one in answer["data"]] == best(scores, 2)
    for one in answer["data"]:
        assert one["score"] == pytest.approx(scores[one["index"]], abs=1e-5)
        assert (one["object"], one["input"]) == ("rank_result", {"text": TEXTS[one["index"]]})
    assert (answer["top_k"], answer["return_input"]) == (2, True)


def test_tei_reads_a_bare_list(plain: Served, scores: dict[int, float]) -> None:
    question = {"query": QUERY, "texts": TEXTS, "raw_scores": False, "truncate": True}
    answer = post(plain, "/rerank", **question, return_text=True)
    assert [one["index"] for one in answer] == best(scores, 3)
    assert {one["index"]: one["score"] for one in answer} == pytest.approx(scores, abs=1e-5)
    assert all(one["text"] == TEXTS[one["index"]] for one in answer)
    assert all(set(one) == {"index", "score"} for one in post(plain, "/rerank", **question))


def test_sglang_reads_a_bare_list_with_documents(plain: Served) -> None:
    own = "Judge whether the document is about plants."
    answer = post(plain, query=QUERY, documents=TEXTS, instruct=own, top_n=2)
    same = post(plain, query=QUERY, documents=TEXTS, instruction=own, top_n=2)["results"]
    assert [one["index"] for one in answer] == [one["index"] for one in same]
    assert all(one["document"] == TEXTS[one["index"]] for one in answer)
    for one, other in zip(answer, same, strict=True):
        assert one["score"] == pytest.approx(other["relevance_score"], abs=1e-5)


def test_an_instruction_changes_the_scores(plain: Served, scores: dict[int, float]) -> None:
    own = post(plain, query=QUERY, documents=TEXTS, instruction="All documents are alike.")
    found = {one["index"]: one["relevance_score"] for one in own["results"]}
    assert found != pytest.approx(scores, abs=1e-3)


def test_too_many_documents_are_named_as_the_question_names_them() -> None:
    with serving(build_ranker(chat=False), max_candidates=2) as http:
        answer = http.post("/rerank", json={"query": QUERY, "texts": TEXTS})
    assert (answer.status_code, answer.json()["error"]["param"]) == (413, "texts")


@pytest.mark.parametrize("item_first", [False, True])
@pytest.mark.parametrize("apply_softmax", [False, True])
def test_generative_scoring_equals_transformers_on_query_and_item_encoded_apart(
    plain: Served, apply_softmax: bool, item_first: bool
) -> None:
    query, items = "Films for a member.\n", ["Heat. Answer:", "M. Answer:", " "]
    labels = [" Yes", " No"]
    answer = post(
        plain,
        "/generative_scoring",
        query=query,
        items=items,
        label_token_ids=[plain.tokenizer(label).input_ids[0] for label in labels],
        apply_softmax=apply_softmax,
        item_first=item_first,
        request_id="mine",
    )
    assert (answer["object"], answer["id"]) == ("list", "generative-scoring-mine")
    label_ids = [plain.tokenizer(label).input_ids[0] for label in labels]
    num_tokens = 0
    for index, (item, one) in enumerate(zip(items, answer["data"], strict=True)):
        parts = [plain.tokenizer(query).input_ids, plain.tokenizer(item).input_ids]
        ids = parts[1] + parts[0] if item_first else parts[0] + parts[1]
        num_tokens += len(ids)
        expected = plain.plain_logprobs(ids)[label_ids]
        if apply_softmax:
            expected = expected.log_softmax(dim=0)
        assert (one["index"], one["object"]) == (index, "score")
        assert one["score"] == pytest.approx(float(expected[0].exp()), abs=1e-5)
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (num_tokens, 3)
    assert usage["total_tokens"] == num_tokens + 3


def test_generative_scoring_takes_labels_as_words_and_token_ids(plain: Served) -> None:
    ids = {"query": [5, 6, 7], "items": [[8, 9], [10]]}
    by_word = post(plain, "/generative_scoring", **ids, labels=[" Yes", " No"])["data"]
    label_ids = [plain.tokenizer(label).input_ids[0] for label in (" Yes", " No")]
    by_id = post(plain, "/generative_scoring", **ids, label_token_ids=label_ids)["data"]
    found = [one["score"] for one in by_word]
    assert found == pytest.approx([one["score"] for one in by_id], abs=1e-5)
    mixed = post(plain, "/generative_scoring", query="Heat", items=[[8, 9]], labels=[" Yes"])
    assert mixed["data"][0]["score"] == 1.0
