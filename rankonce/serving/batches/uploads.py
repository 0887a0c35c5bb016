"""A file on its way in: multipart form data, its content straight to the disk."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from rankonce.serving.failures import ServingError, TooLargeError

_FORM = "the body should be multipart/form-data with the parts file and purpose"
# Everything but the content.
_MAX_OTHER_BYTES = 65_536
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


@dataclass(kw_only=True)
class Upload:
    """A form whose file has been written.

    Attributes:
        fields: its other parts.
    """

    filename: str
    fields: dict[str, str] = field(default_factory=dict)


async def receive_upload(request: Request, partial: Path, *, max_bytes: int) -> Upload:
    """Write the part ``file`` of a form to ``partial``, which may stay half written on errors.

    Raises:
        TooLargeError: the file has more bytes than ``max_bytes``.
        ServingError: the form is not what it should be, or its sender left.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ServingError(400, _FORM)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes + _MAX_OTHER_BYTES:
        raise _too_large(max_bytes)
    with partial.open("wb") as file:
        try:
            form = _Form(options[b"boundary"], file, max_bytes=max_bytes)
            async for chunk in request.stream():
                await asyncio.to_thread(form.feed, chunk)
        except ClientDisconnect as error:
            raise ServingError(400, "the upload broke off") from error
        except FormParserError as error:
            raise ServingError(400, f"{_FORM}: {error}") from error
    return form.close()


class _Form:
    """Sorts the bytes of a form into its parts."""

    def __init__(self, boundary: bytes, file: BinaryIO, *, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._num_other_bytes = 0
        self._filename: str | None = None
        self._fields: dict[str, bytearray] = {}
        self._name = ""
        self._header, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._is_whole = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_header,
                "on_header_value": self._add_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._name_part,
                "on_part_data": self._add_data,
                "on_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        file_bytes = self._num_bytes
        self._parser.write(chunk)
        self._num_other_bytes += len(chunk) - (self._num_bytes - file_bytes)
        if self._num_other_bytes > _MAX_OTHER_BYTES:
            raise TooLargeError(
                f"a form should have at most {_MAX_OTHER_BYTES:,} bytes beside file"
            )

    def close(self) -> Upload:
        self._parser.finalize()
        if not self._is_whole:
            raise ServingError(400, f"{_FORM}: its end is missing")
        if self._filename is None:
            raise ServingError(400, "file: is required and missing")
        return Upload(
            filename=self._filename or "file",
            fields={name: _decode(value) for name, value in self._fields.items()},
        )

    def _begin_part(self) -> None:
        self._disposition = b""

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _name_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = _decode(options.get(b"name", b""))
        if self._name == "file" and self._filename is None:
            self._filename = _decode(options.get(b"filename", b""))
        elif self._name in _FIELDS and self._name not in self._fields:
            self._fields[self._name] = bytearray()
        else:
            allowed = ", ".join(("file", *_FIELDS))
            raise ServingError(
                400, f"{_FORM}, each once; there may be {allowed}, and there is {self._name!r}"
            )

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._name != "file":
            self._fields[self._name] += data[start:end]
            return
        self._num_bytes += end - start
        if self._num_bytes > self._max_bytes:
            raise _too_large(self._max_bytes)
        self._file.write(data[start:end])

    def _end(self) -> None:
        self._is_whole = True


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(f"file: should have at most {max_bytes:,} bytes")


def _decode(data: bytes | bytearray) -> str:
    return data.decode("utf-8", errors="replace")
