"""Slow clients lose their connection, and others do not notice."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import uvicorn

from rankonce.serving.connections import bounded_protocol
from rankonce.serving.operations import OperationsConfig
from tests.serving.conftest import build_ranker, serving

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "M", "max_tokens": 1}'


@pytest.fixture(scope="module")
def hurried() -> Iterator[httpx.Client]:
    """A server without patience."""
    operations = OperationsConfig(
        header_timeout_s=0.5, body_timeout_s=0.6, write_timeout_s=0.5, warm_up=False
    )
    with serving(build_ranker(chat=False), operations) as http:
        yield http


def connect(http: httpx.Client) -> socket.socket:
    connection = socket.create_connection((http.base_url.host, http.base_url.port), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes."""
    parts = []
    try:
        while part := connection.recv(65_536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def dribble(connection: socket.socket, data: bytes, *, every_s: float) -> None:
    """Send a byte at a time until the server hangs up."""
    try:
        for index in range(len(data)):
            connection.sendall(data[index : index + 1])
            time.sleep(every_s)
    except (BrokenPipeError, ConnectionResetError):
        pass


def test_a_client_that_says_nothing_is_hung_up_on(hurried: httpx.Client) -> None:
    with connect(hurried) as connection:
        began = time.monotonic()
        assert read_all(connection) == b""
        assert 0.3 < time.monotonic() - began < 3


def test_a_head_that_dribbles_in_is_hung_up_on(hurried: httpx.Client) -> None:
    with connect(hurried) as connection:
        began = time.monotonic()
        dribble(connection, HEAD, every_s=0.05)
        assert read_all(connection) == b""
        assert time.monotonic() - began < 3


def test_a_second_head_on_a_connection_has_its_time_too(hurried: httpx.Client) -> None:
    with connect(hurried) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        dribble(connection, HEAD, every_s=0.05)
        read_all(connection)
        assert time.monotonic() - began < 3


def test_a_body_that_dribbles_in_is_answered_408_and_closed(hurried: httpx.Client) -> None:
    with connect(hurried) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        began = time.monotonic()
        dribble(connection, b"{" * 40, every_s=0.05)
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"code":"request_timeout"' in answer
        assert time.monotonic() - began < 4


def test_a_question_in_pieces_is_answered_if_they_come_soon(hurried: httpx.Client) -> None:
    with connect(hurried) as connection:
        connection.sendall(HEAD[:9])
        time.sleep(0.1)
        connection.sendall(HEAD[9:] + b"Connection: close\r\nContent-Length: %d\r\n" % len(BODY))
        connection.sendall(b"\r\n" + BODY[:5])
        time.sleep(0.2)
        connection.sendall(BODY[5:])
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_slow_clients_do_not_slow_others(hurried: httpx.Client) -> None:
    with ExitStack() as opened:
        slow = [opened.enter_context(connect(hurried)) for _ in range(50)]
        for connection in slow:
            connection.sendall(HEAD[:20])
        began = time.monotonic()
        headers = {"Content-Type": "application/json"}
        answer = hurried.post("/v1/completions", content=BODY, headers=headers)
        assert answer.status_code == 200
        assert time.monotonic() - began < 2
        for connection in slow:
            assert read_all(connection) == b""


def test_a_head_that_is_too_large_is_refused(hurried: httpx.Client) -> None:
    with connect(hurried) as connection:
        connection.sendall(HEAD + b"X: " + b"x" * 100_000 + b"\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 400")


def test_an_answer_that_nobody_reads_is_given_up() -> None:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 50_000_000, "more_body": True})
        # Waits for the client to read.
        await send({"type": "http.response.body", "body": b"x"})
        finished.set()

    finished = threading.Event()
    protocol = bounded_protocol(header_timeout_s=5, write_timeout_s=0.5)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(answer, http=protocol, lifespan="off", log_config=None, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with socket.create_connection(listener.getsockname(), timeout=10) as connection:
            connection.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
            assert finished.wait(5)
            assert len(read_all(connection)) < 50_000_000
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
