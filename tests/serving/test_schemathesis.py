"""Questions that follow the interface's own description, and those that break it, at a server."""

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.conftest import Served
from tests.serving.test_openapi import examples_of

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_every_answer_is_one_that_the_description_names(chatty: Served, mode: str) -> None:
    description = schemathesis.openapi.from_url(f"{chatty.http.base_url}/openapi.json")
    operations = [found.ok() for found in description.get_all_operations()]
    assert {"/v1/rank", "/v1/score", "/v1/completions"} <= {each.path for each in operations}
    # A question without a body has no way to break the description.
    asked = [each for each in operations if mode == "positive" or each.body]
    assert asked
    statuses = Counter[int]()
    interface = chatty.http.get("/openapi.json").json()
    for operation in asked:
        # Few questions by chance follow what a description cannot say.
        for example in examples_of(interface, operation.definition.raw):
            if mode == "positive":
                case = operation.Case(body=example, media_type="application/json")
                statuses[case.call_and_validate(checks=CHECKS, timeout=60).status_code] += 1
        _ask(operation, schemathesis.GenerationMode(mode), statuses)
    # A model, a file or a batch by a name that was made up is not found, as it should be.
    named = ("/v1/files", "/v1/batches", "/v1/models/")
    answerable = [each for each in asked if not each.path.startswith(named)]
    assert statuses[200 if mode == "positive" else 400] >= len(answerable), statuses


def _ask(operation: Any, mode: schemathesis.GenerationMode, statuses: Counter[int]) -> None:
    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        statuses[case.call_and_validate(checks=CHECKS, timeout=60).status_code] += 1

    ask()
