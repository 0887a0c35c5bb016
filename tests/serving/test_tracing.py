"""Traces reach a collector over HTTP, and nothing is imported for those that nobody wants."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from rankonce.errors import MissingDependencyError, OperationsError
from rankonce.serving.operations import OperationsConfig
from rankonce.serving.tracing import open_tracing
from tests.serving.conftest import build_ranker, serving

QUESTION = {"prompt": ["Zanzibar", "Zanzibar again"], "max_tokens": 1}


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, ExportTraceServiceRequest]]]]:
    """An OpenTelemetry collector that keeps what it gets."""
    got: list[tuple[str, ExportTraceServiceRequest]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = ExportTraceServiceRequest()
            message.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            got.append((self.path, message))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()
        thread.join()


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_a_question_is_a_span_with_its_stages_inside() -> None:
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with collector() as (address, got):
        operations = OperationsConfig(otlp_endpoint=address, warm_up=False)
        with serving(build_ranker(chat=False), operations) as http:
            headers = {
                "traceparent": f"00-{trace_id}-{parent_id}-01",
                "X-Request-Id": "id-3",
            }
            assert http.post("/v1/completions", json=QUESTION, headers=headers).status_code == 200
            assert http.post("/v1/rank", json={"task": "Zanzibar"}).status_code == 400
        # A server that stops sends what waits.
    assert {path for path, _ in got} == {"/v1/traces"}
    spans = [
        span
        for _, message in got
        for resource in message.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    (root,) = [span for span in spans if span.name == "POST /v1/completions"]
    assert root.trace_id.hex() == trace_id
    assert root.parent_span_id.hex() == parent_id
    known = attributes(root)
    assert known["http.response.status_code"] == 200
    assert known["rankonce.request_id"] == "id-3"
    assert known["rankonce.tokens"] > 0
    stages = [span for span in spans if span.parent_span_id == root.span_id]
    assert {span.name for span in stages} == {"tokenise", "wait", "forward", "answer"}
    stages.sort(key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))
    # The clock of the stages and that of their ends are two.
    slack = 20_000_000
    for one, other in pairwise(stages):
        assert one.end_time_unix_nano <= other.start_time_unix_nano + slack
    assert root.start_time_unix_nano <= stages[0].start_time_unix_nano + slack
    assert stages[-1].end_time_unix_nano <= root.end_time_unix_nano
    (refused,) = [span for span in spans if span.name == "POST /v1/rank"]
    assert attributes(refused)["error.type"] == "invalid_request_error"
    assert not refused.parent_span_id
    assert "Zanzibar" not in "".join(str(message) for _, message in got)


@pytest.mark.parametrize("endpoint", ["", "localhost:4318", "ftp://localhost", "http://"])
def test_an_address_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(OperationsError, match="otlp_endpoint: should be an address"):
        open_tracing(endpoint, version="0")


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(MissingDependencyError, match=r"rankonce\[otel\]"):
        open_tracing("http://localhost:4318", version="0")


def test_nothing_is_imported_for_traces_that_nobody_asks_for() -> None:
    program = (
        "import sys, rankonce.serving.app\n"
        "wanted = ('opentelemetry.sdk', 'opentelemetry.exporter')\n"
        "assert not [name for name in sys.modules if name.startswith(wanted)]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
