"""Preemption: who gives way, how, and what it is worth."""

from __future__ import annotations

import pytest

from cupaged.errors import OutOfBlocksError
from cupaged.memory.manager import BlockManager
from cupaged.memory.preemption import CostModel, make_room

FAST_LINK = CostModel(prefill_tokens_per_s=1, link_bytes_per_s=1e9, bytes_per_block=1)
SLOW_LINK = CostModel(prefill_tokens_per_s=1e9, link_bytes_per_s=1, bytes_per_block=1)


def full_manager(num_cpu_blocks: int = 0, **options) -> BlockManager:
    """Return a manager whose 8 blocks are held, two each, by a, b, c and d."""
    manager = BlockManager(8, num_cpu_blocks, block_size=4, **options)
    for seq_id, priority in zip("abcd", (0, 1, 0, 2), strict=True):
        manager.allocate(seq_id, 8, priority=priority)
    return manager


def test_nobody_gives_way_if_there_is_room():
    manager = BlockManager(8, block_size=4)
    manager.allocate("a", range(9))
    manager.free("a")
    preemption = make_room(manager, 8)  # two of them cached: evicting is enough
    assert preemption.swapped == preemption.dropped == []
    assert manager.gpu.num_evictable == 2


def test_the_lowest_priority_gives_way_first_and_the_latest_among_equals():
    manager = full_manager()
    assert make_room(manager, 1).dropped == ["c"]
    assert make_room(manager, 4).dropped == ["a"]
    assert make_room(manager, 8).dropped == ["b", "d"]
    assert manager.counters.preemptions == 4
    manager.check()


def test_a_protected_or_more_important_sequence_stays():
    manager = full_manager()
    with pytest.raises(OutOfBlocksError) as caught:
        make_room(manager, 5, protect=["c"], priority=1)
    assert (caught.value.needed, caught.value.free) == (5, 0)
    assert manager.seq_ids == ["a", "b", "c", "d"]  # not enough together: none gives way
    assert make_room(manager, 4, protect=["c"], priority=1).dropped == ["a", "b"]


def test_the_cost_model_decides_between_swapping_and_dropping():
    manager = full_manager(num_cpu_blocks=8)
    preemption = make_room(manager, 2, FAST_LINK)
    assert preemption.swapped == ["c"]
    assert preemption.pairs.tolist() == [[4, 0], [5, 1]]
    assert make_room(manager, 4, SLOW_LINK).dropped == ["a"]
    manager.check()


def test_what_finds_no_room_on_the_cpu_is_dropped():
    manager = full_manager(num_cpu_blocks=3)
    preemption = make_room(manager, 4, FAST_LINK)
    assert preemption.swapped == ["c"]
    assert preemption.dropped == ["a"]
    manager.check()


def test_a_sequence_whose_blocks_others_read_is_no_victim_alone():
    manager = BlockManager(8, block_size=4)
    manager.allocate("parent", 16)
    manager.allocate("other", 16)
    manager.fork("parent", "child")
    assert make_room(manager, 4).dropped == ["other"]  # the child came last, but frees nothing
    assert make_room(manager, 8).dropped == ["child", "parent"]
    manager.check()


def test_dropped_sequences_leave_a_cached_prefix():
    manager = BlockManager(4, block_size=4)
    manager.allocate("a", range(16))
    manager.publish("a", 16)  # it was computed
    assert make_room(manager, 2).dropped == ["a"]
    manager.allocate("new", 5)
    manager.free("new")
    manager.allocate("a", range(16))
    assert manager.cached_tokens("a") == 8


def test_costs_of_a_round_trip_and_of_computing_again():
    cost = CostModel(1000, 1e9, bytes_per_block=2e6, seconds_per_copy=1e-5, par_context=500)
    assert cost.swap_seconds(10) == pytest.approx(2 * 10 * (2e-3 + 1e-5))
    assert cost.recompute_seconds(100) == pytest.approx(0.1 * 1.1)  # on average 50 tokens of context, a tenth more
    assert not CostModel(1000, 1e9, 2e6).prefers_swap(16, 16)
    assert CostModel(1000, 1e9, 2e6).prefers_swap(256, 16)


def test_small_blocks_make_swapping_dearer():
    """Figure 19 of the paper: the smaller the block, the more copies a swap takes."""
    swaps = [
        CostModel(1e4, 25e9, bytes_per_block=8e5 * size, seconds_per_copy=1e-5).swap_seconds(1024 // size)
        for size in (1, 16, 256)
    ]
    assert swaps[0] > swaps[1] > swaps[2]


def test_a_negative_need_is_refused():
    with pytest.raises(ValueError, match="num_blocks must be at least 0"):
        make_room(full_manager(), -1)
