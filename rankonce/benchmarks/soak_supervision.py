"""The server of a soak: killed at its times, started again whenever it is gone, its memory read."""

import asyncio
import math
import time

from rankonce.benchmarks.serve_arms import READY_S
from rankonce.benchmarks.soak_memory import MemorySample
from rankonce.benchmarks.soak_tally import Tally
from rankonce.serving.backends.processes import ServerProcess

_SAMPLE_S = 1.0


class Supervisor:
    """Looks after the server while the traffic runs.

    Args:
        server: runs already.
        tally: told when the server ends by itself.
        seconds: of traffic; the kills fall into the first third.
        kills: of the server process.

    Attributes:
        outages: start and end of the times in which the server was down; the last may have no end
            yet.
        num_deaths: times that it ended by itself.
        memory: samples of all its lives.
    """

    def __init__(self, server: ServerProcess, tally: Tally, *, seconds: float, kills: int) -> None:
        self.outages: list[tuple[float, float]] = []
        self.num_deaths = 0
        self.memory: list[MemorySample] = []
        self._server = server
        self._tally = tally
        self._seconds = seconds
        self._kills = kills
        self._lives = 0

    def was_down(self, start: float, end: float) -> bool:
        """Tell whether the server was down at some moment between two."""
        return any(begun <= end and start <= ended for begun, ended in self.outages)

    async def supervise(self, began: float) -> None:
        """Kill the server at its times, and start it again whenever it is not there."""
        times = [self._seconds / 3 * (number + 0.5) / self._kills for number in range(self._kills)]
        while True:
            if times and time.monotonic() - began >= times[0]:
                del times[0]
                await self._restart(by_us=True)
            elif not self._server.is_running:
                self.num_deaths += 1
                self._tally.blame(f"the server ended by itself: {self._server.log_tail()[-500:]}")
                await self._restart(by_us=False)
            await asyncio.sleep(0.05)

    async def sample(self, began: float) -> None:
        """Read the server's memory again and again."""
        while True:
            # A server that starts has no questions yet, and less memory.
            if self._server.is_running and not self._is_down:
                now = time.monotonic() - began
                memory_mb = self._server.memory_mb()
                self.memory.append(MemorySample(seconds=now, life=self._lives, mb=memory_mb))
            await asyncio.sleep(_SAMPLE_S)

    @property
    def _is_down(self) -> bool:
        return bool(self.outages) and self.outages[-1][1] == math.inf

    async def _restart(self, *, by_us: bool) -> None:
        self.outages.append((time.monotonic(), math.inf))
        if by_us:
            self._server.kill()
        self._lives += 1
        await asyncio.to_thread(self._server.start, timeout_s=READY_S)
        self.outages[-1] = (self.outages[-1][0], time.monotonic())
