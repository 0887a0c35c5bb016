"""Keys and values of prefixes, kept across requests within a bound of bytes.

Prefixes stand in a tree over blocks of tokens (a radix tree, as SGLang's RadixAttention by Zheng
et al. 2024 has it): what two of them begin with, an instruction or a history that has grown, is
kept once, and a prefix that is known in part is computed from there on. Every adapter and every
cache salt has a tree of its own, since the same tokens have other keys and values under another
adapter, and since tenants should not learn from a hit what others asked.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Per layer the keys and values of tokens, P x G x K each, positions already applied.
KeysValues = list[tuple[Tensor, Tensor]]
_Ids = tuple[int, ...]
_Tree = tuple[str | None, str | None]

# Prefixes part at multiples of this. Smaller blocks share more, larger ones are fewer to compare.
BLOCK_TOKENS = 16


@dataclass(kw_only=True)
class CacheCounts:
    """What the cache did so far.

    Attributes:
        hits, misses: look-ups that found at least a block, and those that found nothing.
        hit_tokens, asked_tokens: tokens found, and tokens looked for.
        num_bytes: bytes held now.
    """

    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    asked_tokens: int = 0
    evictions: int = 0
    num_bytes: int = 0


@dataclass(eq=False, kw_only=True)
class _Node:
    """A run of whole blocks, or the end of a prefix that fills no block.

    Attributes:
        children: by their first block, or by all of their tokens where those fill none.
    """

    ids: _Ids
    entry: KeysValues
    parent: "_Node | None"
    is_pinned: bool = False
    children: dict[_Ids, "_Node"] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.entry for tensor in layer)


class PrefixCache:
    """Least recently used tokens go first when the bound is reached, pinned ones last.

    Not safe for use by several threads at once.

    Args:
        max_bytes: bound on the tensors held; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.counts = CacheCounts()
        self._roots: dict[_Tree, _Node] = {}
        # A node stands behind its children: whatever is used, is used after what hangs on it, so
        # that the first node never has any.
        self._order: OrderedDict[_Node, None] = OrderedDict()
        self._pinned_order: OrderedDict[_Node, None] = OrderedDict()
        self._pins: set[_Ids] = set()

    def get(
        self, prefix_ids: _Ids, adapter: str | None = None, cache_salt: str | None = None
    ) -> KeysValues | None:
        """Return the keys and values of the first tokens of a prefix that are known, if any are.

        Args:
            adapter: whose weights they were computed with.
            cache_salt: only what was put under the same salt is found.

        Returns:
            Keys and values of the first n ≤ P tokens; one tensor a layer holds n rows.
        """
        found = list(self._walk(prefix_ids, adapter, cache_salt))
        num_tokens = sum(count for _, count in found)
        self.counts.asked_tokens += len(prefix_ids)
        self.counts.hit_tokens += num_tokens
        if not found:
            self.counts.misses += 1
            return None
        self.counts.hits += 1
        self._touch(node for node, _ in found)
        return _join([_rows(node.entry, 0, count) for node, count in found])

    def count_known(
        self, prefix_ids: _Ids, adapter: str | None = None, cache_salt: str | None = None
    ) -> int:
        """Count the first tokens of a prefix that ``get`` would find; changes nothing."""
        return sum(count for _, count in self._walk(prefix_ids, adapter, cache_salt))

    def put(
        self,
        prefix_ids: _Ids,
        entry: KeysValues,
        adapter: str | None = None,
        cache_salt: str | None = None,
        *,
        known: int = 0,
    ) -> None:
        """Keep a prefix, unless it alone is over the bound.

        Args:
            entry: keys and values of the tokens from ``known`` on.
            known: the first tokens, which the cache gave. Nothing is kept where they have gone
                since.
        """
        if sum(tensor.nbytes for layer in entry for tensor in layer) > self.max_bytes:
            return
        node = self._roots.get((adapter, cache_salt))
        if node is None:
            node = _Node(ids=(), entry=[], parent=None)
        root, path, place = node, list[_Node](), 0
        for child, count in list(self._walk(prefix_ids, adapter, cache_salt)):
            node = child if count == len(child.ids) else self._split(child, count)
            path.append(node)
            place += count
        if place < known:
            self._touch(path)
            return
        self._roots[adapter, cache_salt] = root
        for end in self._cuts(prefix_ids, place):
            child = _Node(
                ids=prefix_ids[place:end],
                entry=_copy(_rows(entry, place - known, end - known)),
                parent=node,
                is_pinned=(node is root or node.is_pinned)
                and end <= self._pinned_tokens(prefix_ids),
            )
            node.children[child.ids[:BLOCK_TOKENS]] = child
            self.counts.num_bytes += child.num_bytes
            node, place = child, end
            path.append(node)
        self._touch(path)
        while self.counts.num_bytes > self.max_bytes:
            self._evict()

    def pin(self, ids: _Ids) -> None:
        """Let what is put of a prefix that begins with these tokens go last, in any tree.

        For instructions, which a whole task shares. Whole blocks of them are kept.
        """
        whole = len(ids) // BLOCK_TOKENS * BLOCK_TOKENS
        if whole:
            self._pins.add(ids[:whole])

    def drop(self, adapter: str | None) -> None:
        """Forget what was computed with an adapter, whose weights have changed or gone."""
        for tree in [tree for tree in self._roots if tree[0] == adapter]:
            waiting = list(self._roots.pop(tree).children.values())
            while waiting:
                node = waiting.pop()
                waiting += node.children.values()
                self._order_of(node).pop(node)
                self.counts.num_bytes -= node.num_bytes

    def __len__(self) -> int:
        """Count the runs of tokens that are held."""
        return len(self._order) + len(self._pinned_order)

    def _walk(
        self, ids: _Ids, adapter: str | None, cache_salt: str | None
    ) -> Iterator[tuple[_Node, int]]:
        """Give the nodes along a prefix, each with how many of its tokens are the prefix's."""
        node, place = self._roots.get((adapter, cache_salt)), 0
        while node is not None:
            node = node.children.get(ids[place : place + BLOCK_TOKENS])
            if node is None:
                return
            count = _count_shared(node.ids, ids, place)
            yield node, count
            if count < len(node.ids):
                return
            place += count

    def _cuts(self, ids: _Ids, place: int) -> list[int]:
        """Say where the nodes end that keep what follows ``place``."""
        whole = len(ids) // BLOCK_TOKENS * BLOCK_TOKENS
        return sorted(end for end in {self._pinned_tokens(ids), whole, len(ids)} if end > place)

    def _pinned_tokens(self, ids: _Ids) -> int:
        return max((len(pin) for pin in self._pins if ids[: len(pin)] == pin), default=0)

    def _split(self, node: _Node, count: int) -> _Node:
        """Cut a node in two and return its beginning."""
        assert node.parent is not None, "a root holds no tokens"
        first = _Node(
            ids=node.ids[:count],
            entry=_copy(_rows(node.entry, 0, count)),
            parent=node.parent,
            is_pinned=node.is_pinned,
        )
        node.parent.children[first.ids[:BLOCK_TOKENS]] = first
        node.entry = _copy(_rows(node.entry, count, len(node.ids)))
        node.ids, node.parent = node.ids[count:], first
        first.children[node.ids[:BLOCK_TOKENS]] = node
        return first

    def _touch(self, path: Iterable[_Node]) -> None:
        for node in reversed(list(path)):
            order = self._order_of(node)
            order[node] = None
            order.move_to_end(node)

    def _order_of(self, node: _Node) -> "OrderedDict[_Node, None]":
        return self._pinned_order if node.is_pinned else self._order

    def _evict(self) -> None:
        node, _ = (self._order or self._pinned_order).popitem(last=False)
        assert node.parent is not None, "a root is in no order"
        assert not node.children, "children go before their parent"
        del node.parent.children[node.ids[:BLOCK_TOKENS]]
        self.counts.num_bytes -= node.num_bytes
        self.counts.evictions += 1


def _count_shared(run: _Ids, ids: _Ids, place: int) -> int:
    """Count the tokens that a run shares with a prefix from ``place`` on, in whole blocks."""
    other = ids[place : place + len(run)]
    if other == run:
        return len(run)
    low, high = 1, len(run) // BLOCK_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        count = middle * BLOCK_TOKENS
        if other[:count] == run[:count]:
            low = middle
        else:
            high = middle - 1
    return low * BLOCK_TOKENS


def _rows(entry: KeysValues, first: int, last: int) -> KeysValues:
    return [(k[first:last], v[first:last]) for k, v in entry]


def _copy(entry: KeysValues) -> KeysValues:
    # A view would keep the whole tensor alive.
    return [(k.clone(), v.clone()) for k, v in entry]


def _join(pieces: list[KeysValues]) -> KeysValues:
    if len(pieces) == 1:
        return pieces[0]
    return [
        (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer]))
        for layer in zip(*pieces, strict=True)
    ]
