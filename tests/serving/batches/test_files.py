"""Files come in, are listed, given back and deleted as OpenAI's are."""

import socket
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serving.batches.conftest import Keeper, keeping, line
from tests.serving.conftest import Served
from tests.serving.test_failures import error_of


def form(*parts: tuple[str, str], boundary: str = "xyz") -> bytes:
    """A form written by hand: each part a disposition and a content."""
    text = "".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n{content}\r\n"
        for head, content in parts
    )
    return f"{text}--{boundary}--\r\n".encode()


FILE = ('name="file"; filename="a.jsonl"', "{}")
PURPOSE = ('name="purpose"', "batch")
KIND = {"Content-Type": "multipart/form-data; boundary=xyz"}


def test_a_file_comes_back_as_it_was(keeper: Keeper) -> None:
    # Line ends, a boundary's beginning and bytes that are no text all stay.
    content = b'{"a": 1}\r\n--xyz\r\n\x00\xff' * 20_000
    before = int(time.time())
    file = keeper.openai.files.create(file=("häßlich.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (len(content), "häßlich.jsonl", "batch")
    assert before <= file.created_at <= time.time()
    assert file.expires_at == file.created_at + 30 * 86_400
    assert keeper.openai.files.retrieve(file.id) == file
    assert keeper.openai.files.content(file.id).read() == content
    assert (keeper.folder / "files" / file.id).read_bytes() == content


def test_a_deleted_file_is_gone(keeper: Keeper) -> None:
    file_id = keeper.upload({})
    deleted = keeper.openai.files.delete(file_id)
    assert (deleted.id, deleted.deleted) == (file_id, True)
    for call in ("retrieve", "content", "delete"):
        with pytest.raises(openai.NotFoundError):
            getattr(keeper.openai.files, call)(file_id)
    assert not (keeper.folder / "files" / file_id).exists()


def test_files_are_listed_page_by_page(tmp_path: Path) -> None:
    with keeping(tmp_path) as keeper:
        ids = [keeper.upload({"n": n}) for n in range(5)]
        pages = keeper.openai.files.list(limit=2)
        assert [file.id for file in pages] == ids[::-1]
        assert [file.id for file in pages.data] == ids[:2:-1]
        assert [file.id for file in keeper.openai.files.list(order="asc", limit=3)] == ids
        assert [file.id for file in keeper.openai.files.list(purpose="batch_output")] == []
        last = keeper.http.get("/v1/files", params={"limit": 5}).json()
        assert (last["first_id"], last["last_id"], last["has_more"]) == (ids[4], ids[0], False)
        error = error_of(keeper.http.get("/v1/files", params={"after": "file-no"}), 400)
        assert error["param"] == "after"


def test_its_owner_says_how_long_a_file_is_kept(keeper: Keeper) -> None:
    file = keeper.openai.files.create(
        file=b"{}", purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
    )
    assert file.expires_at == file.created_at + 7200
    with pytest.raises(openai.BadRequestError) as caught:
        keeper.openai.files.create(
            file=b"{}", purpose="batch", expires_after={"anchor": "created_at", "seconds": 60}
        )
    assert caught.value.param == "expires_after.seconds"


@pytest.mark.parametrize(
    ("parts", "param", "message"),
    [
        ([FILE], "purpose", 'should be "batch"'),
        ([FILE, ('name="purpose"', "fine-tune")], "purpose", 'should be "batch"'),
        ([PURPOSE], "file", "missing"),
        ([FILE, PURPOSE, FILE], None, "each once"),
        ([FILE, PURPOSE, PURPOSE], None, "each once"),
        ([FILE, PURPOSE, ('name="x"', "y")], None, "'x'"),
        ([FILE, PURPOSE, ('name="expires_after[seconds]"', "7200")], "expires_after.anchor", ""),
    ],
)
def test_a_form_with_a_fault_is_refused(
    parts: list[tuple[str, str]], param: str | None, message: str, keeper: Keeper
) -> None:
    response = keeper.http.post("/v1/files", content=form(*parts), headers=KIND)
    error = error_of(response, 400)
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (form(FILE, PURPOSE), "application/json"),
        (form(FILE, PURPOSE), "multipart/form-data"),
        (form(FILE, PURPOSE)[:-9], "multipart/form-data; boundary=xyz"),
        (form(FILE, PURPOSE), "multipart/form-data; boundary=zzz"),
        (b"", "multipart/form-data; boundary=xyz"),
        (form(FILE, PURPOSE), "multipart/form-data; boundary=" + "x" * 300),
    ],
)
def test_what_is_no_form_is_refused(content: bytes, kind: str, keeper: Keeper) -> None:
    response = keeper.http.post("/v1/files", content=content, headers={"Content-Type": kind})
    assert "multipart/form-data with the parts" in error_of(response, 400)["message"]


