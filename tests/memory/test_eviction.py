"""Eviction policies: who goes first, and that no outdated entry ever decides."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupaged.memory.eviction import (
    BELADY_NEVER,
    POLICIES,
    BlockStats,
    Cost,
    KeyedPolicy,
    belady_hits,
    make_policy,
    next_uses,
)
from cupaged.memory.manager import BlockManager
from cupaged.memory.pool import BlockPool


def ids(*blocks: int) -> np.ndarray:
    return np.array(blocks, np.int32)


def policy_of(name: str, num_blocks: int = 8):
    stats = BlockStats(num_blocks)
    return stats, make_policy(name, stats)


def test_lru_evicts_the_block_released_longest_ago():
    _, policy = policy_of("lru")
    policy.add(ids(3, 1, 2))
    policy.add(ids(0))
    assert policy.pop(2).tolist() == [3, 1]
    assert policy.pop(9).tolist() == [2, 0]


def test_fifo_evicts_the_oldest_content_however_often_it_is_used():
    stats, policy = policy_of("fifo")
    stats.named(ids(0), 0, 0)
    stats.named(ids(1), 0, 0)
    policy.add(ids(1, 0))
    stats.hit(ids(0))
    policy.add(ids(0))
    assert policy.pop(2).tolist() == [0, 1]


def test_lfu_evicts_the_content_with_the_fewest_uses_then_the_least_recent():
    stats, policy = policy_of("lfu")
    stats.named(ids(0, 1, 2), 0, 0)
    stats.hit(ids(0, 2))
    stats.hit(ids(2))
    stats.hit(ids(0))
    stats.accessed(ids(2))
    stats.accessed(ids(0))
    policy.add(ids(0, 1, 2))
    assert policy.pop(3).tolist() == [1, 2, 0]


def test_priority_evicts_the_lowest_then_the_least_recent():
    stats, policy = policy_of("priority")
    stats.named(ids(0, 1, 2), 0, np.array([1, -2, 1]))
    stats.accessed(ids(2))
    stats.accessed(ids(0))
    policy.add(ids(0, 1, 2))
    assert policy.pop(3).tolist() == [1, 2, 0]


def test_cost_evicts_the_block_that_is_cheapest_to_compute_again():
    stats, policy = policy_of("cost")
    stats.named(ids(0, 1, 2), np.array([100, 5, 20]), 0)
    for block in range(3):
        policy.add(ids(block))
    assert policy.pop(3).tolist() == [1, 2, 0]


def test_cost_takes_a_text_from_its_end_though_its_beginning_is_cheaper():
    stats, policy = policy_of("cost")
    stats.named(ids(0, 1, 2), np.arange(3), 0)
    policy.add(ids(2, 1, 0))
    stats.named(ids(3), 1, 0)
    policy.add(ids(3))
    assert policy.pop(4).tolist() == [3, 2, 1, 0]


def test_cost_lets_an_expensive_block_that_nobody_wants_go_in_the_end():
    stats = BlockStats(4, block_size=1)
    policy = Cost(stats, par_context=1.0)  # a block at depth d costs 1 + d
    stats.named(ids(0), 4, 0)
    policy.add(ids(0))
    evicted = []
    for block in itertools.islice(itertools.cycle([1, 2, 3]), 12):  # cheap ones, used once, at cost 1
        stats.named(ids(block), 0, 0)
        policy.add(ids(block))
        evicted += policy.pop(1).tolist()
    assert evicted[:4] == [1, 2, 3, 1]
    assert evicted[4:6] == [0, 2]  # inflated to 4 + 1, a new cheap block costs no less than the old one at 5
    assert 0 not in evicted[6:]


@pytest.mark.parametrize("name", POLICIES)
def test_a_touched_entry_is_not_evicted_from_its_old_place(name):
    stats, policy = policy_of(name)
    policy.add(ids(0, 1, 2))
    stats.published[0], stats.priority[0], stats.depth[0] = 9, 9, 9
    stats.hit(ids(0))
    policy.add(ids(0))  # queued again: the entry in front is outdated
    assert len(policy) == 3
    assert policy.pop(3).tolist() == [1, 2, 0]
    assert len(policy) == 0


@pytest.mark.parametrize("name", POLICIES)
def test_a_block_that_is_referenced_again_is_not_evicted(name):
    _, policy = policy_of(name)
    policy.add(ids(0, 1, 2))
    policy.remove(ids(1))
    assert len(policy) == 2
    assert policy.pop(9).tolist() == [0, 2]
    assert policy.pop(9).tolist() == []


@pytest.mark.parametrize("name", POLICIES)
def test_a_block_freed_twice_before_the_heap_is_cleaned_goes_once(name):
    _, policy = policy_of(name)
    policy.add(ids(0, 1))
    policy.remove(ids(0))
    policy.add(ids(0))  # two entries of block 0 wait now, one of them outdated
    assert len(policy) == 2
    assert policy.pop(1).tolist() == [1]
    assert policy.pop(5).tolist() == [0]
    assert policy.pop(5).tolist() == []


@pytest.mark.parametrize("name", POLICIES)
def test_outdated_entries_do_not_pile_up(name):
    stats, policy = policy_of(name)
    for _ in range(1000):
        policy.add(ids(0, 1, 2))
        policy.remove(ids(0, 1, 2))
    held = len(policy._heap) if isinstance(policy, KeyedPolicy) else len(policy._queue)
    assert held <= 2 * stats.num_blocks + 64
    assert len(policy) == 0


@pytest.mark.parametrize("name", POLICIES)
def test_removing_what_is_not_there_is_nothing(name):
    _, policy = policy_of(name)
    policy.remove(ids(4, 5))
    policy.add(ids())
    assert len(policy) == 0
    assert policy.pop(3).dtype == np.int32


@given(st.sampled_from(sorted(POLICIES)), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=60))
def test_any_mixture_agrees_with_a_sorted_list(name, operations):
    """The model keeps (key when added, ticket, block) and sorts; the cost policy's inflation is followed too."""
    stats, policy = policy_of(name, 6)
    stats.named(np.arange(6), np.arange(6) * 50, np.arange(6) % 2)
    model: dict[int, tuple] = {}
    ticket = itertools.count()
    inflation = 0.0

    def key(block: int):
        return {
            "lru": 0,
            "fifo": int(stats.published[block]),
            "lfu": (int(stats.access_count[block]), int(stats.last_access[block])),
            "priority": (int(stats.priority[block]), int(stats.last_access[block])),
            "cost": inflation + 1.0 + float(stats.depth[block]) * 16 / 30_000.0,
        }[name]

    for kind, block in operations:
        if kind == 0:
            policy.add(ids(block))
            model[block] = (key(block), next(ticket))
        elif kind == 1:
            policy.remove(ids(block))
            model.pop(block, None)
        elif kind == 2:
            stats.hit(ids(block))
        else:
            expected = sorted(model, key=model.__getitem__)[:block]
            assert policy.pop(block).tolist() == expected
            keys = [model.pop(gone)[0] for gone in expected]
            inflation = keys[-1] if keys and name == "cost" else inflation
        assert len(policy) == len(model)


