"""Where a sequence's tokens lie: the map from its logical blocks to physical ones, for all sequences at once.

One row a sequence. Everything that an append must know is an array over rows, so that a whole batch takes its step in
a few NumPy calls:

- ``ids[row, i]`` is the physical block of logical block `i`, of which there are ``num_blocks[row]``; -1 is unmapped;
- ``room[row]`` slots of the last block are empty, and the next token goes to slot ``tail_end[row] - room[row]``;
- ``room[row] <= 0`` means: ask before you write. 0 is a full block, past which the manager must map another; a
  negative number counts the empty slots of a block that another sequence may read, which must then be copied.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cupaged.memory.allocator import YES, whole_number

__all__ = ["BlockTables"]

Ids = NDArray[np.int32]
Rows = NDArray[np.intp]

UNMAPPED = -1
ONE = np.array(1)  # an array without dimensions: NumPy adds it in half the time that it takes for a Python int


class BlockTables:
    """The block tables of many sequences.

    Parameters
    ----------
    block_size : int
        Token slots in a block.
    max_seqs, max_blocks : int
        Rows and columns to start with; both double when they run out.

    Attributes
    ----------
    ids : int32 [max_seqs, max_blocks]
        The dense table that kernels index; -1 is unmapped. Read it, or mirror it on a device; do not write to it.
    num_blocks : int64 [max_seqs]
        Blocks mapped, 0 for a row that no sequence has.
    room, tail_end : int64 [max_seqs]
        Empty slots in the last block, negative while others may read it, and the slot that follows that block.
    priority : int32 [max_seqs]
        What the sequence is worth: under pressure the lowest gives way first.
    changed : bool [max_seqs]
        Rows of `ids` that changed since whoever mirrors the table last cleared them.
    """

    def __init__(self, block_size: int, max_seqs: int = 256, max_blocks: int = 128) -> None:
        self.block_size = whole_number("block_size", block_size, at_least=1)
        self._block_size = np.array(self.block_size, np.int64)
        rows = whole_number("max_seqs", max_seqs, at_least=1)
        columns = whole_number("max_blocks", max_blocks, at_least=1)
        self.ids = np.full((rows, columns), UNMAPPED, np.int32)
        self.num_blocks = np.zeros(rows, np.int64)
        self.room = np.zeros(rows, np.int64)
        self.tail_end = np.zeros(rows, np.int64)
        self.priority = np.zeros(rows, np.int32)
        self.changed = np.zeros(rows, bool)
        self._unused = list(range(rows - 1, -1, -1))

    @property
    def max_seqs(self) -> int:
        """Rows of the dense table."""
        return self.ids.shape[0]

    @property
    def max_blocks(self) -> int:
        """Columns of the dense table."""
        return self.ids.shape[1]

    def open(self, blocks: Ids, num_tokens: int, priority: int = 0) -> int:
        """Give a sequence with `num_tokens` tokens in `blocks` a row, and return the row."""
        self._fit(len(blocks))
        if not self._unused:
            self._double_rows()
        row = self._unused.pop()
        self.priority[row] = priority
        self.map(row, blocks, num_tokens)
        return row

    def close(self, row: int) -> Ids:
        """Unmap a row for another sequence to use, and return the blocks that it had."""
        blocks = self.unmap(row)
        self.priority[row] = 0
        self._unused.append(row)
        return blocks

    def fork(self, row: int) -> int:
        """Give a second sequence the same blocks; neither may then write to the last one unasked."""
        twin = self.open(self.blocks(row), self.num_tokens(row), int(self.priority[row]))
        self.guard(row)
        self.guard(twin)
        return twin

    def map(self, row: int, blocks: Ids, num_tokens: int) -> None:
        """Let an unmapped row store `num_tokens` tokens in `blocks`."""
        self.push_run(row, blocks)
        self.room[row] = len(blocks) * self.block_size - num_tokens

    def unmap(self, row: int) -> Ids:
        """Take a row's blocks away, but keep the row; return the blocks."""
        blocks = self.blocks(row)
        self.ids[row, : len(blocks)] = UNMAPPED
        self.num_blocks[row] = self.room[row] = 0
        self.changed[row] = True
        return blocks

    def cut(self, row: int, num_blocks: int, room: int) -> Ids:
        """Leave a row its first `num_blocks` blocks, with this room in the last; return the blocks that it had."""
        blocks = self.blocks(row)
        self.ids[row, num_blocks:] = UNMAPPED
        self.num_blocks[row], self.room[row] = num_blocks, room
        self.changed[row] = True
        if num_blocks:
            self.set_tail(row, int(blocks[num_blocks - 1]))
        return blocks

    def set_tail(self, row: int, block: int) -> None:
        """Let a row's last block be another one."""
        self.ids[row, self.num_blocks[row] - 1] = block
        self.tail_end[row] = (block + 1) * self.block_size
        self.changed[row] = True

    def push(self, rows: Rows, blocks: Ids) -> None:
        """Map one more block for each of `rows`, whose last block is full; ``blocks[i]`` goes to ``rows[i]``."""
        column = self.num_blocks[rows]
        try:
            self.ids[rows, column] = blocks
        except IndexError:  # NumPy checks every index before it writes
            self._fit(int(column.max()) + 1)
            self.ids[rows, column] = blocks
        self.num_blocks[rows] = column + ONE
        self.room[rows] = self._block_size
        self.tail_end[rows] = (blocks + ONE) * self._block_size
        self.changed[rows] = YES

    def push_run(self, row: int, blocks: Ids) -> None:
        """Map a run of further blocks for one row; all that it has is its own, or full."""
        start = int(self.num_blocks[row])
        stop = start + len(blocks)
        self._fit(stop)
        self.ids[row, start:stop] = blocks
        self.num_blocks[row] = stop
        self.room[row] += len(blocks) * self.block_size
        self.tail_end[row] = (int(blocks[-1]) + 1) * self.block_size
        self.changed[row] = True

    def replace_tail(self, rows: Rows, blocks: Ids) -> None:
        """Put private copies, ``blocks[i]`` for ``rows[i]``, in the place of shared last blocks."""
        self.ids[rows, self.num_blocks[rows] - 1] = blocks
        self.tail_end[rows] = (blocks + ONE) * self._block_size
        self.changed[rows] = True
        self.unguard(rows)

    def guard(self, row: int) -> None:
        """Have a row ask before it writes to its last block, which another sequence may read."""
        self.room[row] = -abs(self.room[row])

    def unguard(self, rows: Rows) -> None:
        """Let `rows` write to their last blocks, which no other sequence reads."""
        self.room[rows] = abs(self.room[rows])

    def advance(self, row: int, n: int) -> NDArray[np.int64]:
        """Count `n` more tokens, for which blocks are mapped, and return their slots, int64 [n]."""
        start = self.num_tokens(row)
        self.room[row] -= n
        return self.slots(row, start, start + n)

    def blocks(self, row: int) -> Ids:
        """Return a copy of a row's blocks, int32 [num_blocks]."""
        return self.ids[row, : self.num_blocks[row]].copy()

    def num_tokens(self, row: int) -> int:
        """Return the number of tokens that a row stores."""
        return int(self.num_blocks[row]) * self.block_size - abs(int(self.room[row]))

    def lengths(self, rows: Rows) -> NDArray[np.int64]:
        """Return the number of tokens that each of `rows` stores, int64 [len(rows)]."""
        return self.num_blocks[rows] * self._block_size - abs(self.room[rows])

    def tails(self, rows: Rows) -> Ids:
        """Return the last block of each row, int32 [len(rows)]."""
        return self.ids[rows, self.num_blocks[rows] - 1]

    def tail_tokens(self, row: int) -> int:
        """Return the number of tokens in a row's last block, from 1 to block_size."""
        return self.block_size - abs(int(self.room[row]))

    def slot(self, row: int, position: int) -> int:
        """Return the slot of the token at `position`: block id * block_size + offset."""
        block, offset = divmod(position, self.block_size)
        return int(self.ids[row, block]) * self.block_size + offset

    def slots(self, row: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the slots of the tokens at positions `start` to `stop - 1`, int64 [stop - start]."""
        position = np.arange(start, stop)
        block, offset = position // self.block_size, position % self.block_size
        return self.ids[row, block].astype(np.int64) * self.block_size + offset

    def export(self, rows: Rows) -> Ids:
        """Return the tables of some rows, int32 [len(rows), max(1, their longest)], -1 where unmapped."""
        width = max(1, int(self.num_blocks[rows].max(initial=0)))
        return self.ids[rows, :width]

    def _fit(self, num_blocks: int) -> None:
        """Widen the table until a row of `num_blocks` fits."""
        if num_blocks <= self.max_blocks:
            return
        width = 1 << (num_blocks - 1).bit_length()
        wider = np.full((self.max_seqs, width), UNMAPPED, np.int32)
        wider[:, : self.max_blocks] = self.ids
        self.ids = wider

    def _double_rows(self) -> None:
        rows = self.max_seqs
        self.ids = np.concatenate([self.ids, np.full_like(self.ids, UNMAPPED)])
        for name in ("num_blocks", "room", "tail_end", "priority", "changed"):
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        self._unused.extend(range(2 * rows - 1, rows - 1, -1))
