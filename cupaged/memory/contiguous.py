"""What paging replaces: allocators that keep each request's KV cache in one contiguous region of token slots.

A region cannot move or grow, so it must be reserved for the longest that its request may become. Three things are lost,
and they are different losses:

- *reservation*: slots that the request will fill, but has not yet;
- *internal* fragmentation: slots inside its region that it never fills;
- *external* fragmentation: free slots in holes too short for the next region.

The names follow Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP
2023, section 3.1. The allocators are the textbook ones: Knuth, *The Art of Computer Programming*, vol. 1, section 2.5
(first fit, buddy system).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cupaged.errors import NoHoleError
from cupaged.memory.allocator import whole_number

__all__ = ["Buddy", "ContiguousAllocator", "FirstFit", "Regions", "ReserveMax", "Usage"]

IntArray = npt.NDArray[np.int64]


class Usage(NamedTuple):
    """How a memory's slots are spent; the five parts add up to all of them."""

    tokens: int
    """Slots that hold a token."""
    reservation: int
    """Allocated slots that will hold a token later."""
    internal: int
    """Allocated slots that never will."""
    external: int
    """Free slots that the next request cannot use, because the holes around them are too short."""
    free: int
    """Free slots that it can use."""

    @property
    def allocated(self) -> int:
        """Slots that are some request's."""
        return self.tokens + self.reservation + self.internal

    @property
    def occupancy(self) -> float:
        """Token occupancy: the share of the allocated slots that hold tokens; 1 where nothing is allocated."""
        return self.tokens / self.allocated if self.allocated else 1.0


class Regions(NamedTuple):
    """The regions in use, in no particular order: one int64 array [num_regions] a property, in slots."""

    start: IntArray
    size: IntArray
    tokens: IntArray
    final: IntArray


class ContiguousAllocator(ABC):
    """One arena of token slots, handed out in contiguous regions; a subclass decides how large and where.

    Parameters
    ----------
    num_slots : int
        Token slots of the arena, 1 to 2**63 - 1.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = whole_number("num_slots", num_slots, at_least=1)
        if self.num_slots > np.iinfo(np.int64).max:
            raise ValueError(f"num_slots must be at most {np.iinfo(np.int64).max}, got {num_slots}")
        self._rows: dict[Hashable, int] = {}
        self._vacant: list[int] = []
        self._table = np.zeros((len(Regions._fields), 0), np.int64)

    # What a subclass decides.

    @abstractmethod
    def region_size(self, reserve: int) -> int:
        """Return the slots of the region that a request for `reserve` slots gets."""

    @abstractmethod
    def holes(self) -> tuple[IntArray, IntArray]:
        """Return (starts, sizes) of the free regions, by rising start, int64 [num_holes]."""

    @abstractmethod
    def _take(self, size: int) -> int | None:
        """Cut a region of `size` out of a hole and return its start; None where no hole is large enough."""

    @abstractmethod
    def _give_back(self, start: int, size: int) -> None:
        """Make a region free again, and one with the holes beside it where the policy can."""

    # What every one of them does.

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def free_slots(self) -> int:
        """Slots in no request's region."""
        return self.num_slots - int(self._table[Regions._fields.index("size")].sum())

    def can_allocate(self, reserve: int) -> bool:
        """Return whether a hole is large enough for a request of `reserve` slots."""
        return self.region_size(reserve) <= self._largest_hole()

    def allocate(self, request_id: Hashable, tokens: int, reserve: int, final: int | None = None) -> int:
        """Give a request its region and write its first tokens there.

        Parameters
        ----------
        request_id : hashable
            Not in use.
        tokens : int
            Tokens that the region holds from now on: the prompt.
        reserve : int
            Slots that the request asks for: the most tokens that it may hold.
        final : int, optional
            Tokens that it will hold in the end, which tells reservation from internal fragmentation; nothing else
            depends on it. `reserve` by default.

        Returns
        -------
        int
            First slot of the region.

        Raises
        ------
        NoHoleError
            No hole is large enough.
        """
        if request_id in self._rows:
            raise ValueError(f"request_id must not be in use, got {request_id!r}")
        tokens = whole_number("tokens", tokens, at_least=0)
        reserve = whole_number("reserve", reserve, at_least=max(tokens, 1))
        final = reserve if final is None else whole_number("final", final, at_least=tokens)
        if final > reserve:
            raise ValueError(f"final must be at most the {reserve} slots reserved, got {final}")
        size = self.region_size(reserve)
        start = self._take(size)
        if start is None:
            raise NoHoleError(size, self.free_slots, self._largest_hole())
        row = self._new_row()
        self._rows[request_id] = row
        self._table[:, row] = start, size, tokens, final
        return start

    def append(self, request_ids: Sequence[Hashable], n: int = 1) -> None:
        """Write `n` more tokens of each request into its region.

        Raises
        ------
        ValueError
            A request is unknown or named twice, or its region has no room; nothing was written.
        """
        n = whole_number("n", n, at_least=1)
        rows = [self._row_of(request_id) for request_id in request_ids]
        if len(set(rows)) < len(rows):
            raise ValueError("request_ids must name each request once")
        _, sizes, tokens, finals = self._table
        room = sizes[rows] - tokens[rows]
        if (room < n).any():
            full = int(np.argmax(room < n))
            raise ValueError(
                f"n must be at most {room[full]} more tokens for request "
                f"{request_ids[full]!r}, whose region has {sizes[rows[full]]} slots, got {n}"
            )
        tokens[rows] += n
        finals[rows] = np.maximum(finals[rows], tokens[rows])

    def free(self, request_id: Hashable) -> None:
        """Give a request's region back."""
        row = self._row_of(request_id)
        start, size, _, _ = self._table[:, row].tolist()
        self._give_back(start, size)
        self._table[:, row] = 0
        self._vacant.append(row)
        del self._rows[request_id]

    def regions(self) -> Regions:
        """Return a copy of the regions in use."""
        return Regions(*self._table[:, sorted(self._rows.values())])

    def usage(self, next_reserve: int | None = None) -> Usage:
        """Return how the slots are spent.

        Parameters
        ----------
        next_reserve : int, optional
            What the next request will ask for. Free slots in holes too short for it are external fragmentation (the
            numerator of the Linux kernel's "unusable free space index"). Without one, all free slots count as usable.
        """
        _, size, tokens, final = self._table.sum(axis=1).tolist()
        free = self.num_slots - size
        external = 0
        if next_reserve is not None:
            _, sizes = self.holes()
            external = int(sizes[sizes < self.region_size(next_reserve)].sum())
        return Usage(tokens, final - tokens, size - final, external, free - external)

    def _largest_hole(self) -> int:
        return int(self.holes()[1].max(initial=0))

    def _row_of(self, request_id: Hashable) -> int:
        if request_id not in self._rows:
            raise ValueError(f"request_id must be in use, got {request_id!r}")
        return self._rows[request_id]

    def _new_row(self) -> int:
        """Return a row of the table that no region uses; the table doubles when it has none."""
        if not self._vacant:
            width = self._table.shape[1]
            self._table = np.pad(self._table, ((0, 0), (0, max(width, 8))))
            self._vacant = list(range(self._table.shape[1] - 1, width - 1, -1))
        return self._vacant.pop()


