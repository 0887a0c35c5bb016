"""Downloads from a server on this machine: cut, changed, missing, wrong, and full disks."""

import errno
import hashlib
import os
import shutil
import stat
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rankonce.datasets.download import RemoteFile, fetch_file, unpack_zip
from rankonce.errors import DataError

CONTENT = bytes(range(256)) * 9000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``content`` at any path but /missing; tests change how.

    Attributes:
        cuts: bytes after which the next answers end.
        ranges: what was asked for, request by request.
    """

    content = CONTENT
    version: str | None = '"v1"'
    takes_ranges = True
    fails_with = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cuts: list[int] = []
        self.ranges: list[str | None] = []

    def address(self, path: str = "/file.bin") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        if self.path == "/missing":
            self.send_error(404)
            return
        if self.server.fails_with:
            self.send_error(self.server.fails_with)
            return
        content, start = self.server.content, 0
        same = self.headers.get("If-Range") in (None, self.server.version)
        if asked and self.server.takes_ranges and same:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        if self.server.version:
            self.send_header("ETag", self.server.version)
        self.end_headers()
        end = start + self.server.cuts.pop(0) if self.server.cuts else len(content)
        self.wfile.write(content[start:end])
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Keep stderr clean."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def remote(server: Server, path: str = "/file.bin", **facts: Any) -> RemoteFile:
    return RemoteFile(name="file.bin", addresses=(server.address(path),), **facts)


def fetch(file: RemoteFile, folder: Path, **options: Any) -> Path:
    return fetch_file(file, folder, pause_seconds=0, **options)


def test_a_file_comes_whole_and_its_sum_is_noted(server: Server, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    path = fetch(remote(server), tmp_path, progress=lambda *one: told.append(one))
    assert path.read_bytes() == CONTENT
    assert sorted(os.listdir(tmp_path)) == ["SHA256SUMS", "file.bin"]
    assert (tmp_path / "SHA256SUMS").read_text() == f"{SHA256}  file.bin\n"
    assert told[-1] == ("file.bin", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


@pytest.mark.parametrize("version", ['"v1"', None])
def test_a_cut_connection_goes_on_where_it_was(
    server: Server, tmp_path: Path, version: str | None
) -> None:
    server.cuts, server.version = [1000, 70_000], version
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000-", "bytes=71000-"]


def test_what_came_is_kept_for_the_next_run(server: Server, tmp_path: Path) -> None:
    server.cuts = [100] * 4
    with pytest.raises(DataError, match=r"was cut after 400 bytes .*run the command again"):
        fetch(remote(server), tmp_path)
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:400]
    assert not (tmp_path / "file.bin").exists()
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=400-"


def test_a_file_that_changed_meanwhile_is_not_mixed(server: Server, tmp_path: Path) -> None:
    server.cuts = [5000] * 4
    with pytest.raises(DataError):
        fetch(remote(server), tmp_path)
    server.content, server.version = CONTENT[::-1], '"v2"'
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT[::-1]


def test_a_part_longer_than_the_file_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.cuts, server.takes_ranges = [1000], False
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_published_checksum_is_compared(server: Server, tmp_path: Path, algorithm: str) -> None:
    right = hashlib.new(algorithm, CONTENT).hexdigest()
    fetch(remote(server, checksum=f"{algorithm}:{right}"), tmp_path / "right")
    wrong = right[::-1]
    with pytest.raises(DataError, match=f"should have the {algorithm} checksum {wrong}"):
        fetch(remote(server, checksum=f"{algorithm}:{wrong}"), tmp_path / "wrong")
    assert os.listdir(tmp_path / "wrong") == []


def test_a_file_that_is_there_is_checked_and_not_asked_for(server: Server, tmp_path: Path) -> None:
    path = fetch(remote(server), tmp_path)
    assert fetch(remote(server), tmp_path) == path
    assert len(server.ranges) == 1
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match="has changed since it was downloaded"):
        fetch(remote(server), tmp_path)


def test_a_file_put_there_by_hand_is_checked(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"other")
    with pytest.raises(DataError, match="delete it to download it again"):
        fetch(remote(server, checksum=f"sha256:{SHA256}"), tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == b"other"


def test_404_names_the_address_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/missing: HTTP 404 .*may have moved"):
        fetch(remote(server, "/missing"), tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_mirror_is_asked_when_the_first_address_fails(server: Server, tmp_path: Path) -> None:
    both = RemoteFile(
        name="file.bin", addresses=(server.address("/missing"), server.address("/there"))
    )
    assert fetch(both, tmp_path).read_bytes() == CONTENT


def test_a_failing_server_is_asked_again_then_named(server: Server, tmp_path: Path) -> None:
    server.fails_with = 503
    with pytest.raises(DataError, match="HTTP 503"):
        fetch(remote(server), tmp_path)
    assert len(server.ranges) == 4


def test_without_a_network_the_message_says_what_to_do(tmp_path: Path) -> None:
    nobody = RemoteFile(name="file.bin", addresses=("http://127.0.0.1:9/file.bin",))
    with pytest.raises(DataError, match=r"cannot be reached: .*files that are at hand"):
        fetch(nobody, tmp_path)


def test_only_web_addresses_are_opened(tmp_path: Path) -> None:
    local = RemoteFile(name="file.bin", addresses=("file:///etc/hostname",))
    with pytest.raises(DataError, match="should begin with http"):
        fetch(local, tmp_path)


def test_a_file_larger_than_the_disk_is_refused_at_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = type("Usage", (), {"free": 10})()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    with pytest.raises(DataError, match=r"needs 2,304,000 bytes .* 10 are free"):
        fetch(remote(server), tmp_path)


def test_a_disk_that_fills_up_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rankonce.datasets.download._copy", full)
    with pytest.raises(DataError, match="the disk is full"):
        fetch(remote(server), tmp_path)


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return path


def test_wanted_members_are_unpacked(tmp_path: Path) -> None:
    members = {"set/a.csv": b"1", "set/deep/b.csv": b"22", "set/README": b"no"}
    zipped = archive(tmp_path / "set.zip", members)
    paths = unpack_zip(zipped, tmp_path / "", ["*.csv"])
    names = [str(path.relative_to(tmp_path)) for path in paths]
    assert names == ["set/a.csv", "set/deep/b.csv"]
    assert (tmp_path / "set/deep/b.csv").read_bytes() == b"22"
    assert not (tmp_path / "set/README").exists()


@pytest.mark.parametrize(
    "name", ["../out.csv", "a/../../out.csv", "/tmp/out.csv", "a\\..\\out.csv", "C:out.csv"]
)
def test_a_member_that_would_leave_the_folder_stops_everything(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    zipped = archive(tmp_path / "bad.zip", {"good.csv": b"1", name: b"2"})
    with pytest.raises(DataError, match="would leave the folder; nothing was unpacked"):
        unpack_zip(zipped, folder, ["*.csv"])
    assert os.listdir(folder) == []


def test_a_link_in_an_archive_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.csv")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as zipped:
        zipped.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="would leave the folder"):
        unpack_zip(tmp_path / "bad.zip", tmp_path, ["*.csv"])


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    whole = archive(tmp_path / "whole.zip", {"a.csv": CONTENT}).read_bytes()
    for name, content in (("cut.zip", whole[:-30]), ("none.zip", b"<html>")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: is not a whole zip archive"):
            unpack_zip(tmp_path / name, tmp_path, ["*.csv"])
    flipped = bytearray(whole)
    flipped[60] ^= 0xFF
    (tmp_path / "flipped.zip").write_bytes(flipped)
    with pytest.raises(DataError, match=r"flipped\.zip"):
        unpack_zip(tmp_path / "flipped.zip", tmp_path, ["*.csv"])
