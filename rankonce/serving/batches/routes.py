"""The routes of files and batches."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from pydantic import ValidationError

from rankonce.serving.answers import ErrorAnswer
from rankonce.serving.batches.batch_store import Batch
from rankonce.serving.batches.file_store import FileInUseError, Purpose, StoredFile
from rankonce.serving.batches.service import BatchService
from rankonce.serving.batches.shapes import (
    BatchAnswer,
    BatchBody,
    BatchList,
    DeletedFile,
    FileAnswer,
    FileList,
    KeepTime,
    batch_answer,
    file_answer,
    window_seconds,
)
from rankonce.serving.batches.uploads import receive_upload
from rankonce.serving.failures import ServingError

Row = TypeVar("Row", Batch, StoredFile)

_OFF = "files and batches are off; start the server with --data-dir FOLDER to have them"
_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The question is wrong; param says where."},
    404: {"model": ErrorAnswer, "description": "There is none, or the server keeps no data."},
    409: {"model": ErrorAnswer, "description": "The batch is not in a state for this."},
    413: {"model": ErrorAnswer, "description": "Too many bytes."},
    500: {"model": ErrorAnswer, "description": "The server failed."},
}
_CONTENT = {
    "description": "The bytes of the file.",
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}


def add_batches(app: FastAPI, service: BatchService | None) -> None:
    """Add the routes; without a service they say how to have one."""
    _add_files(app, service)

    @app.post("/v1/batches", responses=_REFUSALS)
    async def create_batch(body: BatchBody, request: Request) -> BatchAnswer:
        """Score the lines of an uploaded file in the background."""
        found = _on(service)
        keep = body.output_expires_after
        batch = await found.start(
            partial(
                found.batches.create,
                owner=_owner(request),
                endpoint=body.endpoint,
                input_file_id=body.input_file_id,
                completion_window=body.completion_window,
                window_s=window_seconds(body.completion_window),
                metadata=body.metadata,
                keep_output_s=None if keep is None else keep.seconds,
            )
        )
        if batch is None:
            raise ServingError(
                400, f"input_file_id: there is no file {body.input_file_id!r} of purpose batch"
            )
        return batch_answer(batch)

    @app.get("/v1/batches", responses=_REFUSALS)
    async def list_batches(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> BatchList:
        """List batches, newest first."""
        rows = await asyncio.to_thread(
            _on(service).batches.page, owner=_owner(request), limit=limit, after=after
        )
        page, place = _cut(rows, limit, after)
        return BatchList(data=[batch_answer(row) for row in page], **place)

    @app.get("/v1/batches/{batch_id}", responses=_REFUSALS)
    async def retrieve_batch(batch_id: str, request: Request) -> BatchAnswer:
        """Tell how a batch stands."""
        return batch_answer(await _find_batch(_on(service), batch_id, request))

    @app.post("/v1/batches/{batch_id}/cancel", responses=_REFUSALS)
    async def cancel_batch(batch_id: str, request: Request) -> BatchAnswer:
        """Stop a batch; lines that are finished stay."""
        found = _on(service)
        await _find_batch(found, batch_id, request)
        is_cancelling = await found.cancel(batch_id)
        batch = await _find_batch(found, batch_id, request)
        if not is_cancelling:
            raise ServingError(409, f"a batch that is {batch.status} cannot be cancelled")
        return batch_answer(batch)


def _add_files(app: FastAPI, service: BatchService | None) -> None:
    @app.post("/v1/files", responses=_REFUSALS, openapi_extra=_FORM)
    async def upload_file(request: Request) -> FileAnswer:
        """Take a file of questions, one a line."""
        files, max_bytes = _on(service).files, _on(service).max_file_bytes
        incoming = files.new_partial()
        try:
            upload = await receive_upload(request, incoming, max_bytes=max_bytes)
            file = await asyncio.to_thread(
                files.add,
                incoming,
                owner=_owner(request),
                filename=upload.filename,
                keep_s=_read_fields(upload.fields),
            )
        finally:
            incoming.unlink(missing_ok=True)
        return file_answer(file)

    @app.get("/v1/files", responses=_REFUSALS)
    async def list_files(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: Purpose | None = None,
    ) -> FileList:
        """List files, newest first."""
        rows = await asyncio.to_thread(
            _on(service).files.page,
            owner=_owner(request),
            limit=limit,
            after=after,
            purpose=purpose,
            newest_first=order == "desc",
        )
        page, place = _cut(rows, limit, after)
        return FileList(data=[file_answer(row) for row in page], **place)

    @app.get("/v1/files/{file_id}", responses=_REFUSALS)
    async def retrieve_file(file_id: str, request: Request) -> FileAnswer:
        """Describe a file."""
        return file_answer(await _find_file(_on(service), file_id, request))

    @app.get(
        "/v1/files/{file_id}/content",
        responses={**_REFUSALS, 200: _CONTENT},
        response_class=FileResponse,
    )
    async def file_content(file_id: str, request: Request) -> FileResponse:
        """Give a file's content as it is."""
        file = await _find_file(_on(service), file_id, request)
        return FileResponse(
            _on(service).files.path(file.id),
            media_type="application/octet-stream",
            filename=file.filename,
        )

    @app.delete("/v1/files/{file_id}", responses=_REFUSALS)
    async def delete_file(file_id: str, request: Request) -> DeletedFile:
        """Delete a file that no batch reads."""
        try:
            is_deleted = await asyncio.to_thread(
                _on(service).files.delete, file_id, owner=_owner(request)
            )
        except FileInUseError as error:
            raise ServingError(
                409, "a batch reads this file; cancel it or wait until it has ended"
            ) from error
        if not is_deleted:
            raise _no_file(file_id)
        return DeletedFile(id=file_id)


