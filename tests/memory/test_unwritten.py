"""What was never computed must not be found, and a call that is taken back must leave nothing behind."""

from __future__ import annotations

import numpy as np
import pytest

from cupaged.errors import OutOfBlocksError
from cupaged.memory.manager import BlockManager
from cupaged.memory.preemption import CostModel, make_room

BLOCK = 4
TEXT = np.arange(17, dtype=np.int32)
SWAPS = CostModel(prefill_tokens_per_s=1, link_bytes_per_s=1e9, bytes_per_block=1)


def found(manager: BlockManager, text=TEXT) -> int:
    """Return how many tokens of a text are found now."""
    manager.allocate("probe", text)
    cached = manager.cached_tokens("probe")
    manager.free("probe", written=False)
    return cached


def fingerprint(manager: BlockManager) -> tuple:
    gpu = manager.gpu
    return (
        gpu.ref_count.tobytes(), gpu.allocator.allocated.tobytes(), gpu.num_free, len(gpu.policy),
        gpu.cache.named.tobytes(), manager.tables.ids.tobytes(), manager.tables.room.tobytes(),
        [(seq_id, manager.num_tokens(seq_id)) for seq_id in manager.seq_ids],
    )  # fmt: skip


# ---- freed as not written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_evict", ["drop", "offload"])
def test_an_unwritten_sequence_is_not_found_after_it_was_swapped_out(on_evict):
    manager = BlockManager(16, 16, BLOCK, on_evict=on_evict)
    manager.allocate("a", TEXT)
    manager.swap_out("a")
    manager.free("a", written=False)
    assert found(manager) == 0
    manager.check()


def test_an_unwritten_sequence_is_not_found_while_it_is_swapped_out():
    manager = BlockManager(16, 16, BLOCK)
    manager.allocate("a", TEXT)
    manager.swap_out("a")
    assert found(manager) == 0
    manager.check()


def test_a_written_sequence_is_found_while_it_is_swapped_out():
    manager = BlockManager(16, 16, BLOCK)
    manager.allocate("a", TEXT)
    manager.publish("a", len(TEXT))
    manager.swap_out("a")
    assert found(manager) == 16
    manager.check()


@pytest.mark.parametrize("times", [1, 2, 3])
def test_an_unwritten_sequence_is_not_found_after_swaps_there_and_back(times):
    manager = BlockManager(32, 32, BLOCK)
    manager.allocate("a", TEXT)
    for _ in range(times):
        manager.swap_out("a")
        manager.allocate(("filler", _), 9)  # so that it comes back to other blocks
        manager.swap_in("a")
    assert found(manager) == 16, "its owner computes it first"
    manager.free("a", written=False)
    assert found(manager) == 0
    manager.check()


def test_an_unwritten_sequence_is_not_found_on_the_cpu_after_its_blocks_were_offloaded():
    manager = BlockManager(16, 32, BLOCK, on_evict="offload")
    manager.allocate("a", TEXT)
    manager.publish("a", len(TEXT))  # which was not true
    manager.swap_out("a")
    manager.evict(16)
    manager.take_transfers()
    assert manager.cpu.num_evictable == 4
    manager.free("a", written=False)
    assert found(manager) == 0
    assert manager.cpu.num_free == 32
    manager.check()


def test_what_was_said_to_be_computed_and_was_not_is_not_found_where_it_lay_before_a_swap():
    manager = BlockManager(16, 16, BLOCK)
    manager.allocate("a", TEXT)
    manager.publish("a", len(TEXT))
    manager.swap_out("a")
    assert found(manager) == 16
    manager.free("a", written=False)
    assert found(manager) == 0
    manager.check()


def test_what_others_wrote_is_found_though_the_same_text_is_freed_as_not_written():
    manager = BlockManager(32, 0, BLOCK)
    manager.allocate("written", TEXT, publish=False)
    manager.allocate("unwritten", TEXT, publish=False)
    manager.publish("written", len(TEXT))
    manager.publish("unwritten", len(TEXT))
    manager.free("unwritten", written=False)
    assert found(manager) == 16
    manager.free("written")
    assert found(manager) == 16
    manager.check()