@pytest.mark.parametrize("is_declared", [True, False])
def test_too_large_a_file_is_refused_and_leaves_nothing(keeper: Keeper, is_declared: bool) -> None:
    kept = sorted(keeper.folder.glob("*/*"))
    head = form(FILE, PURPOSE)[:-2].replace(b"{}", b"M" * 1_000_001)
    content: Any = (
        head if is_declared else (head[at : at + 9999] for at in range(0, len(head), 9999))
    )
    response = keeper.http.post("/v1/files", content=content, headers=KIND)
    error = error_of(response, 413)
    assert error["message"] == "file: should have at most 1,000,000 bytes"
    fields = form(('name="purpose"', "b" * 70_000), FILE)
    error = error_of(keeper.http.post("/v1/files", content=fields, headers=KIND), 413)
    assert "65,536 bytes beside file" in error["message"]
    assert sorted(keeper.folder.glob("*/*")) == kept


def test_without_a_data_folder_the_answer_says_how_to_have_one(plain: Served) -> None:
    for method, path in [
        ("GET", "/v1/files"),
        ("GET", "/v1/files/file-1"),
        ("GET", "/v1/files/file-1/content"),
        ("DELETE", "/v1/files/file-1"),
        ("GET", "/v1/batches"),
        ("GET", "/v1/batches/batch_1"),
        ("POST", "/v1/batches/batch_1/cancel"),
    ]:
        error = error_of(plain.http.request(method, path), 404)
        assert error["code"] == "batches_off"
        assert "--data-dir FOLDER" in error["message"]
    with pytest.raises(openai.NotFoundError, match="--data-dir"):
        plain.openai.files.create(file=b"{}", purpose="batch")
    with pytest.raises(openai.NotFoundError, match="--data-dir"):
        plain.openai.batches.create(
            input_file_id="file-1", endpoint="/v1/completions", completion_window="24h"
        )


def test_a_file_that_a_batch_reads_cannot_be_deleted(tmp_path: Path) -> None:
    with keeping(tmp_path, max_lines_in_flight=1) as keeper:
        body = {"prompt": ["M " * 300] * 20, "max_tokens": 1}
        lines = [line(str(n), "/v1/completions", body) for n in range(40)]
        batch = keeper.create("/v1/completions", *lines)
        with pytest.raises(openai.ConflictError, match="a batch reads this file"):
            keeper.openai.files.delete(batch.input_file_id)
        keeper.openai.batches.cancel(batch.id)
        assert keeper.wait(batch.id).status == "cancelled"
        assert keeper.openai.files.delete(batch.input_file_id).deleted


def test_an_upload_that_breaks_off_leaves_nothing(keeper: Keeper) -> None:
    files = list(keeper.openai.files.list())
    half = form(FILE, PURPOSE).replace(b"{}", b"M" * 100_000)[:50_000]
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: {KIND['Content-Type']}\r\n"
    address = (keeper.http.base_url.host, keeper.http.base_url.port or 0)
    partial = keeper.folder / "partial"
    with socket.create_connection(address) as connection:
        connection.sendall(f"{head}Content-Length: 100200\r\n\r\n".encode() + half)
        while not any(path.stat().st_size for path in partial.iterdir()):
            time.sleep(0.01)
    end = time.monotonic() + 10
    while list(partial.iterdir()):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert list(keeper.openai.files.list()) == files