def _on(service: BatchService | None) -> BatchService:
    if service is None:
        # A client tries a 501 again, and in vain.
        raise ServingError(404, _OFF, code="batches_off")
    return service


def _owner(request: Request) -> str:
    """Name whose files and batches a request may see: one owner where nobody is told apart."""
    return getattr(request.state, "owner", None) or ""


async def _find_file(service: BatchService, file_id: str, request: Request) -> StoredFile:
    file = await asyncio.to_thread(service.files.find, file_id, owner=_owner(request))
    if file is None:
        raise _no_file(file_id)
    return file


async def _find_batch(service: BatchService, batch_id: str, request: Request) -> Batch:
    batch = await asyncio.to_thread(service.batches.find, batch_id, owner=_owner(request))
    if batch is None:
        raise ServingError(404, f"there is no batch {batch_id!r}", code="not_found")
    return batch


def _no_file(file_id: str) -> ServingError:
    return ServingError(404, f"there is no file {file_id!r}", code="not_found")


def _cut(
    rows: Sequence[Row] | None, limit: int, after: str | None
) -> tuple[Sequence[Row], dict[str, Any]]:
    """Leave out the row that only tells that there are more."""
    if rows is None:
        raise ServingError(400, f"after: there is no {after!r} to go on from")
    page = rows[:limit]
    return page, {
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": len(rows) > limit,
    }


def _read_fields(fields: dict[str, str]) -> int | None:
    """Check what stands beside the file; return how long to keep it, in seconds."""
    if fields.get("purpose") != "batch":
        raise ServingError(400, 'purpose: should be "batch"')
    name = "expires_after"
    keep = {
        key: fields[f"{name}[{key}]"] for key in ("anchor", "seconds") if f"{name}[{key}]" in fields
    }
    if not keep:
        return None
    try:
        return KeepTime.model_validate(keep).seconds
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise RequestValidationError(
            [{**fault, "loc": ("body", name, *fault["loc"])} for fault in faults]
        ) from error
