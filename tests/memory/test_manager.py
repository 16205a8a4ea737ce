"""The manager: exact blocks, slots and copies; what it refuses, and that a refusal changes nothing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from cupaged.errors import OutOfBlocksError
from cupaged.memory.manager import BlockManager


def manager_of(num_gpu_blocks: int = 16, num_cpu_blocks: int = 0, block_size: int = 4, **options) -> BlockManager:
    return BlockManager(num_gpu_blocks, num_cpu_blocks, block_size, **options)


def state(manager: BlockManager) -> tuple:
    """Return everything that a refused call must leave as it was."""
    pools = [
        (pool.ref_count.tolist(), pool.allocator.allocated.tolist(), pool.num_free, len(pool.cache), len(pool.policy))
        for pool in (manager.gpu, manager.cpu)
    ]
    tables = manager.tables
    rows = tables.ids.tolist(), tables.num_blocks.tolist(), tables.room.tolist()
    return pools, rows, manager.seq_ids, [manager.blocks(seq_id).tolist() for seq_id in manager.seq_ids]


# ---- the guide ------------------------------------------------------------------------------------------------------


def test_the_guides_trace():
    """Ids ascend on a fresh pool; a step in the middle of a block takes none; a freed block is the next to be used."""
    manager = manager_of(8)
    assert manager.allocate("A", 6).tolist() == [0, 1]
    assert manager.allocate("B", 9).tolist() == [2, 3, 4]
    assert manager.append("A").slots.tolist() == [6]
    assert manager.append("A").slots.tolist() == [7]
    assert manager.append("A").slots.tolist() == [20]  # (prompt + step) % block_size is 0: block 5
    manager.free("B")
    assert manager.gpu.num_free == 5
    assert manager.allocate("C", 10).tolist() == [2, 3, 4]
    assert manager.block_tables(["A", "C"]).tolist() == [[0, 1, 5], [2, 3, 4]]
    manager.check()


def test_the_guides_exercise():
    """Free a sequence of three blocks and admit one of three: the same ids, in the same order."""
    manager = manager_of(8)
    first = manager.allocate("first", 12)
    manager.free("first")
    assert manager.allocate("second", 12).tolist() == first.tolist()


def test_the_offset_of_a_step_is_prompt_plus_step_modulo_block_size():
    manager = manager_of(8, block_size=16)
    manager.allocate("x", 5)
    offsets = [int(manager.append("x").slots[0]) % 16 for _ in range(30)]
    assert offsets == [(5 + step) % 16 for step in range(30)]


# ---- fork and copy-on-write -----------------------------------------------------------------------------------------


def test_the_deep_dives_picture():
    """Blocks A and B shared; then C and D, one each; then E and F: 33 % saved, then 25 %."""
    manager = manager_of()
    shared = manager.allocate("parent", 8).tolist()
    manager.fork("parent", "child")
    assert manager.gpu.ref_count[shared].tolist() == [2, 2]

    def saved() -> float:
        logical = sum(len(manager.blocks(seq_id)) for seq_id in manager.seq_ids)
        return 1 - manager.gpu.num_used / logical

    for seq_id in ("parent", "child"):
        assert len(manager.append(seq_id, 4).copies) == 0  # the last shared block is full: nobody writes to it
    assert [manager.blocks(seq_id).tolist() for seq_id in ("parent", "child")] == [[0, 1, 2], [0, 1, 3]]
    assert saved() == pytest.approx(1 / 3)
    for seq_id in ("parent", "child"):
        manager.append(seq_id, 4)
    assert [manager.blocks(seq_id).tolist() for seq_id in ("parent", "child")] == [[0, 1, 2, 4], [0, 1, 3, 5]]
    assert saved() == pytest.approx(1 / 4)
    manager.free("parent")
    assert manager.gpu.ref_count[:6].tolist() == [1, 1, 0, 1, 0, 1]
    manager.check()


def test_a_shared_partial_tail_is_copied_before_the_first_write():
    """The deep dive shares the partial tail without copy-on-write: one sequence overwrites the other's token."""
    manager = manager_of()
    manager.allocate("parent", 6)
    manager.fork("parent", "child")
    slots, copies = manager.append("child")
    assert copies.tolist() == [[1, 2]]
    assert copies.dtype == np.int32
    assert slots.tolist() == [10]
    slots, copies = manager.append("parent")  # the only reader by now: in place
    assert copies.tolist() == []
    assert slots.tolist() == [6]
    assert manager.counters.copies == 1
    manager.check()