def test_a_prefix_that_was_found_stays_findable_when_the_rest_is_freed_as_not_written():
    manager = BlockManager(32, 0, BLOCK)
    manager.allocate("a", TEXT[:9])
    manager.free("a")
    manager.allocate("b", TEXT)
    assert manager.cached_tokens("b") == 8
    manager.free("b", written=False)
    assert found(manager) == 8
    manager.check()


# ---- gave way -------------------------------------------------------------------------------------------------------


def test_a_victim_that_was_admitted_and_not_computed_is_not_found():
    manager = BlockManager(6, 0, BLOCK)
    manager.allocate("a", TEXT)
    assert make_room(manager, 6).dropped == ["a"]
    assert found(manager) == 0
    manager.check()


def test_a_victim_that_was_swapped_and_not_computed_is_not_found():
    manager = BlockManager(6, 8, BLOCK)
    manager.allocate("a", TEXT)
    assert make_room(manager, 6, SWAPS).swapped == ["a"]
    assert found(manager) == 0
    manager.check()


def test_of_a_victim_that_decodes_everything_but_its_last_token_is_found():
    manager = BlockManager(6, 0, BLOCK)
    manager.allocate("a", TEXT)
    manager.append_batch(["a"], [17])
    manager.append_batch(["a"], [18])
    manager.append_batch(["a"], [19])  # fills the fifth block, and may not be computed
    assert make_room(manager, 6).dropped == ["a"]
    assert found(manager, np.arange(21)) == 16
    manager.check()


def test_of_a_victim_a_last_chunk_that_was_not_computed_is_not_found():
    manager = BlockManager(8, 0, BLOCK)
    manager.allocate("a", TEXT)
    manager.append("a", np.arange(17, 29))
    assert make_room(manager, 8).dropped == ["a"]
    assert found(manager, np.arange(29)) == 16
    manager.check()


def test_of_a_victim_what_was_said_to_be_computed_is_found():
    manager = BlockManager(8, 0, BLOCK)
    manager.allocate("a", TEXT)
    manager.publish("a", 9)
    assert make_room(manager, 8).dropped == ["a"]
    assert found(manager) == 8
    manager.check()


def test_a_forked_victim_that_shares_what_was_not_computed_is_not_found():
    manager = BlockManager(8, 0, BLOCK)
    manager.allocate("a", TEXT)
    manager.fork("a", "b")
    manager.free("a")
    assert make_room(manager, 8).dropped == ["b"]
    assert found(manager) == 0
    manager.check()


def test_a_prompt_that_another_counts_on_gives_way_with_it_or_not_at_all():
    """ "b" shares what "a" is to compute. If "a" alone gave way, "b" would read blocks that nobody writes."""
    manager = BlockManager(12, 0, BLOCK)
    manager.allocate("a", TEXT)
    manager.allocate("b", TEXT, priority=1)
    assert manager.cached_tokens("b") == 16
    assert make_room(manager, 7).dropped == ["b"]
    manager.allocate("b", TEXT, priority=1)
    with pytest.raises(OutOfBlocksError):
        make_room(manager, 8, protect=["b"])
    assert sorted(make_room(manager, 8).dropped) == ["a", "b"]
    manager.check()


def test_a_prompt_that_was_computed_gives_way_without_those_that_share_it():
    manager = BlockManager(12, 0, BLOCK)
    manager.allocate("a", TEXT)
    manager.publish("a", 17)
    manager.allocate("b", TEXT, priority=1)
    assert make_room(manager, 7).dropped == ["a"]
    manager.check()


