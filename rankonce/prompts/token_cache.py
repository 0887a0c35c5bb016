"""Token ids of texts that come again, such as items of a catalogue, by their content."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

TokenIds = tuple[int, ...]
_Key = tuple[str | None, str]
# A key, an entry and a tuple; a reference for each id, since small ints are shared.
_ENTRY_BYTES, _ID_BYTES = 300, 8


@dataclass(frozen=True, kw_only=True)
class TokenCacheCounts:
    """What the cache did so far, and holds now."""

    hits: int
    misses: int
    evictions: int
    num_bytes: int
    num_entries: int


class TokenCache:
    """Least recently used texts go first when the bound is reached; several threads may share it.

    Args:
        max_bytes: bound on texts and ids, estimated; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[_Key, TokenIds] = OrderedDict()
        self._lock = Lock()
        self._hits = self._misses = self._evictions = self._num_bytes = 0

    def encode(
        self,
        texts: Sequence[str],
        encode: Callable[[Sequence[str]], list[TokenIds]],
        *,
        cache_salt: str | None = None,
    ) -> list[TokenIds]:
        """Encode texts, those that are unknown in one call.

        Args:
            encode: gives the ids of each text, whatever the others are.
            cache_salt: texts of different salts never share an entry.
        """
        if not self.max_bytes:
            return encode(texts)
        keys = [(cache_salt, text) for text in texts]
        with self._lock:
            found = {key: self._entries[key] for key in keys if key in self._entries}
            for key in found:
                self._entries.move_to_end(key)
            hits = sum(key in found for key in keys)
            self._hits += hits
            self._misses += len(keys) - hits
        unknown = list(dict.fromkeys(key for key in keys if key not in found))
        if unknown:
            new = dict(zip(unknown, encode([text for _, text in unknown]), strict=True))
            found |= new
            self._keep(new)
        return [found[key] for key in keys]

    @property
    def counts(self) -> TokenCacheCounts:
        """Return what was counted so far."""
        with self._lock:
            return TokenCacheCounts(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                num_bytes=self._num_bytes,
                num_entries=len(self._entries),
            )

    def _keep(self, new: dict[_Key, TokenIds]) -> None:
        with self._lock:
            for key, ids in new.items():
                if key not in self._entries:
                    self._entries[key] = ids
                    self._num_bytes += _num_bytes(key, ids)
            while self._num_bytes > self.max_bytes:
                self._num_bytes -= _num_bytes(*self._entries.popitem(last=False))
                self._evictions += 1


def _num_bytes(key: _Key, ids: TokenIds) -> int:
    return _ENTRY_BYTES + len(key[1]) + _ID_BYTES * len(ids)