def test_the_last_reader_writes_in_place():
    manager = manager_of()
    manager.allocate("parent", 6)
    manager.fork("parent", "child")
    manager.free("parent")
    assert manager.append("child").copies.tolist() == []
    assert manager.blocks("child").tolist() == [0, 1]


def test_a_batch_of_twins_copies_for_all_but_the_last():
    manager = manager_of()
    manager.allocate("a", 6)
    for twin in "bc":
        manager.fork("a", twin)
    slots, copies = manager.append_batch("abc")
    assert copies.tolist() == [[1, 2], [1, 3]]
    assert slots.tolist() == [10, 14, 6]
    assert manager.gpu.ref_count[:4].tolist() == [3, 1, 1, 1]
    manager.check()


def test_a_batch_of_some_twins_copies_for_all_of_them():
    manager = manager_of()
    manager.allocate("a", 6)
    for twin in "bc":
        manager.fork("a", twin)
    manager.allocate("full", 4)
    slots, copies = manager.append_batch(["c", "full", "a"])
    assert copies.tolist() == [[1, 3], [1, 5]]
    assert slots.tolist() == [14, 16, 22]
    assert manager.append("b").copies.tolist() == []
    manager.check()


def test_a_fork_takes_no_block_and_frees_none():
    manager = manager_of(2)
    manager.allocate("parent", 8)
    manager.fork("parent", "child")
    assert manager.gpu.num_free == 0
    manager.free("child")
    assert manager.gpu.num_free == 0
    manager.free("parent")
    assert manager.gpu.num_free == 2


# ---- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 256])
def test_a_batch_takes_the_steps_that_its_sequences_would_take_alone(block_size):
    together, alone = (BlockManager(400, block_size=block_size, max_seqs=2, max_blocks_per_seq=1) for _ in range(2))
    for manager in (together, alone):
        for seq_id in range(9):
            manager.allocate(seq_id, 1 + 3 * seq_id)
        for seq_id in range(4):
            manager.fork(seq_id, 10 + seq_id)
        for seq_id in (2, 5):
            manager.free(seq_id)
    names = [7, 12, 0, 10, 8, 1, 3, 13, 6]
    batch = together.batch(names)
    for _ in range(20):
        slots, copies = together.append_batch(batch)
        one_by_one = [alone.append(seq_id) for seq_id in names]
        assert slots.tolist() == [int(step.slots[0]) for step in one_by_one]
        assert copies.tolist() == [pair for step in one_by_one for pair in step.copies.tolist()]
        assert together.block_tables(batch).tolist() == alone.block_tables(names).tolist()
        assert together.seq_lens(batch).tolist() == alone.seq_lens(names).tolist()
    assert state(together) == state(alone)
    together.check()


def test_a_batch_notices_that_a_sequence_is_gone_and_its_row_another_ones():
    manager = manager_of()
    for seq_id in "abc":
        manager.allocate(seq_id, 3)
    batch = manager.batch("abc")
    manager.append_batch(batch)
    manager.free("b")
    manager.allocate("d", 1)
    before = state(manager)
    with pytest.raises(ValueError, match=r"seq_id .* got 'b'"):
        manager.append_batch(batch)
    assert state(manager) == before


def test_a_batch_follows_a_sequence_that_comes_back_in_another_row():
    manager = manager_of()
    for seq_id in "ab":
        manager.allocate(seq_id, 3)
    batch = manager.batch("ab")
    manager.free("b")
    manager.free("a")
    manager.allocate("b", 2)
    manager.allocate("a", 1)
    manager.append_batch(batch)
    assert manager.seq_lens("ab").tolist() == [2, 3]


def test_a_batch_names_each_sequence_once():
    manager = manager_of()
    manager.allocate("a", 3)
    with pytest.raises(ValueError, match="seq_ids must name each sequence once"):
        manager.append_batch(["a", "a"])