def test_lru_keeps_its_order_over_many_compactions():
    _, policy = policy_of("lru", 4)
    policy.add(ids(2))
    for _ in range(50):
        policy.add(ids(0))
        policy.add(ids(1))
    assert policy.pop(3).tolist() == [2, 0, 1]


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ValueError, match=r"eviction must be one of lru, fifo, lfu, priority, cost .* got 'mru'"):
        BlockPool(4, eviction="mru")


def test_a_policy_of_ones_own_needs_four_methods():
    class MostRecentlyUsed:
        def __init__(self, stats):
            self.blocks: list[int] = []

        def add(self, blocks):
            self.remove(blocks)
            self.blocks += blocks.tolist()

        def remove(self, blocks):
            self.blocks = [block for block in self.blocks if block not in blocks]

        def pop(self, n):
            popped, self.blocks = self.blocks[::-1][:n], self.blocks[: len(self.blocks) - n]
            return np.array(popped, np.int32)

        def __len__(self):
            return len(self.blocks)

    manager = BlockManager(4, block_size=2, eviction=MostRecentlyUsed)
    for number in range(2):
        manager.allocate(number, [number] * 4)
        manager.free(number)
    manager.check()
    manager.allocate("new", [9])
    manager.check()
    assert manager.blocks("new").tolist() == [2]  # the first block of the text that was used last


