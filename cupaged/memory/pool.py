"""The blocks of one memory, GPU or CPU, and the three states that a block can be in.

- *free*: holds nothing; the allocator hands it out;
- *used*: one or more sequences read it, ``ref_count > 0``;
- *evictable*: nobody reads it, but its content has a name and may be wanted again; the eviction policy holds it.

A used block that loses its last reader becomes evictable if it is named, and free if not. Evictable blocks are as good
as free ones: `acquire` evicts what it lacks.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cupaged.errors import OutOfBlocksError
from cupaged.memory.allocator import BlockAllocator, as_index
from cupaged.memory.eviction import BlockStats, EvictionPolicy, make_policy
from cupaged.memory.prefix_cache import PrefixCache

__all__ = ["BlockPool"]

Ids = NDArray[np.int32]
NO_BLOCKS = np.empty(0, np.int32)
NO_BLOCKS.flags.writeable = False
ONE = np.array(1, np.int32)


class BlockPool:
    """Reference counts, named content and eviction over one allocator.

    Parameters
    ----------
    num_blocks, block_size : int
        Blocks in the pool, and token slots in a block.
    order, seed
        The order in which free blocks are handed out; see `BlockAllocator`.
    eviction : str or callable
        A policy by name, or a callable that makes one from the pool's `BlockStats`; see `cupaged.memory.eviction`.

    Attributes
    ----------
    ref_count : int32 [num_blocks]
        Sequences that read each block.
    stats : BlockStats
        When and how often each block was used.
    cache : PrefixCache
        Names of the blocks that have one.
    policy : EvictionPolicy
        Holds the evictable blocks.
    on_evict : callable or None
        Called with the blocks about to be evicted and their digests, while they still hold their content. What it
        raises reaches whoever asked for blocks; nothing is evicted then.
    num_evicted, peak_used : int
        Blocks evicted so far, and the most that were ever used at once.
    pressure, pressure_mark
        The event `pressure` is set whenever `acquire` leaves fewer than `pressure_mark` blocks free.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        order: str = "lifo",
        seed: int = 0,
        eviction: str | Callable[[BlockStats], EvictionPolicy] = "lru",
    ) -> None:
        self.allocator = BlockAllocator(num_blocks, order, seed)
        self.num_blocks = self.allocator.num_blocks
        self.ref_count = np.zeros(num_blocks, np.int32)
        self.stats = BlockStats(num_blocks, block_size)
        self.cache = PrefixCache(num_blocks)
        self.policy = make_policy(eviction, self.stats)
        self._own_policy = callable(eviction)  # written by somebody else: what it returns is looked at
        self.on_evict: Callable[[Ids, list[bytes]], None] | None = None
        self.num_evicted = 0
        self.peak_used = 0
        self.pressure = threading.Event()
        self.pressure_mark = 0

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return self.allocator.num_free

    @property
    def num_evictable(self) -> int:
        """Blocks that hold named content which nobody reads."""
        return len(self.policy)

    @property
    def num_available(self) -> int:
        """Blocks that `acquire` can deliver: free or evictable."""
        return self.allocator.num_free + len(self.policy)

    @property
    def num_used(self) -> int:
        """Blocks that a sequence reads."""
        return self.num_blocks - self.num_available

    def acquire(self, n: int) -> Ids:
        """Take `n` blocks for new content, each with one reader: free ones, then evictable ones if these are too few.

        Raises
        ------
        OutOfBlocksError
            If fewer than `n` are free or evictable; nothing is evicted.
        """
        free = self.allocator.num_free
        if n <= free:
            blocks = self.allocator.allocate(n)
        else:
            self.require(n)
            evicted = self._take_evictable(n - free)  # first: what a hook raises then leaves the free blocks free
            blocks = np.concatenate([self.allocator.allocate(free), evicted])
        self.ref_count[as_index(blocks)] = ONE
        self._note_use()
        return blocks

    def require(self, n: int, besides: Ids = NO_BLOCKS) -> None:
        """Raise `OutOfBlocksError` unless `n` blocks can be acquired and `besides`, cached ones, shared as well."""
        evictable = len(self.policy)
        if len(besides):
            evictable -= len(besides) - int(np.count_nonzero(self.ref_count[as_index(besides)]))
        if n > self.allocator.num_free + evictable:
            raise OutOfBlocksError(n, self.allocator.num_free, evictable)

    def share(self, blocks: Ids, priority: int = 0) -> None:
        """Add a reader to each of `blocks`, which are used or evictable."""
        index = as_index(blocks)
        readers = self.ref_count[index]
        if np.count_nonzero(readers) < len(readers):
            self.policy.remove(blocks[readers == 0])
        self.ref_count[index] = readers + ONE
        self.stats.hit(index, priority)
        self._note_use()

    def touch(self, blocks: Ids) -> None:
        """Note that the content of `blocks` was wanted, without a reader: evictable ones are queued anew."""
        index = as_index(blocks)
        self.stats.hit(index)
        self.stats.accessed(index)
        self.policy.add(blocks[self.ref_count[index] == 0])

    def release(self, blocks: Ids) -> None:
        """Take a reader from each of `blocks`, listed in the order of their sequence.

        The last blocks of a sequence become evictable before the first ones: without its beginning the rest of a text
        cannot be found, while the beginning is useful without the rest.
        """
        index = as_index(blocks)
        readers = self.ref_count[index] - ONE
        self.ref_count[index] = readers
        self.stats.accessed(index)
        unread = readers == 0
        named = self.cache.named[index]
        self.allocator.free(blocks[unread & ~named])
        cached = blocks[unread & named][::-1]
        try:
            self.policy.add(cached)
        except BaseException as error:
            self._give_up(cached, error)

    def reserve(self, blocks: Ids) -> None:
        """Add a reader to each of `blocks`, all of which have one, that is no use of their content: see `MoveList`."""
        self.ref_count[as_index(blocks)] += ONE

    def leave(self, blocks: Ids) -> None:
        """Take a reader from each of `blocks`, which may repeat and all keep another reader."""
        np.subtract.at(self.ref_count, blocks, 1)

    def publish(self, blocks: Ids, digests: Sequence[bytes], depth: NDArray[Any], priority: int = 0) -> None:
        """Let the content of `blocks`, at logical place `depth` of their sequence, be found by `digests`."""
        new = self.cache.publish(blocks, digests)
        if new:
            self.stats.named(as_index(blocks[new]), depth[new], priority)

    def unpublish(self, blocks: Ids) -> None:
        """Let the content of `blocks` not be found; one that nobody reads becomes free."""
        named = blocks[self.cache.named[as_index(blocks)]]
        self.cache.forget(named)
        unread = named[self.ref_count[as_index(named)] == 0]
        if len(unread):
            self.policy.remove(unread)
            self.allocator.free(unread)

    def forget(self, digests: Sequence[bytes]) -> None:
        """Let content of these names, as far as it is known, not be found; blocks that nobody reads become free."""
        found = self.cache.find(digests)
        self.unpublish(np.unique(found[found >= 0]))

    def evict(self, n: int) -> Ids:
        """Turn up to `n` evictable blocks, chosen by the policy, into free ones, and return them."""
        blocks = self._take_evictable(min(n, len(self.policy)))
        self.allocator.free(blocks)
        return blocks

    def check(self) -> None:
        """Raise AssertionError unless every block is in exactly one state and every count agrees. O(num_blocks)."""
        used = self.ref_count > 0
        named = self.cache.named
        assert (self.ref_count >= 0).all(), "a reference count is negative"
        assert (self.allocator.allocated | ~used).all(), "a used block is free"
        assert (self.allocator.allocated == (used | named)).all(), "a block is neither used, nor evictable, nor free"
        assert self.num_evictable == np.count_nonzero(named & ~used), "the policy holds other blocks than it should"
        assert len(self.cache) == np.count_nonzero(named), "a name leads to no block"
        blocks = np.flatnonzero(named).astype(np.int32)
        digests = [digest for digest in self.cache.digests(blocks) if digest is not None]
        assert np.array_equal(self.cache.match(digests), blocks), "a name leads to another block"

    def _take_evictable(self, n: int) -> Ids:
        """Take `n` blocks from the policy, and end what their content was known for.

        If the hook raises, the blocks are evictable again, as if they had been used just now.
        """
        blocks = self.policy.pop(n)
        if self._own_policy:
            self._check_popped(blocks, n)
        if not n:
            return blocks
        if self.on_evict is not None:
            try:
                self.on_evict(blocks, self.cache.names(blocks))
            except BaseException:
                self.policy.add(blocks)
                raise
        self.cache.forget(blocks)
        self.num_evicted += len(blocks)
        return blocks

    def _check_popped(self, blocks: Ids, n: int) -> None:
        index = as_index(blocks)
        if len(np.unique(blocks)) != n or np.count_nonzero(self.ref_count[index]) or not self.cache.named[index].all():
            raise RuntimeError(f"eviction must return {n} of the blocks that its policy holds; got {blocks.tolist()}")

    def _give_up(self, blocks: Ids, error: BaseException) -> None:
        """Free `blocks`, named and without a reader, which the policy failed to take.

        A policy of somebody's own may raise. A warning tells of it: whoever gives blocks back can do nothing about it,
        and must not stop half-way.
        """
        with suppress(Exception):
            self.policy.remove(blocks)
        self.cache.forget(blocks)
        self.allocator.free(blocks)
        if not isinstance(error, Exception):
            raise error
        warnings.warn(
            f"the eviction policy raised {error!r} when it was given {len(blocks)} blocks, whose content is lost",
            RuntimeWarning,
            stacklevel=3,
        )

    def _note_use(self) -> None:
        free = self.allocator.num_free
        used = self.num_blocks - free - len(self.policy)
        if used > self.peak_used:
            self.peak_used = used
        if free < self.pressure_mark:
            self.pressure.set()