def test_an_empty_batch_is_nothing():
    slots, copies = manager_of().append_batch([])
    assert slots.shape == (0,)
    assert copies.shape == (0, 2)
    assert manager_of().block_tables([]).shape == (0, 1)


# ---- all or nothing -------------------------------------------------------------------------------------------------


def test_an_admission_that_does_not_fit_changes_nothing():
    """The guide leaks the blocks that it took before it ran out."""
    manager = manager_of(4)
    manager.allocate("cached", range(9))
    manager.free("cached")
    manager.allocate("running", 4)
    before = state(manager)
    assert not manager.can_allocate([*range(8), *range(50, 62)])
    with pytest.raises(OutOfBlocksError) as caught:
        manager.allocate("x", [*range(8), *range(50, 62)])
    assert (caught.value.needed, caught.value.free, caught.value.evictable) == (3, 1, 0)
    assert state(manager) == before
    assert manager.can_allocate([*range(8), *range(50, 54)])
    manager.allocate("x", [*range(8), *range(50, 54)])
    manager.check()


def test_an_append_that_does_not_fit_changes_nothing():
    manager = manager_of(3)
    manager.allocate("a", 6)
    manager.fork("a", "b")
    before = state(manager)
    assert not manager.can_append("b", 3)  # a copy and a new block, of which one is there
    with pytest.raises(OutOfBlocksError) as caught:
        manager.append("b", 3)
    assert (caught.value.needed, caught.value.free) == (2, 1)
    assert state(manager) == before
    assert manager.can_append("b", 2)


def test_a_batch_that_does_not_fit_changes_nothing():
    manager = manager_of(5)
    manager.allocate("full", 4)
    manager.allocate("partial", 6)
    manager.fork("partial", "twin")
    manager.allocate("other", 4)
    before = state(manager)
    with pytest.raises(OutOfBlocksError) as caught:
        manager.append_batch(["full", "partial", "other"])
    assert (caught.value.needed, caught.value.free) == (3, 1)
    assert state(manager) == before
    manager.append_batch(["partial", "twin"])
    manager.check()


def test_a_swap_that_does_not_fit_changes_nothing():
    manager = manager_of(4, 1)
    manager.allocate("a", 6)
    before = state(manager)
    assert not manager.can_swap_out("a")
    with pytest.raises(OutOfBlocksError):
        manager.swap_out("a")
    assert state(manager) == before
    manager = manager_of(4, 4)
    manager.allocate("a", 12)
    manager.swap_out("a")
    manager.allocate("b", 8)
    before = state(manager)
    assert not manager.can_swap_in("a")
    with pytest.raises(OutOfBlocksError):
        manager.swap_in("a")
    assert state(manager) == before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.allocate("a", 3), ValueError, "seq_id must be new"),
        (lambda m: m.allocate("x", 0), ValueError, "tokens must be at least 1"),
        (lambda m: m.allocate("x", -5), ValueError, "tokens must be at least 1"),
        (lambda m: m.allocate("x", []), ValueError, "tokens must hold at least one token"),
        (lambda m: m.allocate("x", [[1, 2]]), ValueError, r"tokens must be token ids, a vector, got shape \(1, 2\)"),
        (lambda m: m.allocate("x", [1.5]), TypeError, "tokens must be integers, got float64"),
        (lambda m: m.allocate("x", 1.5), TypeError, "tokens must be an integer, got float"),
        (lambda m: m.allocate("x", True), TypeError, "tokens must be an integer, got bool"),
        (lambda m: m.allocate("x", "text"), TypeError, "tokens must be an integer, got str"),
        (lambda m: m.allocate("x", [2**31]), ValueError, "tokens must fit in int32, got 2147483648"),
        (lambda m: m.allocate("x", [1], priority=2**31), ValueError, "priority must fit in int32"),
        (lambda m: m.allocate("x", [1], priority=0.5), TypeError, "priority must be an integer"),
        (lambda m: m.allocate("x", 3, extra=(0.5,)), TypeError, "extra must hold str, bytes or int"),
        (lambda m: m.append("x"), ValueError, "seq_id must be a sequence that was admitted and not freed, got 'x'"),
        (lambda m: m.append("a", 0), ValueError, "n must be at least 1"),
        (lambda m: m.append("swapped"), ValueError, "'swapped' is swapped out"),
        (lambda m: m.append_batch(["a", "x"]), ValueError, "got 'x'"),
        (lambda m: m.append_batch(["a"], tokens=[1, 2]), ValueError, r"tokens must be token ids, of shape \(1,\)"),
        (lambda m: m.append_batch(["a"], tokens=[0.5]), TypeError, "tokens must be integers"),
        (lambda m: m.fork("x", "y"), ValueError, "got 'x'"),
        (lambda m: m.fork("a", "a"), ValueError, "child_id must be new"),
        (lambda m: m.fork("swapped", "y"), ValueError, "is swapped out"),
        (lambda m: m.free("x"), ValueError, "got 'x'"),
        (lambda m: m.swap_in("a"), ValueError, "'a' is on the GPU"),
        (lambda m: m.swap_out("swapped"), ValueError, "is swapped out"),
        (lambda m: m.swap_out("a", "x"), ValueError, "got 'x'"),
        (lambda m: m.block_tables(["swapped"]), ValueError, "is swapped out"),
        (lambda m: m.slots("a", 2, 9), ValueError, "start and stop must lie in 0 to 6"),
        (lambda m: m.publish("a", -1), ValueError, "num_tokens must be at least 0"),
        (lambda m: m.evict(-1), ValueError, "n must be at least 0"),
    ],
)
def test_a_mistake_is_named_and_changes_nothing(call, error, message):
    manager = manager_of(16, 8)
    manager.allocate("a", range(6))
    manager.allocate("swapped", 5)
    manager.swap_out("swapped")
    before = state(manager)
    with pytest.raises(error, match=message):
        call(manager)
    assert state(manager) == before