# ---- through the pool -----------------------------------------------------------------------------------------------


def cached_pool(num_blocks: int = 4, eviction: str = "lru") -> BlockPool:
    """Return a pool full of cached blocks 0, 1, 2 …, released in this order."""
    pool = BlockPool(num_blocks, eviction=eviction)
    blocks = pool.acquire(num_blocks)
    pool.publish(blocks, [bytes([block]) for block in blocks], np.zeros(num_blocks))
    for block in blocks:
        pool.release(ids(block))
    return pool


@pytest.mark.parametrize("eviction", POLICIES)
def test_a_touched_block_outlives_the_others(eviction):
    pool = cached_pool(3, eviction)
    pool.stats.published[0] = pool.stats.depth[0] = pool.stats.priority[0] = 99
    pool.touch(ids(0))
    assert pool.acquire(2).tolist() == [1, 2]
    pool.check()


@pytest.mark.parametrize("eviction", POLICIES)
def test_a_shared_block_is_not_evicted_and_comes_back_when_released(eviction):
    pool = cached_pool(3, eviction)
    pool.share(ids(0))
    assert pool.num_evictable == 2
    assert pool.acquire(2).tolist() == [1, 2]
    pool.release(ids(0))
    pool.check()
    assert pool.acquire(1).tolist() == [0]
    assert pool.cache.match([bytes([0])]).tolist() == []


def test_eviction_forgets_the_name_before_the_block_is_used_again():
    pool = cached_pool(2)
    evicted: list = []
    pool.on_evict = lambda blocks, digests: evicted.append((blocks.tolist(), digests))
    assert pool.evict(1).tolist() == [0]
    assert evicted == [([0], [bytes([0])])]
    assert pool.cache.match([bytes([0])]).tolist() == []
    assert pool.cache.match([bytes([1])]).tolist() == [1]
    assert (pool.num_free, pool.num_evictable, pool.num_evicted) == (1, 1, 1)


def test_the_end_of_a_text_goes_before_its_beginning():
    pool = BlockPool(3)
    blocks = pool.acquire(3)
    pool.publish(blocks, [b"beginning", b"middle", b"end"], np.arange(3))
    pool.release(blocks)
    assert [pool.evict(1).tolist() for _ in range(4)] == [[2], [1], [0], []]


# ---- Belady ---------------------------------------------------------------------------------------------------------


def test_next_uses_of_a_short_string():
    assert next_uses([5, 6, 5, 5, 7]).tolist() == [2, BELADY_NEVER, 3, BELADY_NEVER, BELADY_NEVER]


def test_belady_on_the_textbook_string():
    """Belady's string 1 2 3 4 1 2 5 1 2 3 4 5 with three frames: 7 faults."""
    assert np.count_nonzero(~belady_hits([1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5], 3)) == 7


def best_hits(accesses: tuple[int, ...], capacity: int) -> int:
    """Return the most hits that any choice of victims reaches, by trying all of them."""
    best = {frozenset(): 0}
    for item in accesses:
        after: dict[frozenset, int] = {}
        for stored, hits in best.items():
            hits += item in stored
            held = stored | {item}
            choices = [held] if len(held) <= capacity else [held - {loser} for loser in held]
            for choice in choices:
                after[choice] = max(after.get(choice, 0), hits)
        best = after
    return max(best.values())


@given(st.lists(st.integers(0, 4), max_size=12).map(tuple), st.integers(0, 4))
def test_belady_is_the_best_of_all_choices(accesses, capacity):
    assert np.count_nonzero(belady_hits(accesses, capacity)) == best_hits(accesses, capacity)
