"""A file of keys is read line by line, and no message shows what a line holds."""

import hashlib
import hmac
import logging
from pathlib import Path

import pytest

from rankonce.errors import OperationsError
from rankonce.serving.keys import ApiKey, KeyRing, read_keys

SECRET = "kIs3o0y8PqLw2ZrVt6nB"
OTHER = "9rTz5WcXe1uGh7JkMd4Q"


def write(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_keys_are_found_by_what_the_client_sends(tmp_path: Path) -> None:
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    ring = read_keys(
        write(
            tmp_path,
            f"# keys\n\nsearch:{SECRET}\nfeed:sha256:{digest}  requests_per_minute=6 "
            "tokens_per_minute=700 metrics adapters\n",
        )
    )
    assert ring.find(SECRET) == ApiKey(
        name="search", digest=hashlib.sha256(SECRET.encode()).digest()
    )
    feed = ring.find(OTHER)
    assert feed is not None
    assert (feed.name, feed.requests_per_minute, feed.tokens_per_minute) == ("feed", 6, 700)
    assert (feed.reads_metrics, feed.changes_adapters) == (True, True)
    for wrong in ("", SECRET[:-1], SECRET + "x", digest, f"sha256:{digest}", "search", "\udcff"):
        assert ring.find(wrong) is None


def test_a_key_may_hold_colons_and_equals_signs(tmp_path: Path) -> None:
    secret = "a:b=c:d=e:f=g:h=i"
    found = read_keys(write(tmp_path, f"search:{secret}")).find(secret)
    assert found is not None
    assert found.name == "search"


def test_two_keys_of_one_name_have_one_owner(tmp_path: Path) -> None:
    ring = read_keys(write(tmp_path, f"search:{SECRET}\nsearch:{OTHER}\n"))
    owners = [ring.find(secret) for secret in (SECRET, OTHER)]
    assert [key and key.name for key in owners] == ["search", "search"]


def test_every_digest_is_compared_whichever_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [f"key number {index:09d}" for index in range(7)]
    ring = KeyRing(
        [ApiKey(name=one, digest=hashlib.sha256(one.encode()).digest()) for one in secrets]
    )
    compared = []
    compare = hmac.compare_digest

    def count(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", count)
    for secret in (secrets[0], secrets[6], "none of them"):
        compared.clear()
        ring.find(secret)
        assert compared == [(32, 32)] * 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "should hold at least one key"),
        ("# nothing\n", "should hold at least one key"),
        (SECRET, "line 1: should begin with name:key"),
        (f"\n:{SECRET}", "line 2: should begin with name:key"),
        (f"na/me:{SECRET}", "line 1: should begin with name:key"),
        (f"a:{SECRET[:15]}", "line 1: a key should have at least 16 characters"),
        ("a:sha256:0123", "line 1: sha256: should be followed by 64 hex digits"),
        (f"a:{SECRET} request_per_minute=3", "line 1: what follows the key should be metrics"),
        (f"a:{SECRET} requests_per_minute=0", "line 1: what follows the key should be metrics"),
        (f"a:{SECRET} requests_per_minute=-1", "line 1: what follows the key should be metrics"),
        (f"a:{SECRET}\nb:{SECRET}", "a key stands there twice"),
        (f"a:{SECRET} tokens_per_minute=3\na:{OTHER}", "the keys of a should have the same limits"),
    ],
)
def test_a_fault_names_its_line_and_shows_no_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(OperationsError) as caught:
        read_keys(write(tmp_path, text))
    assert message in str(caught.value)
    assert SECRET[:15] not in str(caught.value)


@pytest.mark.parametrize(("mode", "num_warnings"), [(0o600, 0), (0o640, 0), (0o644, 1)])
def test_a_file_that_everyone_may_read_is_warned_of(
    tmp_path: Path, mode: int, num_warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read_keys(write(tmp_path, f"search:{SECRET}", mode))
    assert len(caplog.records) == num_warnings