def test_a_freed_sequence_cannot_be_freed_again():
    manager = manager_of()
    manager.allocate("a", 5)
    manager.free("a")
    with pytest.raises(ValueError, match="not freed, got 'a'"):
        manager.free("a")
    assert manager.gpu.num_free == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_gpu_blocks": -1}, "num_gpu_blocks"),
        ({"num_cpu_blocks": -1}, "num_cpu_blocks"),
        ({"block_size": 0}, "block_size"),
        ({"order": "best"}, "order must be one of lifo, fifo, sorted, random"),
        ({"on_evict": "keep"}, 'on_evict must be "drop" or "offload"'),
        ({"max_seqs": 0}, "max_seqs"),
    ],
)
def test_a_bad_manager_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BlockManager(**{"num_gpu_blocks": 4, **options})


# ---- swap and offload -----------------------------------------------------------------------------------------------


def test_swapping_out_and_in_gives_the_pairs_to_copy():
    manager = manager_of(8, 8)
    manager.allocate("other", 1)
    manager.allocate("a", 10)
    assert manager.swap_out("a").tolist() == [[1, 0], [2, 1], [3, 2]]
    assert manager.is_swapped("a")
    assert (manager.tables.ids[1] == -1).all()  # a kernel must not read CPU block ids as GPU ones
    assert manager.blocks("a").tolist() == [0, 1, 2]
    assert manager.num_tokens("a") == 10
    manager.allocate("b", 5)
    assert manager.swap_in("a").tolist() == [[0, 3], [1, 4], [2, 5]]
    assert manager.append("a").slots.tolist() == [22]
    assert manager.cpu.num_free == 8
    manager.check()


def test_twins_that_are_swapped_together_share_on_the_other_side():
    manager = manager_of(8, 3)
    manager.allocate("a", 10)
    manager.fork("a", "b")
    assert manager.can_swap_out("a", "b")
    assert len(manager.swap_out("a", "b")) == 3
    assert manager.cpu.ref_count.tolist() == [2, 2, 2]
    assert len(manager.swap_in("b", "a")) == 3
    assert manager.append("a").copies.tolist() == [[2, 3]]  # still copy-on-write after the journey
    manager.check()


def test_a_swapped_sequence_can_be_freed():
    manager = manager_of(4, 4)
    manager.allocate("a", 10)
    manager.swap_out("a")
    manager.free("a")
    assert (manager.gpu.num_free, manager.cpu.num_free) == (4, 4)
    manager.check()


