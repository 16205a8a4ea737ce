"""Launches by cuLaunchKernelEx, a function of the CUDA driver that CuPy does not call.

It takes attributes, of which a kernel that starts while the one before it ends needs one; and a launch that is made
again has its arguments lying ready, where CuPy looks at the type of each every time.
"""

from __future__ import annotations

import copy
import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

__all__ = ["DriverLaunch", "can_overlap_launches"]

MAY_START_EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT, in a thread that has not used the GPU
HOPPER = 90
DRIVER_OF_GRAPHS = 12030  # the first that captures such launches in a graph
WORD = 8  # bytes that an argument takes here; none is longer


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", ctypes.c_uint32 * 16))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint32),
    )


_starts_early = _Attribute(id=MAY_START_EARLY, value=(1,))


class DriverLaunch:
    """One launch, made over and over on CuPy's current stream.

    Parameters
    ----------
    kernel : cupy.RawKernel
        Loaded, with the attributes that the launch needs.
    grid, block : tuple of int
        Three sizes each.
    shared_bytes : int
        Dynamic shared memory of a block.
    values : sequence
        What the kernel gets: CuPy arrays, which are not held, and NumPy scalars of the parameters' own types.
    overlaps : bool
        Whether the kernel waits by itself for the one before it (kernels_cu/include/launch_overlap.cuh).
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        shared_bytes: int,
        values: Sequence[Any],
        overlaps: bool = False,
    ) -> None:
        self._kernel, self._function = kernel, _launch_function()
        self._words = (ctypes.c_uint64 * len(values))(*map(_as_word, values))
        self._config = _Config(grid, block, shared_bytes, None, ctypes.addressof(_starts_early), int(overlaps))
        self._lie_ready()

    def _lie_ready(self) -> None:
        """Note where the driver finds what this launch has for itself."""
        import cupy

        first = ctypes.addressof(self._words)
        addresses = range(first, first + WORD * len(self._words), WORD)
        self._arguments = (ctypes.c_void_p * len(addresses))(*addresses)
        self._passed = (
            ctypes.addressof(self._config), self._kernel.kernel.ptr, ctypes.addressof(self._arguments), None
        )  # fmt: skip
        self._current_stream = cupy.cuda.get_current_stream
        self._lock = threading.Lock()  # on the words and the stream: threads may share a launch

    def __call__(self) -> None:
        """Launch with the values that it was made with."""
        with self._lock:
            self._launch()

    def open_for(self, places: Sequence[int]) -> Callable[[Sequence[Any]], None]:
        """Return what launches with other arrays in these places, in their order."""
        other = copy.copy(self)
        other._words = type(self._words).from_buffer_copy(self._words)
        other._config = _Config.from_buffer_copy(self._config)
        other._lie_ready()

        def launch(arrays: Sequence[Any]) -> None:
            with other._lock:
                for place, array in zip(places, arrays, strict=True):
                    other._words[place] = array.data.ptr
                other._launch()

        return launch

    def by_cupy(self, values: Sequence[Any]) -> None:
        """Launch as CuPy does, to compare with."""
        grid, block = tuple(self._config.grid), tuple(self._config.block)
        self._kernel(grid, block, tuple(values), shared_mem=self._config.shared_bytes)

    def _launch(self) -> None:
        """Launch; whoever calls this has the lock."""
        self._config.stream = self._current_stream().ptr
        status = self._function(*self._passed)
        if status:
            self._launch_again_or_raise(status)

    def _launch_again_or_raise(self, status: int) -> None:
        """Launch again where only the thread's context was missing, which CuPy's runtime makes; else raise."""
        import cupy
        from cupy_backends.cuda.api import driver

        if status == INVALID_CONTEXT:
            cupy.cuda.runtime.free(0)
            status = self._function(*self._passed)
        driver.check_status(status)


def _as_word(value: Any) -> int:
    """Return the bytes of an argument as an integer: an address, or a number's own bytes and zeros."""
    if isinstance(value, np.generic):
        return int.from_bytes(value.tobytes(), "little")
    return int(value.data.ptr)


@cache
def _launch_function() -> Any:
    function = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuLaunchKernelEx
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    function.restype = ctypes.c_int
    return function


@cache
def can_overlap_launches(backend: str, device: int) -> bool:
    """Return whether kernels can start on the device while those before them end, also in a graph.

    The host runs one after the other, but the same code.
    """
    if backend == "host":
        return True
    import cupy

    capability = int(cupy.cuda.Device(device).compute_capability)
    return capability >= HOPPER and cupy.cuda.runtime.driverGetVersion() >= DRIVER_OF_GRAPHS
