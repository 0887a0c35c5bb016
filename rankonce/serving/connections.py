"""Connections that do not wait for slow clients: a head and an answer have their time."""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections which keep the server waiting.

    uvicorn bounds the size of a head (64 KiB) and how long a connection may idle between
    questions. This bounds how long a head may take, from the connection or its first byte on, and
    how long an answer may lie unread. The time of a body is bounded where it is read.
    """

    header_timeout_s: float
    write_timeout_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer = _Timer(self.loop)
        self._write_timer = _Timer(self.loop)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for the first head."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Read on, and wait no longer for a head that is complete."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        super().connection_lost(exc)
        self._head_timer.stop()
        self._write_timer.stop()

    def pause_writing(self) -> None:
        """Start to wait for the client to read."""
        super().pause_writing()
        self._write_timer.start(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        super().resume_writing()
        self._write_timer.stop()

    @property
    def _waits(self) -> bool:
        """Whether the next move is the client's: a head, or a body that nobody reads any more."""
        return self.cycle is None or self.cycle.response_complete

    def _watch_head(self) -> None:
        if not self._waits:
            self._head_timer.stop()
        elif not self.transport.is_closing():
            self._head_timer.start(self.header_timeout_s, self._give_up_waiting)

    def _give_up_waiting(self) -> None:
        self._head_timer.stop()
        if self._waits:
            self.transport.close()


class _Timer:
    """Calls something later, unless it is stopped; starting it twice does not begin anew."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, call: Callable[[], None]) -> None:
        if self._handle is None:
            self._handle = self._loop.call_later(seconds, call)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def bounded_protocol(*, header_timeout_s: float, write_timeout_s: float) -> type[BoundedProtocol]:
    """Make the protocol class that a uvicorn server of these bounds takes."""
    bounds = {"header_timeout_s": header_timeout_s, "write_timeout_s": write_timeout_s}
    return type("BoundedProtocol", (BoundedProtocol,), bounds)