# ---- taken back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["lifo", "sorted"])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("count", [1, 2, 4, 9])
@pytest.mark.parametrize("known", [True, False])
def test_an_append_that_is_undone_leaves_no_trace(order, length, count, known):
    manager = BlockManager(16, 0, BLOCK, order=order)
    manager.allocate("a", TEXT[:length])
    before = fingerprint(manager)
    more = np.arange(100, 100 + count) if known else count
    marks = manager.mark(["a"])
    slots = manager.append("a", more).slots
    assert manager.undo(marks) == []
    assert fingerprint(manager) == before
    manager.check()
    assert manager.append("a", more).slots.tolist() == slots.tolist(), "the same call gets the same slots"
    manager.check()


def test_a_batch_that_is_undone_leaves_no_trace_and_names_its_blocks_as_if_it_had_not_been():
    manager = BlockManager(32, 0, BLOCK)
    for i, length in enumerate((3, 4, 5, 7)):
        manager.allocate(i, np.arange(i, i + length))
    before = fingerprint(manager)
    marks = manager.mark(range(4))
    slots = manager.append_batch(range(4), [90, 91, 92, 93]).slots
    assert manager.undo(marks) == []
    assert fingerprint(manager) == before
    again = manager.append_batch(range(4), [80, 91, 92, 83]).slots
    assert again.tolist() == slots.tolist()
    assert found(manager, [0, 1, 2, 80, 5]) == 4
    assert found(manager, [0, 1, 2, 90, 5]) == 0
    assert found(manager, [3, 4, 5, 6, 7, 8, 9, 93, 5]) == 4
    manager.check()


@pytest.mark.parametrize("together", [True, False])
def test_undoing_a_copy_gives_the_shared_block_back(together):
    manager = BlockManager(16, 0, BLOCK)
    manager.allocate("a", TEXT[:6])
    manager.fork("a", "b")
    before = fingerprint(manager)
    names = ["a", "b"] if together else ["b"]
    marks = manager.mark(names)
    assert len(manager.append_batch(names, [7] * len(names)).copies) == 1
    assert manager.undo(marks) == []
    assert fingerprint(manager) == before
    manager.check()
    assert len(manager.append_batch(["a", "b"], [7, 8]).copies) == 1, "it is copied when it is written again"
    assert not set(manager.blocks("a")[1:]) & set(manager.blocks("b")[1:])
    manager.check()


def test_a_sequence_whose_shared_block_is_gone_ends_at_the_block_before():
    manager = BlockManager(16, 0, BLOCK)
    manager.allocate("a", TEXT[:6])
    manager.fork("a", "b")
    marks = manager.mark(["b"])
    manager.append("b", [7])
    manager.free("a")
    assert manager.undo(marks) == ["b"]
    assert manager.num_tokens("b") == 4
    manager.check()
    assert manager.append("b", [7]).slots.tolist() == manager.slots("b", 4, 5).tolist()
    manager.check()


def test_undo_passes_over_sequences_that_are_gone_or_swapped_out():
    manager = BlockManager(16, 16, BLOCK)
    manager.allocate("a", 5)
    manager.allocate("b", 5)
    marks = manager.mark(["a", "b"])
    manager.append_batch(["a", "b"])
    manager.free("a")
    manager.swap_out("b")
    assert manager.undo(marks) == []
    assert manager.num_tokens("b") == 6
    manager.check()


# ---- hooks and policies that fail -----------------------------------------------------------------------------------


def full_of_cached(**options) -> BlockManager:
    manager = BlockManager(4, 4, BLOCK, **options)
    manager.allocate("a", np.arange(16))
    manager.free("a")
    return manager


def failing(*_):
    raise RuntimeError("disk full")


@pytest.mark.parametrize(
    "call",
    [
        lambda manager: manager.allocate("b", 16),
        lambda manager: manager.allocate("b", np.arange(7)),  # shares one, and evicts for the next
        lambda manager: manager.evict(2),
    ],
    ids=["new", "shares", "evict"],
)
def test_a_hook_that_raises_while_blocks_are_evicted_changes_nothing(call):
    manager = full_of_cached()
    manager.gpu.on_evict = failing
    with pytest.raises(RuntimeError, match="disk full"):
        call(manager)
    manager.check()
    assert (manager.gpu.num_evictable, manager.gpu.num_used, manager.gpu.num_evicted) == (4, 0, 0)
    assert manager.seq_ids == []
    manager.gpu.on_evict = None
    assert len(manager.allocate("b", 16)) == 4
    manager.check()


