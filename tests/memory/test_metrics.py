"""Metrics: what the numbers say about a pool whose state is known exactly."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from cupaged.memory.manager import BlockManager
from cupaged.memory.metrics import History, PrometheusCollector, external_fragmentation, snapshot


def test_usage_misleads_where_occupancy_tells():
    """Six of nine blocks used, 67 %; but they hold 18 tokens in 48 slots, 37.5 %."""
    manager = BlockManager(9, block_size=8)
    for seq_id in range(6):
        manager.allocate(seq_id, 3)
    now = snapshot(manager)
    assert now["block_usage"] == pytest.approx(2 / 3)
    assert now["token_occupancy"] == pytest.approx(0.375)
    assert (now["tokens_stored"], now["tail_waste_slots"]) == (18, 30)


def test_an_empty_manager_divides_by_nothing():
    now = snapshot(BlockManager(0))
    assert set(now.values()) == {0}


def test_every_number_of_a_known_state():
    manager = BlockManager(16, 8, block_size=4, bytes_per_block=1000)
    manager.allocate("a", range(10))  # 3 blocks, 2 slots empty
    manager.fork("a", "b")  # shares all of them
    manager.append("b")  # copies the last: 11 tokens
    manager.allocate("c", range(12))  # shares the first two
    manager.allocate("gone", range(100, 109))
    manager.free("gone")  # 2 cached, 1 free
    manager.allocate("away", 5)
    manager.swap_out("away")
    now = snapshot(manager)
    assert now == {
        "blocks_total": 16, "blocks_free": 9, "blocks_used": 5, "blocks_shared": 2, "blocks_evictable": 2,
        "blocks_used_peak": 8, "block_usage": 5 / 16,
        "cpu_blocks_total": 8, "cpu_blocks_used": 2, "cpu_blocks_evictable": 0,
        "sequences_running": 3, "sequences_swapped": 1,
        "tokens_stored": 8 + 2 + 3 + 4, "token_occupancy": 17 / 20, "tail_waste_slots": 3,
        "external_fragmentation": 0.0,
        "prompt_tokens": 31, "cached_tokens": 8, "prefix_hit_rate": 8 / 31,
        "copies": 1, "evictions": 0, "preemptions": 0,
        "blocks_swapped_out": 2, "blocks_swapped_in": 0, "swapped_bytes": 2000,
        "blocks_offloaded": 0, "blocks_restored": 0,
    }  # fmt: skip
    assert all(isinstance(value, int | float) for value in now.values())


def test_external_fragmentation_is_what_lies_outside_the_longest_free_run():
    manager = BlockManager(10, block_size=1)
    for seq_id in range(10):
        manager.allocate(seq_id, 1)
    for seq_id in (0, 1, 2, 5, 8, 9):
        manager.free(seq_id)
    assert external_fragmentation(manager.gpu) == pytest.approx(1 - 3 / 6)
    for seq_id in (3, 4, 6, 7):
        manager.free(seq_id)
    assert external_fragmentation(manager.gpu) == 0


def test_history_keeps_one_array_a_name():
    manager = BlockManager(8, block_size=4)
    history = History(manager, ("blocks_used", "token_occupancy"))
    for step in range(3):
        manager.allocate(step, 2)
        history.sample(step / 10)
    assert history.times.tolist() == [0.0, 0.1, 0.2]
    assert history["blocks_used"].tolist() == [1, 2, 3]
    assert history["token_occupancy"].tolist() == [0.5] * 3
    assert len(history) == 3
    assert history.as_rows()[1] == {"time": 0.1, "blocks_used": 2, "token_occupancy": 0.5}
    assert set(History(manager)._values) == set(snapshot(manager))


def test_history_refuses_names_that_no_snapshot_has():
    with pytest.raises(ValueError, match=r"names must be entries of a snapshot.*got blocks_lost"):
        History(BlockManager(1), ("blocks_lost",))


def test_prometheus_reads_every_entry():
    manager = BlockManager(8, block_size=4)
    manager.allocate("a", range(6))
    manager.fork("a", "b")
    manager.append("a")
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(manager))
    assert registry.get_sample_value("cupaged_blocks_used") == 3
    assert registry.get_sample_value("cupaged_token_occupancy") == pytest.approx((4 + 2 + 3) / 12)
    assert registry.get_sample_value("cupaged_copies_total") == 1
    text = generate_latest(registry).decode()
    assert "# TYPE cupaged_copies_total counter" in text
    assert "# TYPE cupaged_blocks_free gauge" in text
    assert sum(not line.startswith("#") for line in text.splitlines()) == len(snapshot(manager))


def test_counters_of_what_eviction_offloads():
    manager = BlockManager(2, 4, block_size=4, on_evict="offload")
    for start in (0, 100, 0):
        manager.allocate("x", np.arange(start, start + 8))
        manager.free("x")
    now = snapshot(manager)
    assert now["evictions"] == 4
    assert now["blocks_offloaded"] == 4
    assert now["blocks_restored"] == 1
    assert now["prefix_hit_rate"] == pytest.approx(4 / 24)