class FirstFit(ContiguousAllocator):
    """Regions of exactly the size asked for, each in the lowest hole that is large enough."""

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self._starts = [0]
        self._sizes = [self.num_slots]

    def region_size(self, reserve: int) -> int:
        return whole_number("reserve", reserve, at_least=1)

    def holes(self) -> tuple[IntArray, IntArray]:
        return np.array(self._starts, np.int64), np.array(self._sizes, np.int64)

    def _take(self, size: int) -> int | None:
        hole = next((hole for hole, room in enumerate(self._sizes) if room >= size), None)
        if hole is None:
            return None
        start = self._starts[hole]
        self._starts[hole] += size
        self._sizes[hole] -= size
        if not self._sizes[hole]:
            del self._starts[hole], self._sizes[hole]
        return start

    def _give_back(self, start: int, size: int) -> None:
        hole = bisect_left(self._starts, start)
        self._starts.insert(hole, start)
        self._sizes.insert(hole, size)
        for left in (hole, hole - 1):
            if 0 <= left < len(self._starts) - 1 and self._starts[left] + self._sizes[left] == self._starts[left + 1]:
                self._sizes[left] += self._sizes[left + 1]
                del self._starts[left + 1], self._sizes[left + 1]


class ReserveMax(FirstFit):
    """A region of `max_len` slots for every request, whatever it asks for: what serving systems did before paging.

    Parameters
    ----------
    num_slots : int
        Token slots of the arena.
    max_len : int
        The longest request that the model serves; a request for more is a ValueError.
    """

    def __init__(self, num_slots: int, max_len: int) -> None:
        super().__init__(num_slots)
        self.max_len = whole_number("max_len", max_len, at_least=1)

    def region_size(self, reserve: int) -> int:
        if whole_number("reserve", reserve, at_least=1) > self.max_len:
            raise ValueError(f"reserve must be at most max_len = {self.max_len}, got {reserve}")
        return self.max_len


class Buddy(ContiguousAllocator):
    """Regions of a power of two, each cut by halving the smallest hole that is large enough, lowest start first.

    A freed region joins its *buddy*, the other half of the hole that it was cut from, as soon as both are free. An
    arena whose size is not a power of two begins as one hole for each bit of its size, largest first.
    """

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self._free: list[set[int]] = [set() for _ in range(self.num_slots.bit_length())]
        start = 0
        for order in reversed(range(len(self._free))):
            if self.num_slots >> order & 1:
                self._free[order].add(start)
                start += 1 << order

    def region_size(self, reserve: int) -> int:
        return 1 << (whole_number("reserve", reserve, at_least=1) - 1).bit_length()

    def holes(self) -> tuple[IntArray, IntArray]:
        holes = sorted((start, 1 << order) for order, starts in enumerate(self._free) for start in starts)
        starts, sizes = np.array(holes, np.int64).reshape(-1, 2).T
        return starts, sizes

    def _largest_hole(self) -> int:
        return next((1 << order for order in reversed(range(len(self._free))) if self._free[order]), 0)

    def _take(self, size: int) -> int | None:
        order = size.bit_length() - 1
        found = next((larger for larger in range(order, len(self._free)) if self._free[larger]), None)
        if found is None:
            return None
        start = min(self._free[found])
        self._free[found].remove(start)
        for half in range(order, found):
            self._free[half].add(start + (1 << half))
        return start

    def _give_back(self, start: int, size: int) -> None:
        order = size.bit_length() - 1
        while (buddy := start ^ (1 << order)) in self._free[order]:
            self._free[order].remove(buddy)
            start = min(start, buddy)
            order += 1
        self._free[order].add(start)
