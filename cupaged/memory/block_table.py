"""Where a sequence's tokens lie: the map from its logical blocks to physical ones, for all sequences at once.

One row a sequence. Everything that an append must know is an array over rows, so that a whole batch takes its step in
a few NumPy calls:

- ``ids[row, i]`` is the physical block of logical block `i`, -1 where none is mapped;
- ``num_tokens[row]`` tokens are stored, in ``num_blocks[row]`` blocks;
- the token at position `p` of the last block has slot ``tail_base[row] + p``;
- positions below ``writable[row]`` in the last block may be written now; past them the manager must first map a block,
  or copy a last block that another sequence reads too.
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
    num_blocks, num_tokens : int64 [max_seqs]
        Blocks mapped and tokens stored, 0 for a row that no sequence has.
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
        self.num_tokens = np.zeros(rows, np.int64)
        self.priority = np.zeros(rows, np.int32)
        self.writable = np.zeros(rows, np.int64)
        self.tail_base = np.zeros(rows, np.int64)
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
        self._map(row, blocks, num_tokens)
        return row

    def close(self, row: int) -> Ids:
        """Unmap a row for another sequence to use, and return the blocks that it had."""
        blocks = self.unmap(row)
        self.num_tokens[row] = self.priority[row] = 0
        self._unused.append(row)
        return blocks

    def fork(self, row: int) -> int:
        """Give a second sequence the same blocks; neither may then write to the last one unasked."""
        twin = self.open(self.blocks(row), int(self.num_tokens[row]))
        self.priority[twin] = self.priority[row]
        self.writable[row] = self.writable[twin] = self.num_tokens[row]
        return twin

    def unmap(self, row: int) -> Ids:
        """Unmap a row's blocks but keep it and its count of tokens; return the blocks."""
        blocks = self.blocks(row)
        self.ids[row, : len(blocks)] = UNMAPPED
        self.num_blocks[row] = self.writable[row] = 0
        self.changed[row] = True
        return blocks

    def remap(self, row: int, blocks: Ids) -> None:
        """Give the tokens of an unmapped row `blocks`, of which the last may have other readers."""
        self._map(row, blocks, int(self.num_tokens[row]))
        self.writable[row] = self.num_tokens[row]

    def push(self, rows: Rows, blocks: Ids) -> None:
        """Map one more block for each of `rows`, whose last block is full; ``blocks[i]`` goes to ``rows[i]``."""
        column = self.num_blocks[rows]
        try:
            self.ids[rows, column] = blocks
        except IndexError:  # NumPy checks every index before it writes
            self._fit(int(column.max()) + 1)
            self.ids[rows, column] = blocks
        start = column * self._block_size
        self.num_blocks[rows] = column + ONE
        self.writable[rows] = start + self._block_size
        self.tail_base[rows] = blocks * self._block_size - start
        self.changed[rows] = YES

    def push_run(self, row: int, blocks: Ids) -> None:
        """Map a run of further blocks for one row, whose last block is full, or about to be."""
        start = int(self.num_blocks[row])
        stop = start + len(blocks)
        self._fit(stop)
        self.ids[row, start:stop] = blocks
        self.num_blocks[row] = stop
        self._open_tail(row, stop - 1, int(blocks[-1]))

    def replace_tail(self, rows: Rows, blocks: Ids) -> None:
        """Put private copies, ``blocks[i]`` for ``rows[i]``, in the place of shared last blocks."""
        column = self.num_blocks[rows] - 1
        self.ids[rows, column] = blocks
        self._open_tail(rows, column, blocks.astype(np.int64))

    def own_tail(self, rows: Rows) -> None:
        """Let `rows` write to their last blocks: no other sequence reads them any more."""
        self.writable[rows] = self.num_blocks[rows] * self.block_size

    def advance(self, row: int, n: int) -> NDArray[np.int64]:
        """Count `n` more tokens, for which blocks are mapped, and return their slots, int64 [n]."""
        start = int(self.num_tokens[row])
        self.num_tokens[row] = start + n
        return self.slots(row, start, start + n)

    def blocks(self, row: int) -> Ids:
        """Return a copy of a row's blocks, int32 [num_blocks]."""
        return self.ids[row, : self.num_blocks[row]].copy()

    def capacity(self, rows: Rows) -> NDArray[np.int64]:
        """Return the slots in the blocks of each row, int64 [len(rows)]."""
        return self.num_blocks[rows] * self._block_size

    def tails(self, rows: Rows) -> Ids:
        """Return the last block of each row, int32 [len(rows)]."""
        return self.ids[rows, self.num_blocks[rows] - 1]

    def tail_tokens(self, row: int) -> int:
        """Return the number of tokens in a row's last block, from 1 to block_size."""
        return int(self.num_tokens[row] - (self.num_blocks[row] - 1) * self.block_size)

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

    def _map(self, row: int, blocks: Ids, num_tokens: int) -> None:
        count = len(blocks)
        self.ids[row, :count] = blocks
        self.num_blocks[row] = count
        self.num_tokens[row] = num_tokens
        if count:
            self._open_tail(row, count - 1, int(blocks[-1]))

    def _open_tail(self, rows: int | Rows, column: int | Rows, blocks: int | Rows) -> None:
        """Make `blocks`, in logical place `column`, the last and writable blocks of `rows`."""
        self.writable[rows] = (column + 1) * self.block_size
        self.tail_base[rows] = (blocks - column) * self.block_size
        self.changed[rows] = True

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
        for name in ("num_blocks", "num_tokens", "priority", "writable", "tail_base", "changed"):
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        self._unused.extend(range(2 * rows - 1, rows - 1, -1))
