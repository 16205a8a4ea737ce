"""Which block comes next: a free list over the ids 0 … num_blocks - 1, in one of four orders.

The order never changes what fits, since any free block serves any request. It changes where neighbours in a sequence
lie in memory, and how soon a freed block is written again, which is why it can be chosen and studied.
"""

from __future__ import annotations

import heapq
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cupaged.errors import DoubleFreeError, ForeignBlockError, OutOfBlocksError
from cupaged.kinds import check_unmasked, holds_integers, is_integer

__all__ = ["ORDERS", "BlockAllocator"]

Ids = NDArray[np.int32]
YES, NO = np.array(True), np.array(False)  # NumPy stores arrays without dimensions faster than Python bools
INT32 = np.dtype(np.int32)


class FreeList(Protocol):
    """An order: it hands out ids and takes them back. The allocator has checked every id and every count."""

    def take(self, n: int) -> Ids:
        """Remove `n` ids and return them in the order in which they are handed out."""

    def give(self, ids: Ids) -> None:
        """Put `ids`, a run freed together, back."""

    def __len__(self) -> int:
        """Return the number of free ids."""


class LifoList:
    """Last freed, first handed out: the block whose lines a cache may still hold. A stack, stored upside down."""

    def __init__(self, num_blocks: int) -> None:
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._top = num_blocks

    def take(self, n: int) -> Ids:
        self._top -= n
        return self._stack[self._top : self._top + n][::-1].copy()

    def give(self, ids: Ids) -> None:
        self._stack[self._top : self._top + len(ids)] = ids[::-1]
        self._top += len(ids)

    def __len__(self) -> int:
        return self._top


class FifoList:
    """First freed, first handed out: every block rests as long as possible. A ring."""

    def __init__(self, num_blocks: int) -> None:
        self._ring = np.arange(num_blocks, dtype=np.int32)
        self._head = 0
        self._count = num_blocks

    def take(self, n: int) -> Ids:
        ids = self._ring.take(np.arange(self._head, self._head + n), mode="wrap")
        self._head = (self._head + n) % max(len(self._ring), 1)
        self._count -= n
        return ids

    def give(self, ids: Ids) -> None:
        tail = self._head + self._count
        self._ring.put(np.arange(tail, tail + len(ids)), ids, mode="wrap")
        self._count += len(ids)

    def __len__(self) -> int:
        return self._count


class SortedList:
    """The lowest free id first: sequences crowd the start of the pool.

    Ids from `_frontier` on were never handed out; those freed below it wait in a heap. Both are O(log n) at most, and
    a fresh pool of any size costs nothing.
    """

    def __init__(self, num_blocks: int) -> None:
        self._frontier = 0
        self._num_blocks = num_blocks
        self._returned: list[int] = []

    def take(self, n: int) -> Ids:
        reused = min(n, len(self._returned))
        ids = [heapq.heappop(self._returned) for _ in range(reused)]
        ids.extend(range(self._frontier, self._frontier + n - reused))
        self._frontier += n - reused
        return np.array(ids, np.int32)

    def give(self, ids: Ids) -> None:
        for block in ids.tolist():
            heapq.heappush(self._returned, block)

    def __len__(self) -> int:
        return self._num_blocks - self._frontier + len(self._returned)


class RandomList:
    """Every free id equally likely, from a seed: the worst case for locality, and the fair one for a benchmark."""

    def __init__(self, num_blocks: int, seed: int) -> None:
        self._ids = np.arange(num_blocks, dtype=np.int32)
        self._count = num_blocks
        self._random = np.random.default_rng(seed)

    def take(self, n: int) -> Ids:
        left = np.arange(self._count, self._count - n, -1)  # how many were free at each draw: Fisher and Yates
        for last, drawn in zip((left - 1).tolist(), self._random.integers(left).tolist(), strict=True):
            self._ids[last], self._ids[drawn] = self._ids[drawn], self._ids[last]
        self._count -= n
        return self._ids[self._count : self._count + n][::-1].copy()

    def give(self, ids: Ids) -> None:
        self._ids[self._count : self._count + len(ids)] = ids
        self._count += len(ids)

    def __len__(self) -> int:
        return self._count


ORDERS = ("lifo", "fifo", "sorted", "random")


