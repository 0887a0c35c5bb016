"""Logs of a server on stderr: a line a record, as text or as JSON.

No line shows what a question holds, unless ``log_bodies`` asks for it: paths are templates, and
an exception is its class and where it was raised, because messages quote values.
"""

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, TextIO

from rankonce.serving.exchanges import Exchange, current_exchange

LogFormat = Literal["text", "json"]

access_logger = logging.getLogger("rankonce.access")

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# uvicorn repeats its messages with colours.
_UNWANTED = {"color_message"}
_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def configure_logs(log_format: LogFormat, *, log_bodies: bool = False) -> None:
    """Send every log record of the process to stderr in one format.

    Args:
        log_bodies: show the messages of exceptions, which may quote what members wrote.
    """
    handler = _StderrHandler()
    formatter = JsonFormatter if log_format == "json" else TextFormatter
    handler.setFormatter(formatter(show_messages=log_bodies))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    for name in ("rankonce", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)


def log_exchange(exchange: Exchange, *, status: int, seconds: float, client: str | None) -> None:
    """Write the one line that every question gets."""
    fields = {
        "method": exchange.method,
        "route": exchange.route,
        "status": status,
        "seconds": round(seconds, 6),
        "key": exchange.owner or None,
        "tokens": exchange.num_tokens,
        "code": exchange.code,
        "client": client,
        "body": exchange.body,
    }
    known = {name: value for name, value in fields.items() if value is not None}
    access_logger.info("%s %s %d", exchange.method, exchange.route, status, extra=known)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what is stderr now: whoever puts another stream there may close it again."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _Formatter(logging.Formatter):
    """What both formats share.

    Args:
        show_messages: whether exceptions show their messages.
    """

    def __init__(self, *, show_messages: bool = False) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")
        self._show_messages = show_messages

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802
        if self._show_messages or ei[1] is None:
            return super().formatException(ei)
        return "\n".join(_describe(ei[1]))


class TextFormatter(_Formatter):
    """Level, logger and message; then what else is known, as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        # Another handler's text of the exception would be taken, message and all.
        record.exc_text = None
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        # The message of the access log has these already.
        shown = _extras(record, leave_out={"method", "route", "status"})
        parts = [super().formatMessage(record), *(f"{k}={v}" for k, v in shown.items())]
        # Line breaks in a message or a body would look like other records.
        return " ".join(parts).replace("\r", "\\r").replace("\n", "\\n")


class JsonFormatter(_Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _extras(record: logging.LogRecord, leave_out: set[str] | None = None) -> dict[str, Any]:
    exchange = current_exchange()
    found = {"request_id": exchange.id} if exchange else {}
    hidden = _STANDARD | _UNWANTED | (leave_out or set())
    return found | {name: value for name, value in vars(record).items() if name not in hidden}


def _describe(error: BaseException) -> Iterator[str]:
    """Say where an exception and what led to it were raised, without their messages."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        yield from _describe(cause)
        yield "which led to"
    yield "Traceback (most recent call last):"
    yield "".join(traceback.format_tb(error.__traceback__)).rstrip("\n")
    yield f"{type(error).__module__}.{type(error).__qualname__} (its message is not logged)"
