"""Keys and values of prefixes, kept across requests within a bound of bytes."""

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

# Per layer the keys and values of a prefix, P x G x K each, positions already applied.
KeysValues = list[tuple[Tensor, Tensor]]
_Key = tuple[str | None, tuple[int, ...]]


@dataclass(kw_only=True)
class CacheCounts:
    """What the cache did so far.

    Attributes:
        num_bytes: bytes held now.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    num_bytes: int = 0


class PrefixCache:
    """Least recently used prefixes go first when the bound is reached.

    The same tokens have other keys and values under another adapter, so both are looked up.

    Args:
        max_bytes: bound on the tensors held; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.counts = CacheCounts()
        self._entries: OrderedDict[_Key, KeysValues] = OrderedDict()

    def get(self, prefix_ids: tuple[int, ...], adapter: str | None = None) -> KeysValues | None:
        """Return the keys and values of a prefix under an adapter if they are known."""
        entry = self._entries.get((adapter, prefix_ids))
        if entry is None:
            self.counts.misses += 1
            return None
        self.counts.hits += 1
        self._entries.move_to_end((adapter, prefix_ids))
        return entry

    def put(
        self, prefix_ids: tuple[int, ...], entry: KeysValues, adapter: str | None = None
    ) -> None:
        """Keep a prefix, unless it alone is over the bound."""
        size = _num_bytes(entry)
        if size > self.max_bytes or (adapter, prefix_ids) in self._entries:
            return
        self._entries[adapter, prefix_ids] = entry
        self.counts.num_bytes += size
        while self.counts.num_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.counts.num_bytes -= _num_bytes(oldest)
            self.counts.evictions += 1

    def drop(self, adapter: str | None) -> None:
        """Forget every prefix under an adapter, whose weights have changed or gone."""
        for key in [key for key in self._entries if key[0] == adapter]:
            self.counts.num_bytes -= _num_bytes(self._entries.pop(key))

    def __len__(self) -> int:
        return len(self._entries)


def _num_bytes(entry: KeysValues) -> int:
    return sum(tensor.nbytes for layer in entry for tensor in layer)
