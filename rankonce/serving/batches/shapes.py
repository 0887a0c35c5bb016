"""Questions and answers of ``/v1/files`` and ``/v1/batches``, in OpenAI's form."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from rankonce.serving.batches.batch_store import Batch, Status
from rankonce.serving.batches.dispatch import ENDPOINTS
from rankonce.serving.batches.file_store import Purpose, StoredFile
from rankonce.serving.batches.lines import LineFault

_WINDOW = re.compile(r"([1-9]\d{0,6})([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_LONGEST_WINDOW_S = 30 * _UNIT_S["d"]
SHORTEST_KEEP_S = 3600
LONGEST_KEEP_S = 30 * _UNIT_S["d"]


def window_seconds(window: str) -> int:
    """Read a completion window such as ``24h``, in seconds."""
    found = _WINDOW.fullmatch(window)
    seconds = int(found[1]) * _UNIT_S[found[2]] if found else 0
    if not 0 < seconds <= _LONGEST_WINDOW_S:
        raise ValueError('should be a time of at most 30 days, such as "24h"')
    return seconds


def _check_endpoint(endpoint: str) -> str:
    if endpoint not in ENDPOINTS:
        raise ValueError(f"should be one of {', '.join(ENDPOINTS)}")
    return endpoint


def _check_window(window: str) -> str:
    window_seconds(window)
    return window


class KeepTime(BaseModel):
    """How long a file is kept from when it was created."""

    model_config = ConfigDict(extra="forbid")
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=SHORTEST_KEEP_S, le=LONGEST_KEEP_S)]


class BatchBody(BaseModel):
    """The question for a batch; windows other than OpenAI's ``24h`` are ours."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "input_file_id": "file-0123456789abcdef0123456789abcdef",
                    "endpoint": "/v1/completions",
                    "completion_window": "24h",
                }
            ]
        },
    )
    input_file_id: str
    endpoint: Annotated[str, AfterValidator(_check_endpoint)]
    completion_window: Annotated[str, AfterValidator(_check_window)]
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: KeepTime | None = None


class FileAnswer(BaseModel):
    """A file."""

    object: Literal["file"] = "file"
    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    """Files of one page."""

    object: Literal["list"] = "list"
    data: list[FileAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    """A file that is gone."""

    object: Literal["file"] = "file"
    id: str
    deleted: Literal[True] = True


class RequestCounts(BaseModel):
    """Lines of a batch; while it runs, some are neither completed nor failed."""

    total: int
    completed: int
    failed: int


class LineFaults(BaseModel):
    """What is wrong with an input file."""

    object: Literal["list"] = "list"
    data: list[LineFault]


class InputDetails(BaseModel):
    """Of the tokens read."""

    cached_tokens: int


class OutputDetails(BaseModel):
    """Of the tokens written."""

    reasoning_tokens: int = 0


class BatchUsage(BaseModel):
    """Tokens of the lines that were answered, as their own answers count them."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = Field(default_factory=OutputDetails)
    total_tokens: int


class BatchAnswer(BaseModel):
    """A batch."""

    object: Literal["batch"] = "batch"
    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Status
    errors: LineFaults | None
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    """Batches of one page."""

    object: Literal["list"] = "list"
    data: list[BatchAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


def file_answer(file: StoredFile) -> FileAnswer:
    """Write a file's row as an answer."""
    return FileAnswer(
        id=file.id,
        bytes=file.num_bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose,
    )


def batch_answer(batch: Batch) -> BatchAnswer:
    """Write a batch's row as an answer."""
    errors: list[Any] | None = None if batch.errors is None else json.loads(batch.errors)
    return BatchAnswer(
        id=batch.id,
        endpoint=batch.endpoint,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status,
        errors=(
            None
            if errors is None
            else LineFaults(data=[LineFault.model_validate(fault) for fault in errors])
        ),
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=batch.created_at,
        in_progress_at=batch.in_progress_at,
        expires_at=batch.expires_at,
        finalizing_at=batch.finalizing_at,
        completed_at=batch.completed_at,
        failed_at=batch.failed_at,
        expired_at=batch.expired_at,
        cancelling_at=batch.cancelling_at,
        cancelled_at=batch.cancelled_at,
        request_counts=RequestCounts(
            total=batch.num_lines, completed=batch.num_completed, failed=batch.num_failed
        ),
        usage=BatchUsage(
            input_tokens=batch.input_tokens,
            input_tokens_details=InputDetails(cached_tokens=batch.cached_tokens),
            output_tokens=batch.output_tokens,
            total_tokens=batch.input_tokens + batch.output_tokens,
        ),
        metadata=None if batch.metadata is None else json.loads(batch.metadata),
    )
