"""Evidence is what it says, and knows no judgement."""

from dataclasses import replace

import pytest

from rankonce.datasets.search_evidence import EvidenceWriter, View, view_request
from rankonce.datasets.search_index import SearchIndex
from rankonce.datasets.search_sets import make_fold, read_search_set
from rankonce.datasets.sources import find_adapter, prepare_dataset
from rankonce.prompts.tasks import library_tasks
from tests.search_collection import cranfield_tables, planted_set

LONG = "the lift of a body " + "and so on it went " * 8 + "flutter of a thin panel at high speed"
DOCUMENTS = {
    "wing": {"title": "Lift of a wing", "text": "the lift and drag of thin wings in a slipstream"},
    "heat": {"title": "Heat transfer", "text": "heating of blunt bodies at hypersonic speed"},
    "bare": {"text": "boundary layers on wings"},
    "named": {"title": "Panel flutter"},
    "long": {"title": "Flutter", "text": LONG},
}


def test_evidence_says_what_was_found_where() -> None:
    request = EvidenceWriter(SearchIndex(DOCUMENTS)).write_request("panel flutter", id="7")
    assert request.id == "7"
    assert request.profile == {"query": "panel flutter"}
    by_id = {str(candidate.id): candidate.fields for candidate in request.candidates}
    first = by_id["named"]
    assert (first["keyword_rank"], first["keyword_score"], first["topic_rank"]) == (1, 1.0, 1)
    assert (first["coverage"], first["title_coverage"], first["phrase_score"]) == (1.0, 1.0, 1.0)
    assert (first["rare_found"], first["num_words"]) == (2, 2)
    assert first["like_first"] == pytest.approx(1.0)
    # A document without a text is its title, a passage is where the query's words are.
    assert first["text"] == "Panel flutter"
    assert str(by_id["long"]["text"]).endswith("flutter of a thin panel at high speed")
    assert by_id["long"]["passage_coverage"] == 1.0
    assert 0 < float(str(by_id["long"]["title_coverage"])) < 1
    # Nothing of the query is in the rest.
    assert by_id["heat"]["coverage"] == by_id["heat"]["keyword_score"] == 0.0
    assert "title" not in by_id["bare"]


def test_a_document_is_no_result_for_its_own_title() -> None:
    writer = EvidenceWriter(SearchIndex(DOCUMENTS), num_candidates=3)
    request = writer.write_request("Panel flutter", without=3)
    assert request.candidates[0].id == "long"
    assert "named" not in {candidate.id for candidate in request.candidates}
    assert len(request.candidates) == 3


def test_evidence_is_the_same_in_every_run_and_for_every_writer() -> None:
    search_set = planted_set()
    query = search_set.queries["q14"]
    first = EvidenceWriter(SearchIndex(search_set.documents)).write_request(query)
    again = EvidenceWriter(SearchIndex(search_set.documents)).write_request(query)
    assert first == again


def test_evidence_and_test_lists_do_not_depend_on_judgements() -> None:
    search_set = planted_set()
    held_out = ("q3", "q17", "q8")
    index = SearchIndex(search_set.documents)
    one = make_fold(search_set, index, held_out, number=0, num_candidates=20)
    turned = {
        query: {item: 4 - grade for item, grade in judged.items()}
        for query, judged in search_set.grades.items()
    }
    other = make_fold(
        replace(search_set, grades=turned), index, held_out, number=0, num_candidates=20
    )
    assert one.test == other.test
    assert [each.request for each in one.train] == [each.request for each in other.train]
    assert [each.grades for each in one.train] != [each.grades for each in other.train]
    # Only train lists carry grades, and no query is in both.
    assert {each.request.id for each in one.train}.isdisjoint(held_out)
    assert tuple(request.id for request in one.test) == held_out


def test_every_field_of_evidence_belongs_to_the_task() -> None:
    request = EvidenceWriter(SearchIndex(DOCUMENTS)).write_request("panel flutter")
    known = set(library_tasks()["search-relevance"].candidate.fields)
    assert set(request.candidates[0].fields) == known


def test_views_leave_out_what_they_do_not_show() -> None:
    request = EvidenceWriter(SearchIndex(DOCUMENTS)).write_request("panel flutter")
    text = view_request(request, View.TEXT).candidates[0].fields
    assert text == {"title": "Panel flutter", "text": "Panel flutter"}
    evidence = view_request(request, View.EVIDENCE).candidates
    assert "title" not in evidence[0].fields
    assert evidence[0].fields["text"] == "Panel flutter"
    assert evidence[0].fields["keyword_rank"] == 1
    bare = next(candidate for candidate in evidence if candidate.id == "bare")
    assert bare.fields["text"] == "boundary layers on wings"
    assert view_request(request, View.PASSAGE) == request


def test_a_prepared_dataset_is_read_with_all_its_documents(tmp_path) -> None:
    planted = planted_set()
    for name, table in cranfield_tables(planted).items():
        table.write_parquet(tmp_path / f"{name}.parquet")
    dataset = prepare_dataset(find_adapter("cranfield"), tmp_path / "out", given=tmp_path)
    search_set = read_search_set(dataset)
    assert len(search_set.documents) == len(planted.documents)
    assert search_set.documents["1"] == planted.documents["d0"]
    assert search_set.queries["1"] == planted.queries["q0"]
    assert search_set.grades["4"] == {
        str(int(item[1:]) + 1): grade for item, grade in planted.grades["q3"].items()
    }
