"""What the memory manager promises in half sentences: each would be easy to lose, and nothing else shows it."""

from __future__ import annotations

import time

import numpy as np
import pytest

from cupaged.errors import OutOfBlocksError
from cupaged.memory.manager import BlockManager
from cupaged.memory.metrics import snapshot
from cupaged.memory.pool import BlockPool
from cupaged.memory.preemption import CostModel, make_room
from cupaged.memory.prefix_cache import root_digest
from cupaged.memory.watermark import WatermarkEvictor


def manager_of(num_gpu_blocks: int = 16, num_cpu_blocks: int = 0, block_size: int = 4, **options) -> BlockManager:
    return BlockManager(num_gpu_blocks, num_cpu_blocks, block_size, **options)


def cached(manager: BlockManager, prompt, **options) -> int:
    """Return how many tokens of a prompt are found, and leave no sequence behind."""
    manager.allocate("looks", prompt, **options)
    found = manager.cached_tokens("looks")
    manager.free("looks")
    return found


# ---- what was never written -----------------------------------------------------------------------------------------


def test_no_block_of_a_sequence_that_was_not_computed_is_found():
    manager = manager_of()
    manager.allocate("a", range(13))
    manager.free("a", written=False)
    assert manager.gpu.num_evictable == 0
    assert cached(manager, range(13)) == 0
    manager.check()


def test_what_it_shared_is_still_found_after_it_was_not_computed():
    manager = manager_of()
    manager.allocate("first", range(8))
    manager.allocate("second", range(20))
    assert manager.cached_tokens("second") == 8
    manager.free("second", written=False)
    assert cached(manager, range(20)) == 8
    manager.check()


