"""API keys: who may ask, and how much.

A file holds a line for each key, never the command line, which every process of a machine can
read. A line gives the key or its SHA-256, and what differs from the server's limits::

    # name : key, or sha256: and its digest in hex
    search:kIs3o0y8PqLw2ZrVt6nB
    feed:sha256:5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8
    bulk:9rTz5WcXe1uGh7JkMd4Q  requests_per_minute=60 tokens_per_minute=2000000
    prometheus:b7Yq0NfLs3Vx8TgKw1Rm  metrics
    release:Hc4Vt9LmQx2RkPz7WdNs  adapters

Two lines of one name are two keys of one owner, so that a key can be replaced without a gap.
"""

import hashlib
import hmac
import logging
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rankonce.errors import OperationsError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
# A digest is quick to compute, so what it hides has to be too long to be guessed.
_MIN_KEY_LENGTH = 16
_RIGHTS = ("metrics", "adapters")
_LIMITS = ("requests_per_minute", "tokens_per_minute")


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One key.

    Attributes:
        name: its owner; what the metrics, the logs and batches know of it.
        digest: SHA-256 of the key, which itself is not kept.
        requests_per_minute, tokens_per_minute: bounds of the owner; ``None`` leaves them to the
            server.
        reads_metrics: whether it opens ``/metrics``.
        changes_adapters: whether it may load and unload adapters.
    """

    name: str
    digest: bytes
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    reads_metrics: bool = False
    changes_adapters: bool = False


class KeyRing:
    """The keys of a server."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self.keys = tuple(keys)

    def find(self, secret: str) -> ApiKey | None:
        """Find the key that a client sent.

        Every digest is compared, each in constant time: how long it takes tells neither whether
        a key is there nor how much of it was right.
        """
        asked = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, asked):
                found = key
        return found


def read_keys(path: Path) -> KeyRing:
    """Read a file of keys.

    Raises:
        OperationsError: names the line that cannot be used and never shows what it holds.
        OSError: the file cannot be read.
    """
    if path.stat().st_mode & stat.S_IRWXO:
        logger.warning("%s: everyone on this machine may open it; chmod o= would keep it", path)
    keys: list[ApiKey] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            keys.append(_read_line(line, f"{path}, line {number}"))
    if not keys:
        raise OperationsError(f"{path}: should hold at least one key, a line name:key")
    _check_together(keys, path)
    return KeyRing(keys)


def _read_line(line: str, place: str) -> ApiKey:
    words = line.split()
    name, _, secret = words[0].partition(":")
    if not _NAME.fullmatch(name) or not secret:
        raise OperationsError(
            f"{place}: should begin with name:key, the name of letters, digits, dots, - and _"
        )
    limits: dict[str, int] = {}
    for word in words[1:]:
        option, _, value = word.partition("=")
        if word in _RIGHTS:
            continue
        if option not in _LIMITS or not value.isdecimal() or int(value) < 1:
            raise OperationsError(
                f"{place}: what follows the key should be {', '.join(_RIGHTS)}, "
                f"{' or '.join(f'{limit}=NUMBER' for limit in _LIMITS)}"
            )
        limits[option] = int(value)
    return ApiKey(
        name=name,
        digest=_read_digest(secret, place),
        requests_per_minute=limits.get("requests_per_minute"),
        tokens_per_minute=limits.get("tokens_per_minute"),
        reads_metrics="metrics" in words[1:],
        changes_adapters="adapters" in words[1:],
    )


def _read_digest(secret: str, place: str) -> bytes:
    kind, _, digest = secret.partition(":")
    if kind == "sha256":
        if not _DIGEST.fullmatch(digest):
            raise OperationsError(f"{place}: sha256: should be followed by 64 hex digits")
        return bytes.fromhex(digest)
    if len(secret) < _MIN_KEY_LENGTH:
        raise OperationsError(f"{place}: a key should have at least {_MIN_KEY_LENGTH} characters")
    return hashlib.sha256(secret.encode()).digest()


def _check_together(keys: Sequence[ApiKey], path: Path) -> None:
    if len({key.digest for key in keys}) < len(keys):
        raise OperationsError(f"{path}: a key stands there twice")
    for key in keys:
        for other in keys:
            if key.name == other.name and any(
                getattr(key, limit) != getattr(other, limit) for limit in _LIMITS
            ):
                raise OperationsError(f"{path}: the keys of {key.name} should have the same limits")
