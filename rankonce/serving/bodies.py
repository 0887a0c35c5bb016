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

    def bound(
        self, receive: Receive, exchange: Exchange, chunks: list[bytes] | None, *, is_held: bool
    ) -> Receive:
        """Wrap what reads the body of one question.

        Args:
            exchange: counts the bytes; ``release`` lets go of them.
            chunks: takes a copy of the body, if it is wanted.
            is_held: whether the body stays in memory; a file that goes to disk does not.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        more, num_received = True, 0

        async def receive_bounded() -> MutableMapping[str, Any]:
            nonlocal more, num_received
            if not more:
                # The body is there: what is still to come is that the client goes away.
                return await receive()
            try:
                async with asyncio.timeout_at(deadline + num_received / _MIN_BYTES_PER_SECOND):
                    message = await receive()
            except TimeoutError as error:
                raise TooSlowError from error
            more = message.get("more_body", False)
            chunk = message.get("body", b"")
            num_received += len(chunk)
            if is_held:
                self._hold(exchange, len(chunk))
            if chunks is not None:
                chunks.append(chunk)
            return message

        return receive_bounded

    def _hold(self, exchange: Exchange, num_bytes: int) -> None:
        if self._num_bytes + num_bytes > self._max_bytes:
            raise LaterError(
                503, "the server holds as many bytes as it can", code="bodies_full", wait_s=1
            )
        self._num_bytes += num_bytes
        exchange.num_bytes += num_bytes

    def release(self, exchange: Exchange) -> None:
        """Let go of the body of a question that is answered."""
        self._num_bytes -= exchange.num_bytes
        exchange.num_bytes = 0
