"""The cuda backend up to the launch, where CuPy is installed and no GPU is: arrays at made-up addresses."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from cupaged.attention import kernel
from cupaged.attention.kernels import persistent, prefill
from cupaged.runtime import cuda, driver, launch, select

H100 = {
    "MultiProcessorCount": 132,
    "L2CacheSize": 52428800,
    "MaxSharedMemoryPerBlockOptin": 232448,
    "MaxSharedMemoryPerMultiprocessor": 233472,
}


class Launched(NamedTuple):
    """What the driver was told: arguments as the bytes that the kernel would read, in words of 8."""

    grid: tuple
    block: tuple
    shared_bytes: int
    overlaps: bool
    words: tuple


class StubKernel:
    """Stands for a ``cupy.RawKernel``; keeps what it is launched with."""

    num_regs, shared_size_bytes, max_dynamic_shared_size_bytes = 128, 0, 0
    kernel = SimpleNamespace(ptr=1 << 20)

    def __init__(self, launches):
        self._launches = launches

    def __call__(self, grid, block, values, shared_mem=0):
        self._launches.append(Launched(grid, block, shared_mem, False, tuple(map(driver._as_word, values))))


class CudaStub:
    """CuPy arrays that nothing reads, and kernels that only say what they were launched with."""

    def __init__(self, monkeypatch):
        import cupy

        self.device, self.launches = 0, []
        self.kernel = StubKernel(self.launches)
        self._cupy, self._addresses = cupy, itertools.count(1 << 30, 1 << 30)
        for name in ("zeros", "empty"):
            monkeypatch.setattr(cupy, name, self.array)
        monkeypatch.setattr(cupy, "empty_like", lambda array: self.array(array.shape, array.dtype))
        monkeypatch.setattr(cupy, "full", lambda count, _, dtype: self.array((count,), dtype))
        monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: self.device)
        monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda *_: cupy.cuda.Stream.null)
        monkeypatch.setattr(
            cupy.cuda, "Device", lambda *_: SimpleNamespace(id=self.device, attributes=H100, compute_capability="90")
        )
        monkeypatch.setattr(select, "why_no_gpu", lambda: None)
        monkeypatch.setattr(select, "_loaded", {})  # no kernel of a stub's stays for those who have a GPU
        monkeypatch.setattr(launch, "_remembered", {})
        monkeypatch.setattr(kernel, "compute_capability", lambda device: 90)
        monkeypatch.setattr(cuda.CudaKernel, "raw_kernel", lambda kernel: self.kernel)
        monkeypatch.setattr(driver, "_launch_function", lambda: None)
        monkeypatch.setattr(driver.DriverLaunch, "_launch", lambda launch: self._launched(launch))
        monkeypatch.setattr(persistent, "can_overlap_launches", lambda backend, device: True)
        monkeypatch.setattr(prefill, "can_overlap_launches", lambda backend, device: True)

    def _launched(self, launch):
        told = launch._config
        made = tuple(told.grid), tuple(told.block), told.shared_bytes, bool(told.num_attributes), tuple(launch._words)
        self.launches.append(Launched(*made))

    def array(self, shape, dtype=np.float32, address=None):
        """Return an array that lies nowhere on the current device."""
        start = next(self._addresses) if address is None else address
        memory = self._cupy.cuda.UnownedMemory(start, 1 << 30, None, self.device)
        return self._cupy.ndarray(shape, dtype, memptr=self._cupy.cuda.MemoryPointer(memory, 0))
