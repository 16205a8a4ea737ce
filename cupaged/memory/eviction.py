"""Who goes: when a pool is full, which of the cached blocks that nobody reads gives way.

A policy answers that question and no other. What then happens to the block, dropped or moved to the CPU, is the
manager's affair. To try an idea of your own, write a class with the four methods of `EvictionPolicy` and pass it as
``BlockManager(eviction=YourClass)``; if your idea is "the smallest key goes first", derive from `KeyedPolicy` and
write one method.

Both structures here forget lazily. A block that is used again, or queued again, leaves its old entry where it is; the
entry carries a stamp, the block's current stamp is in an array, and an entry whose stamp is not current is passed
over. So nothing is searched for, and a stale place never decides.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cupaged.memory.allocator import as_index, whole_number

__all__ = [
    "BELADY_NEVER",
    "FIFO",
    "LFU",
    "LRU",
    "POLICIES",
    "BlockStats",
    "Cost",
    "EvictionPolicy",
    "KeyedPolicy",
    "Priority",
    "belady_hits",
    "make_policy",
    "next_uses",
]

Ids = NDArray[np.int32]
Index = NDArray[np.intp]
ONE, GONE = np.array(1), np.array(-1)


class BlockStats:
    """What is known about each block of a pool: one array a fact, written in bulk by the pool, read by policies.

    Attributes
    ----------
    clock : int
        The pool's time: one tick for each operation that names or releases blocks.
    last_access, published : int64 [num_blocks]
        When a reader of the block was last done with it, and when its content could first be found.
    access_count : int64 [num_blocks]
        How often its present content was put to use: 1 when it got its name, and 1 for each hit.
    depth : int32 [num_blocks]
        Its logical place in the sequence that wrote it: `depth * block_size` tokens came before it.
    priority : int32 [num_blocks]
        The highest priority of the sequences that used its present content.
    """

    def __init__(self, num_blocks: int, block_size: int = 16) -> None:
        self.num_blocks = whole_number("num_blocks", num_blocks, at_least=0)
        self.block_size = whole_number("block_size", block_size, at_least=1)
        self.clock = 0
        self.last_access = np.zeros(num_blocks, np.int64)
        self.published = np.zeros(num_blocks, np.int64)
        self.access_count = np.zeros(num_blocks, np.int64)
        self.depth = np.zeros(num_blocks, np.int32)
        self.priority = np.zeros(num_blocks, np.int32)

    def named(self, blocks: Index, depth: int | NDArray[Any], priority: int | NDArray[Any]) -> None:
        """Note that `blocks` hold new content, which can be found from now on."""
        self.clock += 1
        self.published[blocks] = self.clock
        self.access_count[blocks] = 1
        self.depth[blocks] = depth
        self.priority[blocks] = priority

    def hit(self, blocks: Index, priority: int = np.iinfo(np.int32).min) -> None:
        """Note that the content of `blocks` was used once more, by a sequence of this priority."""
        self.access_count[blocks] += ONE
        self.priority[blocks] = np.maximum(self.priority[blocks], priority)

    def accessed(self, blocks: Index) -> None:
        """Note that a reader of `blocks` is done with them: until then they were in use."""
        self.clock += 1
        self.last_access[blocks] = self.clock


class EvictionPolicy(Protocol):
    """The order in which unread cached blocks go. `blocks` are int32 vectors without repeats."""

    def add(self, blocks: Ids) -> None:
        """`blocks` have no reader now, in order; one that is here already takes the place that it deserves now."""

    def remove(self, blocks: Ids) -> None:
        """`blocks` have a reader again, or their content is gone; one that is not here is passed over."""

    def pop(self, n: int) -> Ids:
        """Remove and return the `n` blocks to evict, the first to go first; `n` is at most the number held."""

    def __len__(self) -> int:
        """Return the number of blocks held."""


class LRU:
    """Least recently used: the block that lost its last reader longest ago goes first.

    A queue in an array. A block's last use is the release that brought it here, so its place is the end; `_place`
    holds the place of its current entry. O(1) a block, amortised over the compaction of a full array.
    """

    def __init__(self, stats: BlockStats) -> None:
        self._queue = np.empty(2 * stats.num_blocks, np.int32)
        self._place = np.full(stats.num_blocks, -1, np.int64)
        self._head = self._tail = self._size = 0

    def add(self, blocks: Ids) -> None:
        """Put `blocks` at the end of the queue, in order."""
        if self._tail + len(blocks) > len(self._queue):
            self._compact()
        self._size += len(blocks) - int(np.count_nonzero(self._place[as_index(blocks)] >= 0))
        self._append(blocks)

    def remove(self, blocks: Ids) -> None:
        """Take `blocks` out of the queue."""
        index = as_index(blocks)
        self._size -= int(np.count_nonzero(self._place[index] >= 0))
        self._place[index] = GONE

    def pop(self, n: int) -> Ids:
        """Remove and return the `n` blocks at the head."""
        runs = []
        missing = min(n, self._size)
        while missing:
            stop = min(self._head + max(missing, 64), self._tail)
            current = self._current(self._head, stop).nonzero()[0][:missing]
            runs.append(self._queue[self._head : stop][current])
            missing -= len(current)
            self._head = stop if missing else self._head + int(current[-1]) + 1
        popped = runs[0] if len(runs) == 1 else np.concatenate([*runs, np.empty(0, np.int32)])
        self._place[as_index(popped)] = GONE
        self._size -= len(popped)
        return popped

    def __len__(self) -> int:
        """Return the number of blocks held."""
        return self._size

    def _append(self, blocks: Ids) -> None:
        stop = self._tail + len(blocks)
        self._queue[self._tail : stop] = blocks
        self._place[as_index(blocks)] = np.arange(self._tail, stop)
        self._tail = stop

    def _current(self, start: int, stop: int) -> NDArray[np.bool_]:
        return self._place[as_index(self._queue[start:stop])] == np.arange(start, stop)

    def _compact(self) -> None:
        """Close the gaps that outdated entries left; at most num_blocks entries stay, half of the array."""
        live = self._queue[self._head : self._tail][self._current(self._head, self._tail)]
        self._head = self._tail = 0
        self._append(live)


class KeyedPolicy:
    """The block with the smallest key goes first; among equals, the one that was added first.

    Write `key`. It is asked when a block is added, so it must depend on nothing that changes while the block waits.
    O(log n) a block: a heap whose outdated entries are dropped once they outnumber the current ones.
    """

    def __init__(self, stats: BlockStats) -> None:
        self.stats = stats
        self._heap: list[tuple[Any, int, int]] = []
        self._ticket = np.zeros(stats.num_blocks, np.int64)  # of a block's current entry; 0: none
        self._issued = self._size = 0

    def key(self, blocks: Ids) -> Sequence[Any]:
        """Return one sortable key for each block."""
        raise NotImplementedError

    def add(self, blocks: Ids) -> None:
        """Queue `blocks` by their keys of now; if a key raises, or cannot be compared, nothing is queued."""
        tickets = np.arange(self._issued + 1, self._issued + len(blocks) + 1)
        self._issued += len(blocks)
        for entry in zip(self.key(blocks), tickets.tolist(), blocks.tolist(), strict=True):
            heapq.heappush(self._heap, entry)  # an entry whose ticket no block has is passed over
        self._size += len(blocks) - int(np.count_nonzero(self._ticket[blocks]))
        self._ticket[blocks] = tickets
        if len(self._heap) > 2 * self._size + 64:
            self._compact()

    def remove(self, blocks: Ids) -> None:
        """Forget `blocks`."""
        self._size -= int(np.count_nonzero(self._ticket[blocks]))
        self._ticket[blocks] = 0

    def pop(self, n: int) -> Ids:
        """Remove and return the `n` blocks with the smallest keys."""
        popped: list[int] = []
        wanted = min(n, self._size)
        while len(popped) < wanted:
            key, ticket, block = heapq.heappop(self._heap)
            if self._ticket[block] == ticket:
                popped.append(block)
                self._evicted(key)
        blocks = np.array(popped, np.int32)
        self.remove(blocks)
        return blocks

    def __len__(self) -> int:
        """Return the number of blocks held."""
        return self._size

    def _evicted(self, key: Any) -> None:
        """Learn from the key of a block that goes; most policies have no use for it."""

    def _compact(self) -> None:
        self._heap = [entry for entry in self._heap if self._ticket[entry[2]] == entry[1]]
        heapq.heapify(self._heap)


class FIFO(KeyedPolicy):
    """First in, first out: the oldest content goes first, however often it is used."""

    def key(self, blocks: Ids) -> list[int]:
        """Return when the content could first be found."""
        return self.stats.published[blocks].tolist()


class LFU(KeyedPolicy):
    """Least frequently used: the content with the fewest uses goes first; among equals, the least recent."""

    def key(self, blocks: Ids) -> list[tuple[int, int]]:
        """Return uses, then last use."""
        return _pairs(self.stats.access_count[blocks], self.stats.last_access[blocks])


class Priority(KeyedPolicy):
    """The lowest priority goes first; among equals, the least recent."""

    def key(self, blocks: Ids) -> list[tuple[int, int]]:
        """Return priority, then last use."""
        return _pairs(self.stats.priority[blocks], self.stats.last_access[blocks])


class Cost(KeyedPolicy):
    """The text that is cheapest to compute again goes first, and one that waits grows cheaper (GreedyDual).

    A token's computation has a part that is the same for every token and a part, attention, that grows with the tokens
    before it. Blocks deep in a long context therefore cost more. What follows a block in its text cannot be found
    without it, so no block counts for less than those that follow it: a text goes from its end. A pure order by cost
    would keep an expensive block that nobody wants for ever; GreedyDual [1]_ adds to each key the key of the block
    evicted last, so that a block lives on after its last use for a time that its cost earns.

    Parameters
    ----------
    stats : BlockStats
        The pool's facts.
    par_context : float
        Context length, in tokens, at which attention costs as much as the rest. A model with `P` parameters, `L`
        layers, `H` heads of size `D` spends `2 P` FLOP a token on the rest and `4 L H D` for each token of context:
        ``par_context = P / (2 L H D)``, some 30,000 for 8 billion parameters in 32 layers of 32 heads of 128.

    References
    ----------
    .. [1] N. E. Young, "The k-server dual and loose competitiveness for paging", Algorithmica 11, 1994;
           P. Cao and S. Irani, "Cost-aware WWW proxy caching algorithms", USITS 1997.
    """

    def __init__(self, stats: BlockStats, par_context: float = 30_000.0) -> None:
        super().__init__(stats)
        self.par_context = par_context
        self._inflation = 0.0

    def key(self, blocks: Ids) -> list[float]:
        """Return the inflation of now plus the block's cost, where a block without context costs 1.

        Blocks that are added together come from the end of their text to its beginning, see `BlockPool.release`.
        """
        context = self.stats.depth[blocks].astype(np.float64) * self.stats.block_size
        return (self._inflation + 1.0 + np.maximum.accumulate(context) / self.par_context).tolist()

    def _evicted(self, key: float) -> None:
        self._inflation = key


POLICIES: dict[str, Callable[[BlockStats], EvictionPolicy]] = {
    "lru": LRU, "fifo": FIFO, "lfu": LFU, "priority": Priority, "cost": Cost,
}  # fmt: skip


def make_policy(eviction: str | Callable[[BlockStats], EvictionPolicy], stats: BlockStats) -> EvictionPolicy:
    """Return a new policy: one of `POLICIES` by name, or whatever a callable makes of the pool's facts."""
    if callable(eviction):
        return eviction(stats)
    if not isinstance(eviction, str) or eviction not in POLICIES:
        raise ValueError(f"eviction must be one of {', '.join(POLICIES)} or a callable, got {eviction!r}")
    return POLICIES[eviction](stats)


