"""A made-up collection in which relevance is planted where keywords alone do not see it."""

import numpy as np
import polars as pl

from rankonce.datasets.search_sets import SearchSet
from rankonce.records import Value

NUM_SUBJECTS = 12
_FILLER = [f"filler{number}" for number in range(60)]


def planted_set(*, num_documents: int = 84, seed: int = 0) -> SearchSet:
    """Make documents on subjects and a query a subject and wording.

    A document is relevant where its title names the query's subject. Others repeat the subject in
    their text, so that BM25 over the whole puts them first.
    """
    random = np.random.default_rng(seed)
    documents: dict[str, dict[str, Value]] = {}
    grades: dict[str, dict[str, int]] = {f"q{n}": {} for n in range(2 * NUM_SUBJECTS)}
    for number in range(num_documents):
        subject, answers = number % NUM_SUBJECTS, number // NUM_SUBJECTS % 2 == 0
        words = random.choice(_FILLER, size=14).tolist()
        about = f"subject{subject} matter{subject}"
        title = f"{about} explained" if answers else f"notes {words[0]} {words[1]}"
        text = " ".join(words if answers else [about, *words[:6], about, *words[6:], about])
        documents[f"d{number}"] = {"title": title, "text": text}
        for query in (subject, subject + NUM_SUBJECTS):
            if answers:
                grades[f"q{query}"][f"d{number}"] = 4
            elif number % 5 == 0:
                grades[f"q{query}"][f"d{number}"] = 0
    queries = {
        f"q{n}": f"what is known of subject{n % NUM_SUBJECTS}"
        + (f" and of matter{n % NUM_SUBJECTS}" if n >= NUM_SUBJECTS else "")
        for n in range(2 * NUM_SUBJECTS)
    }
    return SearchSet(name="planted", queries=queries, documents=documents, grades=grades)


def cranfield_tables(search_set: SearchSet) -> dict[str, pl.DataFrame]:
    """Write a set as the three files of Cranfield; ids become numbers."""
    numbers = {name: int(name[1:]) + 1 for name in (*search_set.queries, *search_set.documents)}
    return {
        "docs": pl.DataFrame(
            {
                "doc_id": [int(name[1:]) + 1 for name in search_set.documents],
                "title": [fields["title"] for fields in search_set.documents.values()],
                "author": ["somebody"] * len(search_set.documents),
                "text": [f"{d['title']} {d['text']}" for d in search_set.documents.values()],
            }
        ),
        "queries": pl.DataFrame(
            {
                "query_id": [numbers[name] for name in search_set.queries],
                "query": list(search_set.queries.values()),
            }
        ),
        "qrels": pl.DataFrame(
            [
                (int(query[1:]) + 1, int(item[1:]) + 1, grade)
                for query, judged in search_set.grades.items()
                for item, grade in judged.items()
            ],
            schema=["query_id", "doc_id", "grade"],
            orient="row",
        ),
    }
