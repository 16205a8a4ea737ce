"""The device mirror of block tables: right after every update, few bytes, and no buffer overwritten in flight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupaged.memory.block_table import BlockTables
from cupaged.memory.manager import BlockManager
from cupaged.ops.table_mirror import TableMirror


class LazyDevice:
    """A device that is as slow as it may be: work is done only when somebody waits for it."""

    def __init__(self) -> None:
        self.pending: list = []
        self.done = 0
        self.asked = 0
        self.entries_uploaded = 0
        self.waits = 0

    def full(self, shape, value):
        return np.full(shape, value, np.int32)

    def pinned(self, size):
        return np.full(size, -99, np.int32)

    def upload(self, host, device):
        self.entries_uploaded += len(host)
        self._later(lambda: device.__setitem__(slice(None), host))  # reads the buffer as it is then

    def scatter(self, packed, table):
        self._later(lambda: table.__setitem__((packed[:, 0], slice(0, packed.shape[1] - 1)), packed[:, 1:]))

    def record(self):
        return self.asked

    def wait(self, event):
        self.waits += 1
        while self.done < event:
            self.pending.pop(0)()
            self.done += 1

    def _later(self, work):
        self.pending.append(work)
        self.asked += 1


def synced(mirror: TableMirror) -> np.ndarray:
    mirror.device.wait(mirror.device.asked)
    return mirror.ids


def test_the_copy_follows_the_tables():
    manager = BlockManager(64, block_size=4, max_seqs=4, max_blocks_per_seq=8)
    mirror = TableMirror(manager.tables, LazyDevice())
    manager.allocate("a", 10)
    mirror.update()
    assert np.array_equal(synced(mirror), manager.tables.ids)
    manager.append("a", 3)
    manager.allocate("b", 30)
    manager.free("a")
    mirror.update()
    assert np.array_equal(synced(mirror), manager.tables.ids)


def test_only_changed_rows_and_used_columns_are_uploaded():
    manager = BlockManager(10_000, block_size=4, max_seqs=256, max_blocks_per_seq=4096)
    for seq_id in range(256):
        manager.allocate(seq_id, 40)
    mirror = TableMirror(manager.tables, LazyDevice())
    mirror.update()
    uploaded = mirror.device.entries_uploaded
    assert uploaded == 256 * 11
    manager.append(7)
    manager.append(100)
    mirror.update()
    assert mirror.device.entries_uploaded - uploaded == 2 * 12
    manager.append(7)  # no new block: nothing to tell
    mirror.update()
    assert mirror.device.entries_uploaded - uploaded == 2 * 12


def test_a_freed_row_is_unmapped_over_its_whole_old_width():
    manager = BlockManager(64, block_size=1, max_seqs=2, max_blocks_per_seq=32)
    mirror = TableMirror(manager.tables, LazyDevice())
    manager.allocate("long", 20)
    mirror.update()
    manager.free("long")
    manager.allocate("short", 2)
    mirror.update()
    assert (synced(mirror) >= 0).sum() == 2
    assert np.array_equal(mirror.ids, manager.tables.ids)


def test_no_buffer_is_packed_again_while_its_copy_is_in_flight():
    """TensorRT-LLM 15546: a pinned block-table buffer was reused while the copy out of it was under way."""
    manager = BlockManager(64, block_size=1, max_seqs=2, max_blocks_per_seq=8)
    mirror = TableMirror(manager.tables, LazyDevice())
    manager.allocate("a", 1)
    for step in range(6):
        manager.append("a", 1)
        mirror.update()
        in_flight = mirror.device.asked - mirror.device.done
        assert in_flight <= 4, "at most two updates of two pieces of work each"
        assert mirror.device.waits == max(0, step - 1)
    assert np.array_equal(synced(mirror), manager.tables.ids)


def test_without_the_wait_the_lazy_device_shows_the_bug():
    """The test above can fail: a device that never waits uploads the second text of the buffer twice."""
    device = LazyDevice()
    manager = BlockManager(64, block_size=1, max_seqs=4, max_blocks_per_seq=8)
    mirror = TableMirror(manager.tables, device)
    truly_wait, device.wait = device.wait, lambda event: None
    for seq_id in range(3):  # three updates of equal size: the third overwrites the first's buffer
        manager.allocate(seq_id, 1)
        mirror.update()
    truly_wait(device.asked)
    assert not np.array_equal(mirror.ids, manager.tables.ids)


def test_a_grown_table_is_mirrored_whole():
    manager = BlockManager(200, block_size=1, max_seqs=1, max_blocks_per_seq=1)
    mirror = TableMirror(manager.tables, LazyDevice())
    for seq_id in range(5):
        manager.allocate(seq_id, 1 + 7 * seq_id)
        assert mirror.update().shape == manager.tables.ids.shape
        assert np.array_equal(synced(mirror), manager.tables.ids)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(1, 9)), max_size=40))
def test_the_copy_follows_any_program(program):
    manager = BlockManager(400, 400, block_size=2, max_seqs=1, max_blocks_per_seq=1)
    mirror = TableMirror(manager.tables, LazyDevice())
    for kind, seq_id, n in program:
        if seq_id not in manager:
            manager.allocate(seq_id, n)
        elif kind == 0:
            manager.free(seq_id)
        elif kind == 1 and (seq_id, "twin") not in manager and not manager.is_swapped(seq_id):
            manager.fork(seq_id, (seq_id, "twin"))
        elif kind == 2:
            manager.swap_in(seq_id) if manager.is_swapped(seq_id) else manager.swap_out(seq_id)
        elif not manager.is_swapped(seq_id):
            manager.append(seq_id, n)
        if n % 2:
            mirror.update()
    mirror.update()
    assert np.array_equal(synced(mirror), manager.tables.ids)


@pytest.mark.gpu
def test_the_copy_on_a_gpu():
    cupy = pytest.importorskip("cupy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    manager = BlockManager(4096, block_size=4, max_seqs=64, max_blocks_per_seq=64)
    for seq_id in range(64):
        manager.allocate(seq_id, 1 + 3 * seq_id)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        mirror = TableMirror(manager.tables)
        for _ in range(50):
            manager.append_batch(range(64))
            mirror.update()
        stream.synchronize()
        assert np.array_equal(cupy.asnumpy(mirror.ids), manager.tables.ids)


def test_a_table_that_nobody_uses_uploads_nothing():
    mirror = TableMirror(BlockTables(4), LazyDevice())
    assert (mirror.update() == -1).all()
    assert mirror.device.asked == 0
