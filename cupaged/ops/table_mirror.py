"""The block tables where kernels read them: a copy on the device that receives only the rows that changed.

A decode step of 256 sequences maps a new block for some sixteen of them. Uploading the whole table for that would move
megabytes; the mirror packs the changed rows, their index in front, into one page-locked buffer, copies it without
waiting, and scatters it on the device.

The copy is still under way when `update` returns, so the buffer must not be packed again before it has been read. There
are two buffers, used in turn, and an event for each, which is waited for before the buffer is reused: a wait that costs
nothing unless the host is two updates ahead.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cupaged.memory.block_table import UNMAPPED, BlockTables
from cupaged.runtime.captures import refuse_in_capture

__all__ = ["CupyDevice", "MirrorDevice", "TableMirror"]

Host = NDArray[np.int32]


class MirrorDevice(Protocol):
    """What the mirror asks of a device; its work happens in the order in which it is asked for."""

    def full(self, shape: tuple[int, ...], value: int) -> Any:
        """Return a device array, int32, filled with `value`."""

    def pinned(self, size: int) -> Host:
        """Return a host vector, int32, that the device can read while the host goes on."""

    def upload(self, host: Host, device: Any) -> None:
        """Begin to copy a vector to the device, and return at once."""

    def scatter(self, packed: Any, table: Any) -> None:
        """Write rows of `packed` to `table`: the first entry of each is the row, the others are its first columns."""

    def record(self) -> Any:
        """Return an event that happens when everything asked for so far is done."""

    def wait(self, event: Any) -> None:
        """Return when an event has happened."""


class CupyDevice:
    """The GPU through CuPy; work goes to CuPy's current stream, which must be the same at every update."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy

    def full(self, shape: tuple[int, ...], value: int) -> Any:
        """Return a device array, int32, filled with `value`."""
        return self._cupy.full(shape, value, dtype=np.int32)

    def pinned(self, size: int) -> Host:
        """Return a page-locked host vector, int32."""
        memory = self._cupy.cuda.alloc_pinned_memory(max(size, 1) * 4)
        return np.frombuffer(memory, np.int32, size)

    def upload(self, host: Host, device: Any) -> None:
        """Begin to copy a vector to the device, and return at once."""
        refuse_in_capture("cuda", "a TableMirror must be updated by a call, as a replay would read its buffer again")
        device.data.copy_from_host_async(host.ctypes.data, host.nbytes, self._cupy.cuda.get_current_stream())

    def scatter(self, packed: Any, table: Any) -> None:
        """Write packed rows to `table`."""
        table[packed[:, 0], : packed.shape[1] - 1] = packed[:, 1:]

    def record(self) -> Any:
        """Return an event that happens when everything asked for so far is done."""
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(self._cupy.cuda.get_current_stream())
        return event

    def wait(self, event: Any) -> None:
        """Return when an event has happened."""
        event.synchronize()


class TableMirror:
    """A device copy of ``tables.ids``, kept up to date row by row.

    Parameters
    ----------
    tables : BlockTables
        The tables to mirror; a mirror clears their `changed` marks, so one table has one mirror. If other threads
        change them, hold the manager's lock during `update`.
    device : MirrorDevice, optional
        Where to keep the copy (default: the GPU, through CuPy).

    Attributes
    ----------
    ids : device array, int32 [max_seqs, max_blocks]
        The copy, as of the last update; a larger array takes its place when the tables grow.
    """

    def __init__(self, tables: BlockTables, device: MirrorDevice | None = None) -> None:
        self.tables = tables
        self.device = CupyDevice() if device is None else device
        self._staging: list[_Staging] = [_Staging(), _Staging()]
        self._start_over()

    def update(self) -> Any:
        """Bring the copy up to date, without waiting for the device, and return it."""
        if self.ids.shape != self.tables.ids.shape:
            self._start_over()
        rows = np.flatnonzero(self.tables.changed)
        if len(rows):
            self._upload(rows)
            self.tables.changed[rows] = False
        return self.ids

    def _start_over(self) -> None:
        """Make an unmapped copy of the tables' shape, and have every row that holds something uploaded."""
        self.ids = self.device.full(self.tables.ids.shape, UNMAPPED)
        self._held = np.zeros(self.tables.max_seqs, np.int64)  # blocks of each row in the copy
        self.tables.changed[:] = self.tables.num_blocks > 0

    def _upload(self, rows: NDArray[np.intp]) -> None:
        num_blocks = self.tables.num_blocks[rows]
        width = int(np.maximum(num_blocks, self._held[rows]).max())  # enough to unmap what a row no longer holds
        self._held[rows] = num_blocks

        staging = self._staging[0]
        self._staging.reverse()
        host, on_device = staging.of_size(self.device, len(rows) * (1 + width))
        packed = host.reshape(len(rows), 1 + width)
        packed[:, 0] = rows
        packed[:, 1:] = self.tables.ids[rows, :width]
        self.device.upload(host, on_device)
        self.device.scatter(on_device.reshape(packed.shape), self.ids)
        staging.busy_until = self.device.record()


class _Staging:
    """A page-locked buffer, its device twin, and the event after which both may be written again."""

    def __init__(self) -> None:
        self.host: Host = np.empty(0, np.int32)
        self.on_device: Any = None
        self.busy_until: Any = None

    def of_size(self, device: MirrorDevice, size: int) -> tuple[Host, Any]:
        """Wait until the buffer has been read, and return as much of it as is needed."""
        if self.busy_until is not None:
            device.wait(self.busy_until)
        if len(self.host) < size:
            capacity = 1 << (size - 1).bit_length()
            self.host = device.pinned(capacity)
            self.on_device = device.full((capacity,), 0)
        return self.host[:size], self.on_device[:size]
