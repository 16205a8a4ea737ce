"""The background evictor: where it begins and ends, step by step, and against the manager in threads."""

from __future__ import annotations

import os
import threading
import time
import warnings
from fractions import Fraction

import numpy as np
import pytest

from cupaged.errors import OutOfBlocksError
from cupaged.memory.eviction import LRU
from cupaged.memory.manager import BlockManager
from cupaged.memory.watermark import WatermarkEvictor

STRESS_SECONDS = float(os.environ.get("CUPAGED_STRESS_SECONDS", "4"))


def manager_with(cached: int, used: int = 0, total: int = 100) -> BlockManager:
    """Return a manager with blocks of one token: so many cached, so many used, the rest free."""
    manager = BlockManager(total, block_size=1)
    if used:
        manager.allocate("used", used)
    if cached:
        manager.allocate("cached", np.arange(cached))
        manager.free("cached")
    return manager


def test_nothing_happens_below_the_high_mark():
    manager = manager_with(cached=89)
    assert WatermarkEvictor(manager).step() == 0
    assert manager.gpu.num_free == 11


def test_eviction_begins_at_the_high_mark_and_ends_at_the_low_one():
    manager = manager_with(cached=90)
    evictor = WatermarkEvictor(manager, high=0.9, low=0.8, blocks_per_step=4)
    assert [evictor.step() for _ in range(5)] == [4, 4, 2, 0, 0]
    assert manager.gpu.num_free == 20
    manager.check()


def test_between_the_marks_it_goes_on_if_it_has_begun_and_does_not_begin():
    manager = manager_with(cached=90)
    evictor = WatermarkEvictor(manager, high=0.9, low=0.8, blocks_per_step=5)
    assert evictor.step() == 5  # 85 % now, and under way
    assert evictor.evicting
    assert evictor.step() == 5
    manager.allocate("more", 5)  # 85 % again, but it had ended
    assert evictor.step() == 0


def test_blocks_in_use_are_never_evicted():
    manager = manager_with(cached=5, used=90)
    evictor = WatermarkEvictor(manager, blocks_per_step=64)
    assert evictor.step() == 5
    assert evictor.step() == 0
    assert not evictor.evicting
    assert manager.gpu.num_used == 90
    manager.check()


@pytest.mark.parametrize(
    ("high", "low", "begins", "ends"), [(1.0, 0.0, 100, 0), (0.7, 0.3, 70, 30), (0.29, 0.28, 29, 28)]
)
def test_the_marks_are_exact(high, low, begins, ends):
    for cached in (begins - 1, begins):
        manager = manager_with(cached=cached)
        evictor = WatermarkEvictor(manager, high, low, blocks_per_step=1000)
        assert evictor.step() == (begins - ends if cached == begins else 0)


@pytest.mark.parametrize("marks", [(0.5, 0.5), (0.4, 0.5), (1.1, 0.5), (0.5, -0.1)])
def test_marks_in_the_wrong_order_are_refused(marks):
    with pytest.raises(ValueError, match="low and high must be shares"):
        WatermarkEvictor(manager_with(0), *marks)


@pytest.mark.parametrize(
    ("pause", "error"),
    [(-1, ValueError), (-1e-9, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), (1e300, ValueError),
     (10**400, ValueError), ("x", TypeError), (None, TypeError), (True, TypeError), ([1], TypeError), (1j, TypeError),
     (np.timedelta64(1, "ns"), TypeError)],
)  # fmt: skip
def test_a_pause_that_no_thread_can_make_is_refused(pause, error):
    with pytest.raises(error, match="^pause must "):
        WatermarkEvictor(manager_with(10), pause=pause)


@pytest.mark.parametrize("pause", [0, 1e-4, Fraction(1, 1000), np.float16(0.001), np.int64(0)])
def test_any_number_of_seconds_is_a_pause(pause):
    manager = manager_with(95)
    with WatermarkEvictor(manager, blocks_per_step=4, pause=pause) as evictor:
        wait_until(lambda: manager.gpu.num_free >= evictor.stop_at)
    assert evictor.pause == float(pause) and manager.gpu.num_free == 20


def test_the_thread_wakes_when_the_pool_runs_short():
    manager = manager_with(cached=0)
    with WatermarkEvictor(manager, high=0.9, low=0.5) as evictor:
        with pytest.raises(RuntimeError, match="runs already"):
            evictor.start()
        manager.allocate("cached", np.arange(80))
        manager.free("cached")
        manager.allocate("short", 15)
        deadline = time.monotonic() + 10
        while manager.gpu.num_free < 50 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert manager.gpu.num_free == 50
    evictor.stop()  # again is nothing
    assert manager.gpu.num_used == 15
    manager.check()