def test_a_hook_that_raises_leaves_a_copied_last_block_and_a_length_as_they_were():
    manager = BlockManager(6, 0, BLOCK)
    manager.allocate("cached", np.arange(12))
    manager.free("cached")
    manager.allocate("a", 6)
    manager.fork("a", "b")
    before = fingerprint(manager)
    manager.gpu.on_evict = failing
    for call in (lambda: manager.append("b", 7), lambda: manager.append("b", 3)):
        if manager.gpu.num_free:
            manager.gpu.allocator.allocate(manager.gpu.num_free)  # so that the copy itself must evict
            before = fingerprint(manager)
        with pytest.raises(RuntimeError, match="disk full"):
            call()
        assert fingerprint(manager) == before


def test_a_hook_that_raises_while_a_block_is_restored_changes_nothing():
    manager = full_of_cached(on_evict="offload")
    manager.allocate("b", np.arange(100, 116))
    manager.take_transfers()
    manager.free("b")
    offload = manager.gpu.on_evict
    manager.gpu.on_evict = failing
    with pytest.raises(RuntimeError, match="disk full"):
        manager.allocate("again", np.arange(16))
    manager.check()
    assert manager.take_transfers() == []
    manager.gpu.on_evict = offload
    assert len(manager.allocate("again", np.arange(16))) == 4
    assert manager.cached_tokens("again") == 12
    manager.check()


def test_a_policy_that_cannot_make_a_key_loses_content_and_no_block():
    from cupaged.memory.eviction import LFU

    class Unsure(LFU):
        def key(self, blocks):
            if self.stats.clock > 2:
                raise RuntimeError("no key")
            return super().key(blocks)

    manager = BlockManager(8, 0, BLOCK, eviction=Unsure)
    for seq_id in "ab":
        manager.allocate(seq_id, np.arange(16) + 100 * ord(seq_id))
    for seq_id in "ab":
        try:
            manager.free(seq_id)
        except RuntimeError as error:
            assert str(error) == "no key"
        manager.check()
    assert manager.seq_ids == [] and manager.gpu.num_available == 8


@pytest.mark.parametrize("wrong", [[], [0], [0, 1, 2], [0, 7]], ids=str)
def test_a_policy_that_returns_other_blocks_than_asked_for_is_named(wrong):
    from cupaged.memory.eviction import LRU

    class Wrong(LRU):
        def pop(self, n):
            return np.array(wrong, np.int32)

    manager = BlockManager(8, 0, BLOCK, eviction=Wrong)
    manager.allocate("cached", np.arange(28))
    manager.free("cached")
    with pytest.raises(RuntimeError, match="eviction must return 2 of the blocks that its policy holds"):
        manager.allocate("new", 12)
    assert manager.seq_ids == []


def test_publishing_the_same_blocks_again_counts_nothing_anew():
    manager = BlockManager(16, 0, BLOCK, eviction="lfu")
    manager.allocate("a", TEXT, publish=False)
    manager.fork("a", "b")
    manager.publish("a", 16)
    for i in range(5):
        manager.allocate(i, TEXT)
        manager.free(i)
    block = manager.blocks("a")[0]
    before = manager.gpu.stats.access_count[block], manager.gpu.stats.published[block]
    manager.publish("b", 16)
    assert (manager.gpu.stats.access_count[block], manager.gpu.stats.published[block]) == before
    assert before[0] == 6


def test_what_a_readmitted_sequence_finds_of_its_own_is_no_hit():
    manager = BlockManager(16, 0, BLOCK)
    manager.allocate("a", TEXT)
    manager.publish("a", len(TEXT))
    manager.drop("a")
    manager.allocate("a", TEXT, readmitted=True)
    assert manager.cached_tokens("a") == 16
    assert (manager.counters.prompt_tokens, manager.counters.cached_tokens) == (17, 0)
