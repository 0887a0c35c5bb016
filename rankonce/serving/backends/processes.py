"""A server as a process of its own: started, waited for, looked at, stopped."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from rankonce.errors import EngineError

_POLL_S = 0.2
_STOP_S = 20.0
_LOG_LINES = 15


class ServerProcess:
    """A running server.

    Args:
        command: starts it; it must listen on ``port`` of this machine.
        health: path that answers 200 once it takes questions.
        log: takes its stdout and stderr.
        environment: variables beside those of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        log: Path,
        health: str = "/health",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.command = list(command)
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._health = health
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self, *, timeout_s: float) -> None:
        """Start it and wait until it takes questions.

        Raises:
            EngineError: it ended, or did not answer in time; holds the end of its log.
        """
        self.launch()
        end = time.monotonic() + timeout_s
        while not self.is_ready():
            if not self.is_running or time.monotonic() > end:
                fate = "did not answer" if self.is_running else "ended before it answered"
                self.kill()
                raise EngineError(f"{' '.join(self.command[:4])} … {fate}:\n{self.log_tail()}")
            time.sleep(_POLL_S)

    def launch(self) -> None:
        """Start it without waiting."""
        with self.log.open("ab") as log:
            # A group of its own, so that its workers end with it.
            self._process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,
            )

    def is_ready(self) -> bool:
        """Ask whether it takes questions."""
        try:
            return httpx.get(f"{self.url}{self._health}", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def memory_mb(self) -> float:
        """Resident memory of the process and its children, MB; pages that they share count once
        a process."""
        import psutil

        total = 0
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.pid)
            for process in (parent, *parent.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
        return total / 1e6

    def kill(self) -> None:
        """End it at once, with everything that it started."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """Ask it to end, and insist."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        self.kill()

    def log_tail(self) -> str:
        """Return the last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])


@contextmanager
def running(server: ServerProcess, *, timeout_s: float) -> Iterator[ServerProcess]:
    """Have a server run inside this context."""
    try:
        server.start(timeout_s=timeout_s)
        yield server
    finally:
        server.stop()


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