BELADY_NEVER = np.iinfo(np.int64).max


def next_uses(accesses: ArrayLike) -> NDArray[np.int64]:
    """Return, for each access, the index of the next access to the same item, or `BELADY_NEVER`.

    Parameters
    ----------
    accesses : int [num_accesses]
        What is asked for, in order.
    """
    items = np.asarray(accesses)
    order = np.argsort(items, kind="stable")
    same = items[order[1:]] == items[order[:-1]]
    following = np.full(len(items), BELADY_NEVER, np.int64)
    following[order[:-1][same]] = order[1:][same]
    return following


def belady_hits(accesses: ArrayLike, capacity: int) -> NDArray[np.bool_]:
    """Return which accesses hit when the item whose next use is farthest away always goes: no policy hits more.

    An item that is not stored is stored on access if room is found, and the item that gives way may be itself.
    O(n log n).

    Parameters
    ----------
    accesses : int [num_accesses]
        What is asked for, in order.
    capacity : int
        Items that fit.

    References
    ----------
    L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
    """
    capacity = whole_number("capacity", capacity, at_least=0)
    items = np.asarray(accesses).tolist()
    following = next_uses(accesses).tolist()
    stored: dict[Any, int] = {}  # item -> its next use
    farthest: list[tuple[int, Any]] = []  # (-next use, item), with outdated entries
    hits = np.zeros(len(items), bool)
    for now, (item, then) in enumerate(zip(items, following, strict=True)):
        hits[now] = item in stored
        stored[item] = then
        heapq.heappush(farthest, (-then, item))
        while len(stored) > capacity:
            negated, loser = heapq.heappop(farthest)
            if stored.get(loser) == -negated:
                del stored[loser]
    return hits


def _pairs(first: NDArray[Any], second: NDArray[Any]) -> list[tuple[int, int]]:
    return list(zip(first.tolist(), second.tolist(), strict=True))
