"""What must be moved, and in which order: one list for a manager's moves, whichever thread asked for them.

A block that a move reads may be handed out again before the move is made: that is what eviction and swapping are for.
So the order decides. The manager appends a move under its lock, in the same breath as the decision behind it; whoever
moves bytes makes the moves from the first to the last, and all of them before a kernel reads or writes a block.

A move leaves the list when it has been made, not before. What a failure interrupts is still there for the next attempt,
and making a move twice does no harm: nothing that it reads was written in between. A CPU block that a move reads stays
reserved until then, so no other move can be told to write to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Move", "MoveList", "Transfer"]

Pairs = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Move:
    """Blocks to copy: "copy" within the GPU, "out" from GPU to CPU, or "in" from CPU to GPU."""

    kind: str
    pairs: Pairs
    """int32 [num_blocks, 2]: (source, destination)."""
    cached: bool = False
    """Whether it moves cached content that no sequence asked to move: an offload, or what a prompt found on the CPU."""


class Transfer(NamedTuple):
    """Cached blocks that change place."""

    direction: str
    """"offload" is GPU to CPU, "restore" is CPU to GPU."""
    pairs: Pairs
    """int32 [num_blocks, 2]: (source, destination) blocks."""


class MoveList:
    """The moves that a manager has asked for and that have not been made yet, in order.

    It holds moves of cached blocks always. What `append`, `swap_out` and `swap_in` return is the caller's to move, and
    is in the list as well once `collect_all` was called.

    Parameters
    ----------
    lock : RLock
        The manager's.
    release : callable
        Takes the CPU blocks that a finished move has read, and that were reserved for it.
    """

    def __init__(self, lock: Any, release: Callable[[NDArray[np.int32]], Any]) -> None:
        self.collects_all = False
        self._lock = lock
        self._release = release
        self._moves: deque[Move] = deque()
        self._returned: set[Move] = set()  # moves that their caller makes: here for what they reserve

    def collect_all(self) -> None:
        """Hold every move from now on; what calls return only tells which moves they added."""
        with self._lock:
            self.collects_all = True

    @property
    def pending(self) -> tuple[Move, ...]:
        """The moves to make, the first one first."""
        with self._lock:
            return tuple(move for move in self._moves if move not in self._returned)

    @property
    def reserved(self) -> list[NDArray[np.int32]]:
        """The CPU blocks that each move reads, which stay reserved until it was made."""
        with self._lock:
            return [move.pairs[:, 0] for move in self._moves if move.kind == "in"]

    def add(self, move: Move, *, returned: bool = False) -> None:
        """Append a move; `returned` says that the caller was handed its pairs, to move unless all are collected."""
        self._moves.append(move)
        if returned and not self.collects_all:
            self._returned.add(move)

    def done(self, moves: Iterable[Move]) -> None:
        """Note that moves were made, the first of the list first; one that was noted before is passed over.

        What callers move themselves counts as made once they ask for, or note, what comes after.

        Raises
        ------
        ValueError
            If a move was made before one that comes earlier in the list.
        """
        with self._lock:
            for move in moves:
                self._drop_returned()
                if self._moves and self._moves[0] is move:
                    self._drop_first()
                elif move in self._moves:
                    raise ValueError(f"moves must be made in order; {self._moves[0]} comes before {move}")
            self._drop_returned()

    def take_cached(self) -> list[Move]:
        """Return the moves of cached blocks and empty the list: the caller makes them, then those of its own calls."""
        with self._lock:
            if self.collects_all:
                raise ValueError(
                    "take_transfers must not be called where all moves are collected; see MoveList.pending"
                )
            taken = [move for move in self._moves if move.cached]
            while self._moves:
                self._drop_first()
            return taken

    def _drop_returned(self) -> None:
        while self._moves and self._moves[0] in self._returned:
            self._drop_first()

    def _drop_first(self) -> None:
        move = self._moves.popleft()
        self._returned.discard(move)
        if move.kind == "in":
            self._release(move.pairs[:, 0])
