"""Bodies have their time, and those that stay in memory a common bound."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from rankonce.serving.bodies import OpenBodies
from rankonce.serving.exchanges import Exchange
from rankonce.serving.failures import LaterError, TooSlowError


class Client:
    """Sends chunks, each after a while."""

    def __init__(self, chunks: list[bytes], *, every_s: float = 0.0) -> None:
        self._chunks: Iterator[bytes] = iter(chunks)
        self._left = len(chunks)
        self._every_s = every_s

    async def __call__(self) -> dict[str, Any]:
        await asyncio.sleep(self._every_s)
        if not self._left:
            return {"type": "http.disconnect"}
        self._left -= 1
        return {"type": "http.request", "body": next(self._chunks), "more_body": self._left > 0}


async def read(bodies: OpenBodies, client: Client, *, is_held: bool = True) -> Exchange:
    exchange = Exchange(id="x", method="POST")
    receive = bodies.bound(client, exchange, None, is_held=is_held)
    while (await receive()).get("more_body"):
        pass
    # What comes after the body has no bound: a pass may take its time.
    assert (await receive())["type"] == "http.disconnect"
    return exchange


def test_what_is_held_is_bounded_until_it_is_released() -> None:
    async def run() -> None:
        bodies = OpenBodies(max_bytes=100, timeout_s=5)
        first = await read(bodies, Client([b"x" * 30, b"x" * 31]))
        assert first.num_bytes == 61
        with pytest.raises(LaterError) as caught:
            await read(bodies, Client([b"x" * 40]))
        assert caught.value.status_code == 503
        await read(bodies, Client([b"x" * 1000]), is_held=False)
        bodies.release(first)
        assert (await read(bodies, Client([b"x" * 100]))).num_bytes == 100

    asyncio.run(run())


def test_a_body_that_keeps_coming_may_take_longer() -> None:
    async def run() -> None:
        bodies = OpenBodies(max_bytes=10**9, timeout_s=0.2)
        # 0.4 s, of which 100 kB each earn a second.
        await read(bodies, Client([b"x" * 100_000] * 4, every_s=0.1))
        with pytest.raises(TooSlowError):
            await read(bodies, Client([b"x"] * 8, every_s=0.1))

    asyncio.run(run())