class BlockAllocator:
    """Hands out block ids and takes them back.

    Parameters
    ----------
    num_blocks : int
        Size of the pool; its ids are 0 … num_blocks - 1.
    order : {"lifo", "fifo", "sorted", "random"}
        Which free id comes next. Except for "random", ids ascend on a fresh pool, and a run that was freed in one call
        comes back in its order ("sorted" returns any run in ascending order):

        - "lifo": the run freed last, from its first id on;
        - "fifo": the run freed first;
        - "sorted": the lowest id;
        - "random": every free id equally likely, from `seed`.
    seed : int
        Start of the random order; the other orders ignore it.
    """

    def __init__(self, num_blocks: int, order: str = "lifo", seed: int = 0) -> None:
        self.num_blocks = whole_number("num_blocks", num_blocks, at_least=0)
        if self.num_blocks > np.iinfo(np.int32).max:
            raise ValueError(f"num_blocks must fit in int32, as block ids do, got {num_blocks}")
        self.order = order
        self._free = _free_list(self.num_blocks, order, seed)
        self._allocated = np.zeros(self.num_blocks, bool)

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out."""
        return len(self._free)

    @property
    def num_allocated(self) -> int:
        """Blocks that are handed out."""
        return self.num_blocks - len(self._free)

    @property
    def allocated(self) -> NDArray[np.bool_]:
        """Which ids are handed out: bool [num_blocks], read-only."""
        view = self._allocated.view()
        view.flags.writeable = False
        return view

    def allocate(self, n: int = 1) -> Ids:
        """Hand out `n` blocks.

        Returns
        -------
        int32 [n]
            Their ids, in the order that `order` defines.

        Raises
        ------
        OutOfBlocksError
            If fewer than `n` are free; none is handed out.
        """
        n = whole_number("n", n, at_least=0)
        if n > len(self._free):
            raise OutOfBlocksError(n, len(self._free))
        ids = self._free.take(n)
        self._allocated[as_index(ids)] = YES
        return ids

    def free(self, ids: ArrayLike) -> None:
        """Take a run of blocks back: one id, or a one-dimensional array of them.

        Raises
        ------
        ForeignBlockError
            If an id is not one of this pool's.
        DoubleFreeError
            If a block is free already, or occurs twice in `ids`.
        """
        run = block_ids("ids", ids)
        if run.size == 0:
            return
        self._check_owned(run)
        self._free.give(run)
        self._allocated[as_index(run)] = NO

    def _check_owned(self, run: Ids) -> None:
        ordered = np.sort(run)
        if ordered[0] < 0 or ordered[-1] >= self.num_blocks:
            stranger = ordered[0] if ordered[0] < 0 else ordered[-1]
            raise ForeignBlockError(f"ids must be blocks of this pool, 0 to {self.num_blocks - 1}, got {stranger}")
        allocated = self._allocated[as_index(run)]
        if np.count_nonzero(allocated) < len(run):
            raise DoubleFreeError(f"block {run[~allocated][0]} is free already")
        twice = ordered[1:] == ordered[:-1]
        if np.count_nonzero(twice):
            raise DoubleFreeError(f"block {ordered[1:][twice][0]} occurs twice in ids")


def as_index(ids: Ids) -> NDArray[np.intp]:
    """Return block ids as NumPy indexes best: it takes three times as long with int32, for all its conversions."""
    return ids.astype(np.intp)


def whole_number(name: str, value: Any, at_least: int) -> int:
    """Return `value` as an int, or raise an error that names the argument."""
    if type(value) is not int and not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)


def block_ids(name: str, ids: ArrayLike) -> Ids:
    """Return `ids` as an int32 vector, or raise an error that names the argument."""
    check_unmasked(ids, name)
    run = np.atleast_1d(np.asarray(ids))
    if run.ndim != 1:
        raise ValueError(f"{name} must be one id or a vector of ids, got shape {run.shape}")
    if run.dtype == INT32:
        return run
    if run.size and not holds_integers(run):
        raise TypeError(f"{name} must be integers, got {run.dtype}")
    limits = np.iinfo(np.int32)
    if run.size and (run.min() < limits.min or run.max() > limits.max):
        raise ForeignBlockError(f"{name} must be block ids, which fit in int32, got {run.min()} to {run.max()}")
    return run.astype(np.int32)


def _free_list(num_blocks: int, order: str, seed: int) -> FreeList:
    if order == "lifo":
        return LifoList(num_blocks)
    if order == "fifo":
        return FifoList(num_blocks)
    if order == "sorted":
        return SortedList(num_blocks)
    if order == "random":
        return RandomList(num_blocks, seed)
    raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
