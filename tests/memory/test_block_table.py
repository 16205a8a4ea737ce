"""Block tables: which physical block holds which logical one, and what the dense array shows of it."""

from __future__ import annotations

import numpy as np
import pytest

from cupaged.memory.block_table import BlockTables


def ids(*blocks: int) -> np.ndarray:
    return np.array(blocks, np.int32)


def rows(*values: int) -> np.ndarray:
    return np.array(values, np.intp)


def test_a_slot_is_block_times_size_plus_offset():
    tables = BlockTables(4)
    row = tables.open(ids(7, 2, 9), 10)
    assert [tables.slot(row, position) for position in (0, 3, 4, 9)] == [28, 31, 8, 37]
    assert tables.slots(row, 2, 10).tolist() == [30, 31, 8, 9, 10, 11, 36, 37]
    assert tables.tail_tokens(row) == 2
    assert tables.num_blocks[row] == 3


def test_slots_of_a_large_cache_do_not_overflow_int32():
    tables = BlockTables(256)
    row = tables.open(ids(2**31 - 1), 1)
    assert tables.slot(row, 0) == (2**31 - 1) * 256
    assert tables.slots(row, 0, 1).tolist() == [(2**31 - 1) * 256]
    assert tables.slots(row, 0, 1).dtype == np.int64
    tables.push(rows(row), ids(2**31 - 2))
    assert tables.tail_end[row] == (2**31 - 1) * 256


def test_unmapped_entries_are_minus_one_before_and_after_use():
    tables = BlockTables(4, max_seqs=2, max_blocks=4)
    row = tables.open(ids(3, 1), 8)
    assert tables.ids.dtype == np.int32
    assert tables.ids[row].tolist() == [3, 1, -1, -1]
    assert tables.close(row).tolist() == [3, 1]
    assert (tables.ids == -1).all()
    assert tables.num_tokens(row) == tables.num_blocks[row] == 0


def test_export_is_as_wide_as_the_longest_and_a_copy():
    tables = BlockTables(4)
    first, second = tables.open(ids(3, 1, 0), 9), tables.open(ids(5), 2)
    dense = tables.export(rows(second, first))
    assert dense.tolist() == [[5, -1, -1], [3, 1, 0]]
    dense[:] = 0
    assert tables.blocks(second).tolist() == [5]
    assert tables.export(rows()).shape == (0, 1)


def test_push_maps_one_block_for_each_row():
    tables = BlockTables(4)
    first, second = tables.open(ids(3), 4), tables.open(ids(5, 6), 8)
    tables.push(rows(second, first), ids(8, 9))
    assert tables.export(rows(first, second)).tolist() == [[3, 9, -1], [5, 6, 8]]
    assert tables.room[[first, second]].tolist() == [4, 4]
    assert tables.lengths(rows(first, second)).tolist() == [4, 8]


def test_neither_twin_may_write_to_a_partial_last_block_after_a_fork():
    tables = BlockTables(4)
    row = tables.open(ids(3, 1), 6)
    twin = tables.fork(row)
    assert tables.blocks(twin).tolist() == [3, 1]
    assert tables.room[[row, twin]].tolist() == [-2, -2]
    assert tables.lengths(rows(row, twin)).tolist() == [6, 6]
    tables.replace_tail(rows(twin), ids(9))
    assert tables.blocks(twin).tolist() == [3, 9]
    assert tables.blocks(row).tolist() == [3, 1]
    assert tables.room[[row, twin]].tolist() == [-2, 2]
    tables.unguard(rows(row))
    assert tables.room[row] == 2


def test_the_table_grows_in_both_directions_and_keeps_what_it_holds():
    tables = BlockTables(2, max_seqs=1, max_blocks=1)
    opened = [tables.open(ids(*range(10 * n, 10 * n + n)), 2 * n) for n in (1, 3, 2, 5)]
    assert len(set(opened)) == 4
    assert tables.ids.shape == (4, 8)
    assert [tables.blocks(row).tolist() for row in opened] == [
        [10], [30, 31, 32], [20, 21], [50, 51, 52, 53, 54],
    ]  # fmt: skip
    tables.push_run(opened[0], ids(*range(60, 70)))
    assert tables.ids.shape == (4, 16)
    assert tables.blocks(opened[0]).tolist() == [10, *range(60, 70)]


def test_changed_rows_are_those_whose_blocks_changed():
    tables = BlockTables(4, max_seqs=4)
    first, second, third = (tables.open(ids(block), 3) for block in (0, 1, 2))
    tables.changed[:] = False
    tables.advance(first, 1)
    assert not tables.changed.any()
    tables.push(rows(first), ids(5))
    tables.close(third)
    assert np.flatnonzero(tables.changed).tolist() == sorted([first, third])
    tables.fork(second)
    assert not tables.changed[second]


def test_a_row_is_used_again_after_it_was_closed():
    tables = BlockTables(4, max_seqs=2)
    row = tables.open(ids(1), 1, priority=5)
    tables.close(row)
    assert tables.open(ids(2), 1) == row
    assert tables.priority[row] == 0


@pytest.mark.parametrize("arguments", [(0,), (4, 0), (4, 1, 0), (-1,)])
def test_sizes_must_be_positive(arguments):
    with pytest.raises(ValueError, match=r"block_size|max_seqs|max_blocks"):
        BlockTables(*arguments)
