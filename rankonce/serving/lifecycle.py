"""A server's life: warming up, ready, draining; and the server that follows it."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from types import FrameType

import uvicorn

logger = logging.getLogger(__name__)


class Phase(StrEnum):
    """Where in its life a server is.

    Attributes:
        WARMING_UP: takes questions, but the first ones are slow.
        READY: should get traffic.
        ENGINE_DOWN: would be ready, but the engine that computes its passes does not answer.
        DRAINING: was told to stop and finishes what runs.
        FAILED: cannot answer; its log says why.
    """

    WARMING_UP = "warming_up"
    READY = "ready"
    ENGINE_DOWN = "engine_down"
    DRAINING = "draining"
    FAILED = "failed"


class Lifecycle:
    """The phase that a server is in; draining and failing are final."""

    def __init__(self) -> None:
        self.phase = Phase.WARMING_UP

    def finish_warm_up(self) -> None:
        """Become ready, unless the server was told to stop meanwhile."""
        if self.phase is Phase.WARMING_UP:
            self.phase = Phase.READY

    def drain(self) -> None:
        """Stop being ready for good."""
        if self.phase is not Phase.FAILED:
            self.phase = Phase.DRAINING

    def fail(self) -> None:
        """Give up."""
        self.phase = Phase.FAILED

    @property
    def is_draining(self) -> bool:
        """Whether the server was told to stop."""
        return self.phase is Phase.DRAINING


class DrainingServer(uvicorn.Server):
    """Stops as a load balancer needs it.

    The first SIGTERM or SIGINT makes the server unready; after ``drain_delay_s`` it stops
    accepting, finishes what runs within uvicorn's ``timeout_graceful_shutdown`` and returns. A
    second SIGINT stops it at once. A failed warm-up stops it as well.
    """

    def __init__(
        self, config: uvicorn.Config, lifecycle: Lifecycle, *, drain_delay_s: float
    ) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._drain_delay_s = drain_delay_s
        self._stop_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a signal handler, so it only sets flags."""
        if self._stop_at is None:
            self._lifecycle.drain()
            self._stop_at = time.monotonic() + self._drain_delay_s
        elif sig == signal.SIGINT:
            self.force_exit = self.should_exit
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Say whether it is time to stop accepting."""
        stop = self._stop_at is not None and time.monotonic() >= self._stop_at
        if stop or self._lifecycle.phase is Phase.FAILED:
            self.should_exit = True
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving; the process does not die of them afterwards."""
        # uvicorn raises what it caught once more at the end, which would be exit code -15. Signals
        # that ``handle_exit`` above sees are not among them.
        with super().capture_signals():
            yield
