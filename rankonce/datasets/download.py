"""Files from the web: resumed where they were cut, checked against their checksums, unpacked.

    FOLDER/name         a file that came whole
    FOLDER/name.part    one that did not yet; ``name.part.version`` tells which version it is of
    FOLDER/SHA256SUMS   what came, as ``sha256sum --check`` reads it

A file of known checksum is checked when it has come. Of every other one the SHA-256 is noted then,
and a file that is there already must still have it.
"""

import errno
import hashlib
import http.client
import shutil
import ssl
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from rankonce.errors import DataError

# name, bytes so far, bytes in all where they are known
Progress = Callable[[str, int, int | None], None]

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60
# Times that a cut connection is taken up again within one run.
_ATTEMPTS = 4
_PAUSE_SECONDS = 1.0
_SUMS = "SHA256SUMS"
_SCHEMES = ("http://", "https://")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file that can be downloaded.

    Attributes:
        name: under which it is stored.
        addresses: where it lies, the first choice first; the others are mirrors.
        checksum: ``"md5:..."`` or ``"sha256:..."`` as its publisher gives it; empty where none is
            published, or where the file changes from time to time.
    """

    name: str
    addresses: tuple[str, ...]
    checksum: str = ""


class _CutError(Exception):
    """The connection ended before the file did."""


def fetch_file(
    remote: RemoteFile,
    folder: Path,
    *,
    progress: Progress = lambda *_: None,
    pause_seconds: float = _PAUSE_SECONDS,
) -> Path:
    """Bring a file into a folder, or check the one that is there.

    Args:
        progress: is told of every piece.
        pause_seconds: before a cut connection is taken up again; doubled each time.

    Raises:
        DataError: no address answers, the connection is cut again and again (what came is kept for
            the next call), the disk is full, or a checksum differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / remote.name
    if target.exists():
        _check_known(target, remote)
        return target
    part = folder / f"{remote.name}.part"
    faults = []
    for address in remote.addresses:
        try:
            _fetch(address, part, remote.name, progress, pause_seconds)
        except DataError as error:
            faults.append(str(error))
            continue
        _check_checksum(part, remote)
        _note_sum(folder, remote.name, sha256_of(part))
        part.replace(target)
        _version_of(part).unlink(missing_ok=True)
        return target
    raise DataError("; ".join(faults))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        DataError: it cannot be read.
    """
    return _digest(path, "sha256")


def unpack_zip(archive: Path, folder: Path, wanted: Sequence[str]) -> list[Path]:
    """Unpack the members of an archive whose names match one of the patterns.

    Args:
        wanted: patterns of file names, such as ``"*.csv"``; the folders do not matter.

    Raises:
        DataError: it is no archive, is damaged, does not fit the disk, or has a member that would
            leave the folder; nothing is unpacked then.
    """
    paths = []
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = [member for member in zipped.infolist() if not member.is_dir()]
            for member in zipped.infolist():
                _check_member(archive, member)
            chosen = [
                member
                for member in members
                if any(fnmatch(PurePosixPath(member.filename).name, one) for one in wanted)
            ]
            _check_space(folder, sum(member.file_size for member in chosen), str(archive))
            for member in chosen:
                path = folder.joinpath(*PurePosixPath(member.filename).parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                with zipped.open(member) as packed, path.open("xb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, _CHUNK)
                paths.append(path)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{archive}: is not a whole zip archive: {error}") from error
    except OSError as error:
        raise _disk_fault(error, archive) from error
    return paths


def _fetch(address: str, part: Path, name: str, progress: Progress, pause_seconds: float) -> None:
    if not address.startswith(_SCHEMES):
        raise DataError(f"{address}: should begin with http:// or https://")
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _fetch_rest(address, part, name, progress)
            return
        except _CutError as error:
            if attempt == _ATTEMPTS:
                raise DataError(
                    f"{address}: was cut after {_size(part):,} bytes ({error}); what came is kept, "
                    "run the command again to go on"
                ) from error
            time.sleep(pause_seconds * 2 ** (attempt - 1))


def _fetch_rest(address: str, part: Path, name: str, progress: Progress) -> None:
    """Append what is missing, or begin anew where the server has another version now."""
    start = _size(part)
    version = _version_of(part)
    headers = {"User-Agent": "rankonce", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if version.exists():
            headers["If-Range"] = version.read_text(encoding="latin-1")
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, headers=headers), timeout=_TIMEOUT_SECONDS
        ) as response:
            if response.status != 206:
                start = 0
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                part.unlink()
                raise _CutError("the server sent another part than was asked for")
            _write_version(version, response.headers)
            length = response.headers.get("Content-Length")
            total = start + int(length) if length and length.isdigit() else None
            _check_space(part.parent, (total or 0) - start, address)
            _copy(response, part, start, total, lambda done: progress(name, done, total))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:
            # Longer than what the server has: of another version.
            part.unlink()
            raise _CutError("what came before does not fit the file") from error
        if error.code >= 500 or error.code == 429:
            raise _CutError(f"HTTP {error.code} {error.reason}") from error
        hint = "; the file may have moved" if error.code in (404, 410) else ""
        raise DataError(f"{address}: HTTP {error.code} {error.reason}{hint}") from error
    except urllib.error.URLError as error:
        if start:
            raise _CutError(str(error.reason)) from error
        raise DataError(
            f"{address}: cannot be reached: {error.reason}; without a network give files that are "
            "at hand"
        ) from error
    except (http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError) as error:
        raise _CutError(str(error) or type(error).__name__) from error
    except OSError as error:
        raise _disk_fault(error, part) from error


def _copy(
    response: http.client.HTTPResponse,
    part: Path,
    start: int,
    total: int | None,
    tell: Callable[[int], None],
) -> None:
    done = start
    tell(done)
    with part.open("r+b" if start else "wb") as file:
        file.seek(start)
        while piece := response.read(_CHUNK):
            file.write(piece)
            done += len(piece)
            tell(done)
    if total is not None and done < total:
        raise _CutError(f"{done:,} of {total:,} bytes")


def _write_version(path: Path, headers: http.client.HTTPMessage) -> None:
    tag = headers.get("ETag", "")
    # A weak tag says that two versions mean the same, not that their bytes are the same.
    version = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")
    if version:
        path.write_text(version, encoding="latin-1")
    else:
        path.unlink(missing_ok=True)


def _version_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_known(path: Path, remote: RemoteFile) -> None:
    sums = _read_sums(path.parent)
    if remote.name not in sums:
        _check_checksum(path, remote, keep=True)
        _note_sum(path.parent, remote.name, sha256_of(path))
    elif sha256_of(path) != sums[remote.name]:
        raise DataError(
            f"{path}: has changed since it was downloaded (see {_SUMS} beside it); delete it to "
            "download it again"
        )


def _check_checksum(path: Path, remote: RemoteFile, *, keep: bool = False) -> None:
    if not remote.checksum:
        return
    algorithm, _, expected = remote.checksum.partition(":")
    found = _digest(path, algorithm)
    if found != expected:
        if not keep:
            path.unlink()
            _version_of(path).unlink(missing_ok=True)
        raise DataError(
            f"{remote.name}: should have the {algorithm} checksum {expected}, has {found}; "
            f"{'delete it to' if keep else 'it was deleted,'} download it again"
        )


def _digest(path: Path, algorithm: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(
                file, lambda: hashlib.new(algorithm, usedforsecurity=False)
            ).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _read_sums(folder: Path) -> dict[str, str]:
    path = folder / _SUMS
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _note_sum(folder: Path, name: str, digest: str) -> None:
    sums = {**_read_sums(folder), name: digest}
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    (folder / _SUMS).write_text(text, encoding="utf-8")


def _check_member(archive: Path, member: zipfile.ZipInfo) -> None:
    name = member.filename
    path = PurePosixPath(name)
    leaves = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
    if leaves or stat.S_ISLNK(member.external_attr >> 16):
        raise DataError(f"{archive}: member {name!r} would leave the folder; nothing was unpacked")


def _check_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(f"{what}: needs {needed:,} bytes in {folder}, {free:,} are free")


def _disk_fault(error: OSError, path: Path) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"{path}: the disk is full; what came is kept")
    return DataError(f"{path}: {error.strerror or error}")