def test_a_prompt_that_was_swapped_out_and_in_is_still_found():
    manager = manager_of(4, 4)
    manager.allocate("a", range(9))
    manager.swap_out("a")
    manager.evict(4)
    manager.swap_in("a")
    manager.allocate("b", range(9))
    assert manager.cached_tokens("b") == 8


def test_an_evicted_block_moves_to_the_cpu_and_is_restored():
    manager = manager_of(3, 4, on_evict="offload")
    manager.allocate("a", range(9))
    manager.free("a")
    manager.allocate("b", range(100, 109))
    (offload,) = manager.take_transfers()
    assert offload.direction == "offload"
    assert offload.pairs.tolist() == [[1, 0], [0, 1]]
    assert manager.take_transfers() == []
    manager.free("b")

    blocks = manager.allocate("again", range(9))
    assert manager.cached_tokens("again") == 8
    offload, restore = manager.take_transfers()  # room for the restored is made first
    assert (offload.direction, restore.direction) == ("offload", "restore")
    assert restore.pairs.tolist() == [[1, blocks[0]], [0, blocks[1]]]
    assert manager.counters.blocks_offloaded == 4
    assert manager.counters.blocks_restored == 2
    manager.check()


def test_offloading_never_overwrites_what_is_about_to_be_restored():
    manager = manager_of(2, 2, on_evict="offload")
    manager.allocate("a", range(8))
    manager.free("a")
    manager.allocate("b", range(100, 108))
    manager.free("b")
    manager.take_transfers()
    manager.allocate("again", range(8))
    first, second = manager.take_transfers()
    assert (first.direction, second.direction) == ("offload", "restore")
    assert not set(first.pairs[:, 1]) & set(second.pairs[:, 0])
    manager.check()


def test_a_block_that_the_cpu_holds_already_is_not_copied_again():
    manager = manager_of(2, 4, on_evict="offload")
    for _ in range(3):
        for start in (0, 100):
            manager.allocate("x", range(start, start + 8))
            manager.free("x")
    assert manager.counters.blocks_offloaded == 4
    manager.check()


# ---- the whole ------------------------------------------------------------------------------------------------------


def test_slots_of_ten_million_blocks_do_not_overflow():
    """An offset of 32 bits (vllm 1486) does not reach. Block 10,000,000 of 256 slots begins at slot 2,560,000,000."""
    manager = BlockManager(10_000_001, block_size=256, order="fifo")
    manager.gpu.allocator.allocate(10_000_000)
    manager.allocate("x", 1)
    assert manager.append("x").slots.tolist() == [2_560_000_001]
    assert manager.append_batch(["x"]).slots.tolist() == [2_560_000_002]
    assert manager.slots("x").tolist() == [2_560_000_000, 2_560_000_001, 2_560_000_002]


def test_block_tables_are_a_copy_in_the_order_asked_for():
    manager = manager_of()
    manager.allocate("a", 5)
    manager.allocate("b", 1)
    tables = manager.block_tables(["b", "a"])
    assert tables.dtype == np.int32
    assert tables.tolist() == [[2, -1], [0, 1]]
    tables[:] = 7
    assert manager.block_tables(["b", "a"]).tolist() == [[2, -1], [0, 1]]


@pytest.mark.parametrize("order", ["lifo", "fifo", "sorted"])
def test_free_order_after_mixed_operations(order):
    manager = manager_of(8, order=order)
    manager.allocate("a", 12)  # 0 1 2
    manager.allocate("b", 8)  # 3 4
    manager.fork("a", "c")
    manager.free("a")  # nothing: c reads on
    manager.free("b")
    manager.append("c", 1)
    manager.free("c")
    expected = {
        "lifo": [0, 1, 2, 3, 4, 5, 6, 7],
        "fifo": [6, 7, 3, 4, 0, 1, 2, 5],
        "sorted": [0, 1, 2, 3, 4, 5, 6, 7],
    }[order]
    assert manager.allocate("all", 32).tolist() == expected


def test_the_memory_manager_imports_no_cupy():
    code = (
        "import sys, pkgutil, importlib, cupaged.memory\n"
        "for module in pkgutil.iter_modules(cupaged.memory.__path__):\n"
        "    importlib.import_module('cupaged.memory.' + module.name)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'cupy', 'torch', 'scipy', 'prometheus_client'}))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