class Client(threading.Thread):
    """Admits, extends, forks, swaps and frees sequences of its own, and checks what it is given."""

    def __init__(self, manager: BlockManager, number: int, deadline: float) -> None:
        super().__init__()
        self.manager, self.number, self.deadline = manager, number, deadline
        self.random = np.random.default_rng(number)
        self.mine: list[tuple[int, int]] = []
        self.operations = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while time.monotonic() < self.deadline:
                self.step()
            for seq_id in self.mine:
                self.manager.free(seq_id)
        except BaseException as error:
            self.error = error

    def step(self) -> None:
        manager, random = self.manager, self.random
        self.operations += 1
        choice = random.integers(8)
        try:
            if choice < 3 or not self.mine:
                seq_id = (self.number, self.operations)
                prompt = np.repeat(random.integers(0, 4, 1 + random.integers(6)), 8).astype(np.int32)
                blocks = manager.allocate(seq_id, prompt)
                self.mine.append(seq_id)
                assert len(set(blocks.tolist())) == len(blocks) == -(-len(prompt) // 4)
            elif choice < 5:
                self.write(self.mine[random.integers(len(self.mine))])
            elif choice < 6:
                parent = self.mine[random.integers(len(self.mine))]
                child = (self.number, self.operations)
                manager.fork(parent, child)
                self.mine.append(child)
            elif choice < 7:
                seq_id = self.mine[random.integers(len(self.mine))]
                manager.swap_out(seq_id)
                try:
                    manager.swap_in(seq_id)
                except OutOfBlocksError:
                    manager.free(seq_id)
                    self.mine.remove(seq_id)
            else:
                manager.free(self.mine.pop(random.integers(len(self.mine))))
        except OutOfBlocksError:
            if self.mine:
                manager.free(self.mine.pop(0))

    def write(self, seq_id: tuple[int, int]) -> None:
        """Grow by a token, in a block that nobody else reads and that cannot be found."""
        slots = self.manager.append(seq_id, 1).slots
        with self.manager.lock:
            block = int(slots[0]) // self.manager.block_size
            assert self.manager.gpu.ref_count[block] == 1, "a block was given to write that others read"
            assert not self.manager.gpu.cache.named[block], "a block was given to write that can be found"


def test_evictor_and_clients_run_against_each_other_without_losing_a_block():
    """Two clients, the evictor's thread and an auditor. CUPAGED_STRESS_SECONDS=300 makes it minutes."""
    manager = BlockManager(64, 32, block_size=4, on_evict="offload")
    deadline = time.monotonic() + STRESS_SECONDS
    clients = [Client(manager, number, deadline) for number in range(2)]
    audits = 0
    with WatermarkEvictor(manager, high=0.8, low=0.5, blocks_per_step=3) as evictor:
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            manager.check()
            manager.take_transfers()
            audits += 1
            time.sleep(0.002)
        assert evictor._thread is not None
        assert evictor._thread.is_alive()
    for client in clients:
        client.join()
        if client.error is not None:
            raise client.error
    manager.check()
    manager.take_transfers()  # what the last ones read is reserved until then
    assert manager.gpu.num_used == manager.cpu.num_used == 0
    assert manager.gpu.num_free + manager.gpu.num_evictable == 64
    assert manager.gpu.num_evicted > 100
    assert audits > 10
    assert min(client.operations for client in clients) > 100


# ---- a step that fails ----------------------------------------------------------------------------------------------


class FailsOnce(LRU):
    """A policy of one's own with a fault that shows once."""

    def __init__(self, stats):
        super().__init__(stats)
        self.failed = False

    def pop(self, n):
        if not self.failed:
            self.failed = True
            raise RuntimeError("once")
        return super().pop(n)


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(1e-3)


def free_after_use(manager: BlockManager) -> int:
    """Return the free blocks; taking one wakes the evictor if they are few, as it would in a server."""
    manager.allocate("use", 1)
    manager.free("use")
    return manager.gpu.num_free


def test_an_error_in_the_thread_is_told_at_once_and_raised_at_the_end():
    manager = BlockManager(10, 0, 4, eviction=FailsOnce)
    evictor = WatermarkEvictor(manager, 0.5, 0.2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        evictor.start()
        assert evictor.running
        manager.allocate("a", np.arange(32))
        manager.free("a")
        wait_until(lambda: not evictor.running)
    assert [str(each.message) for each in told] == [
        "the background evictor has ended, as a step raised RuntimeError('once'); who needs blocks evicts them now"
    ]
    with pytest.raises(RuntimeError, match="the background evictor had ended early") as caught:
        evictor.stop()
    assert str(caught.value.__cause__) == "once"
    manager.allocate("b", 40)  # nothing is lost
    manager.check()
    manager.free("b")
    with evictor:  # and it can begin again
        manager.allocate("c", np.arange(32))
        manager.free("c")
        wait_until(lambda: free_after_use(manager) == 8)
    assert evictor.error is None and not evictor.running


@pytest.mark.filterwarnings("ignore:the background evictor has ended")
def test_an_error_of_the_thread_does_not_hide_that_of_the_block():
    manager = BlockManager(10, 0, 4, eviction=FailsOnce)
    with pytest.raises(KeyError, match="mine") as caught, WatermarkEvictor(manager, 0.5, 0.2) as evictor:
        manager.allocate("a", np.arange(32))
        manager.free("a")
        wait_until(lambda: not evictor.running)
        raise KeyError("mine")
    assert caught.value.__notes__ == ["the background evictor had ended early: RuntimeError('once')"]


def test_a_manager_has_one_evictor_that_runs():
    manager = manager_with(cached=0, total=8)
    first, second = WatermarkEvictor(manager, 0.5, 0.2), WatermarkEvictor(manager, 0.9, 0.8)
    with first:
        with pytest.raises(RuntimeError, match="manager must have one evictor that runs at most"):
            second.start()
        second.stop()  # which never ran, and must not end what the first waits for
        manager.allocate("a", np.arange(8))
        manager.free("a")
        wait_until(lambda: free_after_use(manager) >= 6)
    with second:
        assert second.running