# ---- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_refuses_to_step_while_one_of_its_sequences_is_swapped_out():
    manager = manager_of(8, 8)
    for seq_id in "ab":
        manager.allocate(seq_id, 6)
    batch = manager.batch("ab")
    manager.append_batch(batch)
    manager.swap_out("a")
    for call in (manager.append_batch, manager.block_tables, manager.seq_lens):
        with pytest.raises(ValueError, match="'a' is swapped out"):
            call(batch)
    assert manager.num_tokens("b") == 7
    manager.allocate("c", 5)  # takes the blocks that a had
    manager.swap_in("a")
    slots = manager.append_batch(batch).slots
    assert slots.tolist() == [manager.slots(seq_id)[-1] for seq_id in "ab"]
    assert len({slot // 4 for slot in slots.tolist()} | set(manager.blocks("c").tolist())) == 4
    manager.check()


# ---- who goes first -------------------------------------------------------------------------------------------------


def test_content_that_was_used_twice_outlives_content_that_was_used_once():
    manager = manager_of(eviction="lfu")
    for prompt in (range(5), range(5), range(100, 105)):  # the one that is used once is the most recent
        cached(manager, prompt)
    manager.evict(1)
    assert cached(manager, range(100, 105)) == 0
    assert cached(manager, range(5)) == 4


def test_a_sequence_of_a_higher_priority_raises_that_of_what_it_shares():
    manager = manager_of(eviction="priority")
    cached(manager, range(5), priority=0)
    cached(manager, range(5), priority=5)
    cached(manager, range(100, 105), priority=3)  # worth less, if more recent
    manager.evict(1)
    assert cached(manager, range(100, 105)) == 0
    assert cached(manager, range(5)) == 4


def test_a_sequence_of_a_lower_priority_lowers_nothing():
    manager = manager_of(eviction="priority")
    for priority in (5, 0):
        cached(manager, range(5), priority=priority)
    cached(manager, range(100, 105), priority=3)
    manager.evict(1)
    assert cached(manager, range(5)) == 4


def test_what_is_published_later_has_its_sequences_priority():
    manager = manager_of(eviction="priority")
    manager.allocate("grows", range(3), priority=2)
    manager.append("grows", [3, 4])
    manager.free("grows")
    cached(manager, range(100, 105), priority=1)
    manager.evict(1)
    assert cached(manager, range(5)) == 4


def test_new_content_does_not_inherit_the_uses_of_what_was_there_before():
    pool = BlockPool(2, eviction="lfu")
    for names, uses, expected in (((b"a", b"b"), (4, 2), [1, 0]), ((b"c", b"d"), (1, 2), [0, 1])):
        blocks = np.sort(pool.acquire(2))
        pool.publish(blocks, names, np.zeros(2))
        pool.release(blocks)
        for block in np.repeat(blocks, np.array(uses) - 1):
            pool.share(block[np.newaxis])
            pool.release(block[np.newaxis])
        assert [int(pool.evict(1)[0]) for _ in "ab"] == expected


@pytest.mark.parametrize("eviction", ["lru", "lfu", "priority"])
def test_content_that_is_touched_was_used_last(eviction):
    pool = BlockPool(2, eviction=eviction)
    blocks = pool.acquire(2)
    pool.publish(blocks, [b"a", b"b"], np.zeros(2))
    for i in (0, 1):
        pool.release(blocks[i : i + 1])
    pool.touch(blocks[1:])
    pool.touch(blocks[:1])  # as often as the other, but later
    assert pool.evict(1).tolist() == [blocks[1]]


def test_content_that_is_evicted_again_is_as_good_as_new_on_the_cpu():
    """The CPU pool drops what was wanted longest ago; an eviction from the GPU shows that content was wanted."""
    manager = manager_of(2, 2, on_evict="offload")
    manager.allocate("pin", 1)
    for first in (0, 100, 0, 200, 300):  # each takes the place of the one before: 0 goes to the CPU twice
        manager.allocate("x", range(first, first + 4))
        manager.free("x")
    manager.free("pin")
    assert manager.counters.blocks_offloaded == 3  # 0 and 100, then 200 in the place of one of them
    manager.allocate("again", range(5))
    assert manager.cached_tokens("again") == 4
    assert manager.counters.blocks_restored == 1
    manager.check()


# ---- pressure -------------------------------------------------------------------------------------------------------


def test_pressure_is_felt_once_fewer_blocks_than_the_mark_are_free():
    pool = BlockPool(8)
    pool.pressure_mark = 3
    pool.acquire(5)
    assert not pool.pressure.is_set()  # 3 are free: not fewer
    pool.acquire(1)
    assert pool.pressure.is_set()


def test_the_thread_begins_at_the_high_mark_and_not_before():
    manager = manager_of(100, block_size=1)
    with WatermarkEvictor(manager, high=0.9, low=0.5) as evictor:
        manager.allocate("cached", np.arange(89))
        manager.free("cached")
        assert manager.gpu.pressure_mark == evictor.start_below == 11
        manager.allocate("one", 1)  # 90 of 100 are not free now
        deadline = time.monotonic() + 10
        while manager.gpu.num_free < 50 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert manager.gpu.num_free == 50


# ---- sharing --------------------------------------------------------------------------------------------------------


def test_twins_that_came_back_from_the_cpu_still_copy_before_they_write():
    manager = manager_of(8, 4)
    manager.allocate("a", 6)
    manager.fork("a", "b")
    manager.swap_out("a", "b")
    manager.swap_in("a", "b")
    copies = [manager.append(seq_id).copies for seq_id in "ab"]
    assert [len(each) for each in copies] == [1, 0]
    assert manager.blocks("a")[-1] != manager.blocks("b")[-1]
    manager.check()


def test_a_copy_leaves_one_reader_less_for_each_that_left():
    manager = manager_of()
    manager.allocate("a", 6)
    for twin in "bcd":
        manager.fork("a", twin)
    tail = int(manager.blocks("a")[-1])
    assert len(manager.append_batch("bcd").copies) == 3
    assert manager.gpu.ref_count[tail] == 1
    manager.check()


def test_a_sequence_named_twice_is_swapped_once():
    manager = manager_of(4, 2)
    manager.allocate("a", 6)
    assert manager.can_swap_out("a", "a")
    assert len(manager.swap_out("a", "a")) == 2
    assert len(manager.swap_in("a", "a")) == 2
    manager.check()


def test_twins_need_room_on_the_cpu_once():
    manager = manager_of(8, 3)
    manager.allocate("a", 9)
    manager.fork("a", "b")
    assert manager.can_swap_out("a", "b")
    manager.swap_out("a", "b")
    manager.allocate("c", 20)
    assert manager.can_swap_in("a", "b")  # into the 3 blocks that are left


def test_twins_write_texts_of_their_own():
    """Each goes on with the parent's names and its unfinished block, and neither writes into the other's."""
    manager = manager_of()
    manager.allocate("a", range(6))
    manager.fork("a", "b")
    manager.append("a", [6, 7, 8])
    manager.append("b", [60, 70, 80])
    assert cached(manager, range(9)) == 8
    assert cached(manager, [*range(6), 60, 70, 80]) == 8
    assert cached(manager, [*range(6), 6, 70, 80]) == 4


def test_what_came_back_from_the_cpu_is_found_on_the_gpu():
    manager = manager_of(3, 4, on_evict="offload")
    for prompt in (range(9), range(100, 109), range(9)):
        cached(manager, prompt)
    assert manager.counters.blocks_restored == 2
    assert cached(manager, range(9)) == 8
    assert manager.counters.blocks_restored == 2  # nothing came from the CPU a second time


def test_restored_tokens_count_as_cached():
    manager = manager_of(3, 4, on_evict="offload")
    for prompt in (range(9), range(100, 109), range(9)):
        cached(manager, prompt)
    assert (manager.counters.prompt_tokens, manager.counters.cached_tokens) == (27, 8)


def test_a_waiting_prefix_is_not_counted_as_room():
    """Two cached blocks are the prompt's own prefix: what it shares cannot also be evicted for it."""
    manager = manager_of(4)
    cached(manager, range(9))
    manager.allocate("held", 4)
    prompt = [*range(8), *range(50, 58)]
    assert not manager.can_allocate(prompt)
    with pytest.raises(OutOfBlocksError):
        manager.allocate("x", prompt)
    assert cached(manager, range(9)) == 8


def test_a_row_whose_tail_was_copied_counts_as_changed():
    manager = manager_of(max_seqs=4)
    for seq_id in ("other", "a"):
        manager.allocate(seq_id, 6)
    manager.fork("a", "b")
    manager.tables.changed[:] = False
    manager.append("b")
    changed = [int(manager.tables.ids[row, 1]) for row in np.flatnonzero(manager.tables.changed)]
    assert changed == [manager.blocks("b")[-1]]


def test_extra_keys_are_no_other_keys_run_together():
    assert root_digest(16, b"", ("a", "b")) != root_digest(16, b"", ("asb",))
    assert root_digest(16, b"", (b"1", 2)) != root_digest(16, b"", (b"1i2",))


# ---- preemption -----------------------------------------------------------------------------------------------------


def test_a_victim_that_frees_too_little_stays_if_a_larger_one_must_go():
    manager = manager_of(8)
    manager.allocate("large", 24)
    manager.allocate("small", 8)
    assert make_room(manager, 6).dropped == ["large"]  # the small one came last, but would not be enough
    assert manager.seq_ids == ["small"]


def test_sequences_of_the_priority_that_is_named_give_way_too():
    manager = manager_of(2)
    manager.allocate("equal", 8, priority=1)
    assert make_room(manager, 1, priority=1).dropped == ["equal"]


def test_victims_are_swapped_as_far_as_the_cpu_holds_all_of_them():
    manager = manager_of(8, 3)
    for seq_id in "ab":
        manager.allocate(seq_id, 8)
    manager.allocate("rest", 16, priority=1)
    given_way = make_room(manager, 4, CostModel(1, 1e9, bytes_per_block=1))
    assert (given_way.swapped, given_way.dropped) == (["b"], ["a"])
    manager.check()


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_bytes_are_counted_both_ways():
    manager = manager_of(4, 4, bytes_per_block=100)
    manager.allocate("a", 9)
    manager.swap_out("a")
    manager.swap_in("a")
    assert snapshot(manager)["swapped_bytes"] == 600


def test_the_peak_counts_what_is_read_and_not_what_is_cached():
    manager = manager_of(8)
    cached(manager, range(16))
    manager.allocate("b", 8)
    assert snapshot(manager)["blocks_used_peak"] == 4


def test_the_empty_slots_of_a_tail_that_twins_share_count_once():
    manager = manager_of()
    manager.allocate("a", 5)
    manager.fork("a", "b")
    now = snapshot(manager)
    assert (now["tail_waste_slots"], now["tokens_stored"]) == (3, 5)
