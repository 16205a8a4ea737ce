"""The allocator: which id comes next, in each order, after every mixture of operations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupaged.errors import DoubleFreeError, ForeignBlockError, OutOfBlocksError
from cupaged.memory.allocator import ORDERS, BlockAllocator

DETERMINISTIC = ("lifo", "fifo", "sorted")


@pytest.mark.parametrize("order", DETERMINISTIC)
def test_ids_ascend_on_a_fresh_pool(order):
    allocator = BlockAllocator(6, order)
    ids = allocator.allocate(3)
    assert ids.dtype == np.int32
    assert ids.tolist() == [0, 1, 2]
    assert [int(allocator.allocate()[0]) for _ in range(3)] == [3, 4, 5]


@pytest.mark.parametrize("order", DETERMINISTIC)
def test_exercise_three_freed_blocks_come_back_in_their_order(order):
    allocator = BlockAllocator(3, order)
    first = allocator.allocate(3)
    allocator.free(first)
    assert allocator.allocate(3).tolist() == first.tolist()


def test_lifo_hands_out_the_run_freed_last_from_its_first_id_on():
    allocator = BlockAllocator(10)
    allocator.allocate(8)
    allocator.free([5, 1, 3])
    allocator.free(7)
    allocator.free([0, 2])
    assert allocator.allocate(4).tolist() == [0, 2, 7, 5]
    allocator.free(2)
    assert allocator.allocate(5).tolist() == [2, 1, 3, 8, 9]
    assert allocator.num_free == 0


def test_fifo_lets_every_block_rest_as_long_as_possible():
    allocator = BlockAllocator(6, "fifo")
    allocator.allocate(4)
    allocator.free([3, 1])
    allocator.free([0])
    assert allocator.allocate(4).tolist() == [4, 5, 3, 1]
    allocator.free([5, 2, 4])
    assert allocator.allocate(4).tolist() == [0, 5, 2, 4]


def test_sorted_hands_out_the_lowest_id():
    allocator = BlockAllocator(8, "sorted")
    allocator.allocate(6)
    allocator.free([4, 0])
    allocator.free([2])
    assert allocator.allocate(5).tolist() == [0, 2, 4, 6, 7]


def test_random_is_fixed_by_its_seed_and_reaches_every_id():
    runs = [BlockAllocator(100, "random", seed).allocate(100).tolist() for seed in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]
    assert sorted(runs[0]) == list(range(100))
    assert runs[0] != list(range(100))


def test_random_draws_every_free_id_equally_often():
    first = [int(BlockAllocator(4, "random", seed).allocate()[0]) for seed in range(4000)]
    counts = np.bincount(first, minlength=4)
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.27  # chi-square, 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("order", ORDERS)
def test_running_out_says_how_far_and_changes_nothing(order):
    allocator = BlockAllocator(4, order)
    allocator.allocate(3)
    with pytest.raises(OutOfBlocksError) as caught:
        allocator.allocate(2)
    assert (caught.value.needed, caught.value.free, caught.value.evictable) == (2, 1, 0)
    assert allocator.num_free == 1
    assert allocator.allocate(1).size == 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("ids", "error", "named"),
    [
        ([0, 1, 0], DoubleFreeError, "block 0 occurs twice"),
        ([0, 3], DoubleFreeError, "block 3 is free already"),
        ([0, 4], ForeignBlockError, "got 4"),
        ([-1, 0], ForeignBlockError, "got -1"),
        ([0, 2**40], ForeignBlockError, "fit in int32"),
        ([0.0], TypeError, "float64"),
        (np.array([0], "m8[s]"), TypeError, "ids must be integers, got timedelta64"),
        (np.ma.array([0, 1], np.int32, mask=[0, 1]), TypeError, "ids must be an array without a mask"),
        ([[0, 1]], ValueError, r"shape \(1, 2\)"),
    ],
)
def test_a_bad_free_is_refused_whole(order, ids, error, named):
    allocator = BlockAllocator(4, order)
    taken = allocator.allocate(4)
    allocator.free([3])
    before = allocator.allocated.tolist()
    with pytest.raises(error, match=named):
        allocator.free(ids)
    assert allocator.allocated.tolist() == before
    assert allocator.num_free == 1
    assert allocator.allocate().tolist() == [3]
    assert sorted(taken.tolist()) == [0, 1, 2, 3]


def test_freeing_nothing_is_nothing():
    allocator = BlockAllocator(0)
    allocator.free([])
    assert allocator.allocate(0).tolist() == []
    with pytest.raises(OutOfBlocksError):
        allocator.allocate(1)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((-1,), ValueError),
        ((2.0,), TypeError),
        ((True,), TypeError),
        ((2**31,), ValueError),
        ((4, "lru"), ValueError),
        ((np.timedelta64(4),), TypeError),
        ((np.timedelta64(4, "s"),), TypeError),
        ((4, []), ValueError),
    ],
)
def test_a_bad_pool_is_refused(arguments, error):
    with pytest.raises(error, match=r"num_blocks|order"):
        BlockAllocator(*arguments)


def test_the_view_of_allocated_blocks_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        BlockAllocator(2).allocated[0] = True


class ListModel:
    """The free list of each order, written with Python lists."""

    def __init__(self, num_blocks: int, order: str) -> None:
        self.order = order
        self.free_ids = list(range(num_blocks))

    def allocate(self, n: int) -> list[int]:
        if self.order == "sorted":
            self.free_ids.sort()
        ids, self.free_ids = self.free_ids[:n], self.free_ids[n:]
        return ids

    def free(self, ids: list[int]) -> None:
        self.free_ids = ids + self.free_ids if self.order == "lifo" else self.free_ids + ids


@given(st.sampled_from(ORDERS), st.integers(1, 20), st.data())
def test_any_mixture_agrees_with_a_list(order, num_blocks, data):
    allocator, model = BlockAllocator(num_blocks, order), ListModel(num_blocks, order)
    held: list[int] = []
    for _ in range(data.draw(st.integers(0, 30))):
        if held and data.draw(st.booleans()):
            ids = data.draw(st.permutations(held))[: data.draw(st.integers(1, len(held)))]
            held = [block for block in held if block not in ids]
            allocator.free(np.array(ids))
            model.free(ids)
        else:
            n = data.draw(st.integers(0, len(model.free_ids)))
            ids = allocator.allocate(n).tolist()
            if order == "random":
                model.free_ids = [block for block in model.free_ids if block not in ids]
            else:
                assert ids == model.allocate(n)
            held += ids
        assert allocator.num_free == len(model.free_ids)
        assert sorted(np.flatnonzero(allocator.allocated)) == sorted(held)
