"""Bodies as they arrive: bounded in time, and all of them together in bytes."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from rankonce.serving.exchanges import Exchange
from rankonce.serving.failures import LaterError, TooSlowError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# A large body may take longer than a small one, as long as it keeps coming.
_MIN_BYTES_PER_SECOND = 100_000


class OpenBodies:
    """Bounds the bytes of all bodies that are held at one time.

    Args:
        max_bytes: a single body has a bound of its own.
        timeout_s: for the first byte to the last, and a second more for every 100 kB.
    """

    def __init__(self, *, max_bytes: int, timeout_s: float) -> None:
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._num_bytes = 0

    def bound(self, receive: Receive, exchange: Exchange, chunks: list[bytes] | None) -> Receive:
        """Wrap what reads the body of one question.

        Args:
            exchange: counts the bytes; ``release`` lets go of them.
            chunks: takes a copy of the body, if it is wanted.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        more = True

        async def receive_bounded() -> MutableMapping[str, Any]:
            nonlocal more
            if not more:
                # The body is there: what is still to come is that the client goes away.
                return await receive()
            try:
                async with asyncio.timeout_at(
                    deadline + exchange.num_bytes / _MIN_BYTES_PER_SECOND
                ):
                    message = await receive()
            except TimeoutError as error:
                raise TooSlowError from error
            more = message.get("more_body", False)
            self._hold(exchange, message.get("body", b""), chunks)
            return message

        return receive_bounded

    def _hold(self, exchange: Exchange, chunk: bytes, chunks: list[bytes] | None) -> None:
        if self._num_bytes + len(chunk) > self._max_bytes:
            raise LaterError(
                503, "the server holds as many bytes as it can", code="bodies_full", wait_s=1
            )
        self._num_bytes += len(chunk)
        exchange.num_bytes += len(chunk)
        if chunks is not None:
            chunks.append(chunk)

    def release(self, exchange: Exchange) -> None:
        """Let go of the body of a question that is answered."""
        self._num_bytes -= exchange.num_bytes
        exchange.num_bytes = 0
