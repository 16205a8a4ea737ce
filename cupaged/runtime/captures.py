"""What a captured CUDA graph needs of the host: memory that stays as long as it, and nothing that no replay can do.

A graph replays launches with the addresses that they were captured with, and keeps no array alive. So what a call
allocates for itself within a capture is given to the graph as a user object of the driver: the driver says when the
graph, and all that was instantiated from it, is gone. It says so by releasing a lock, which any thread of it can do at
any time, without Python; the arrays are freed when a call of the toolkit next looks.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from cupaged.errors import UnsupportedError

__all__ = ["captured", "is_capturing", "keep_for_graph", "kept_for_graphs", "refuse_in_capture", "release_dropped"]

LEGACY_STREAMS = (0, 1)  # which no graph captures, and which must not be asked while one is captured
ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
NO_DESTRUCTOR_SYNC, MOVE = 1, 1  # flags of CUuserObject, and of who owns a reference to one


def is_capturing(stream: Any) -> bool:
    """Whether a graph is being captured from a CuPy stream."""
    return stream.ptr not in LEGACY_STREAMS and bool(stream.is_capturing())


def refuse_in_capture(backend: str, what: str) -> None:
    """Raise UnsupportedError, with the sentence `what`, if CuPy's current stream is being captured."""
    if backend == "cuda" and is_capturing(_cuda().get_current_stream()):
        raise UnsupportedError(f"{what}, while a CUDA graph is captured")


@contextmanager
def captured(stream: Any) -> Iterator[list[Any]]:
    """Note what is allocated by CuPy within, on a stream that is being captured; yield the list of it.

    Within, memory may be allocated and kernels may be loaded in every mode of capture, as neither is part of the graph.
    """
    cuda = _cuda()
    allocate, allocated = cuda.get_allocator(), []

    def noted(size: int) -> Any:
        memory = allocate(size)
        allocated.append(memory)
        return memory

    before = _exchange_mode(RELAXED)
    try:
        with cuda.using_allocator(noted):
            yield allocated
    finally:
        _exchange_mode(before)


def keep_for_graph(stream: Any, things: Any) -> None:
    """Keep `things` alive for as long as the graph that is being captured from a stream, and what is made from it."""
    release_dropped()
    capture, graph = _capture_of(stream)
    if capture not in _kept:
        lock = _Lock()
        _let_graph_release(graph, lock)
        _kept[capture] = lock, []
    _kept[capture][1].append(things)


def kept_for_graphs() -> int:
    """Return for how many captured graphs something is kept now."""
    release_dropped()
    return len(_kept)


def release_dropped() -> None:
    """Free what was kept for graphs that are gone by now."""
    if _kept:
        for capture, (lock, _) in list(_kept.items()):
            if lock.was_released():
                _kept.pop(capture, None)


_kept: dict[int, tuple[_Lock, list[Any]]] = {}  # capture -> what its graph releases, and what is kept until then


class _Lock:
    """A lock of Python's C library, held from the start: releasing it needs no thread that runs Python."""

    def __init__(self) -> None:
        self.address = _allocate_lock()
        self._released = False
        _acquire_lock(self.address, 1)

    def was_released(self) -> bool:
        if not self._released:
            self._released = bool(_acquire_lock(self.address, 0))
        return self._released

    def __del__(self) -> None:
        if self._released:  # else the driver still has its address
            _release_lock(self.address)
            _free_lock(self.address)


_allocate_lock = ctypes.PYFUNCTYPE(ctypes.c_void_p)(("PyThread_allocate_lock", ctypes.pythonapi))
_acquire_lock = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)(
    ("PyThread_acquire_lock", ctypes.pythonapi)
)
_release_lock = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(("PyThread_release_lock", ctypes.pythonapi))
_free_lock = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(("PyThread_free_lock", ctypes.pythonapi))


def _capture_of(stream: Any) -> tuple[int, ctypes.c_void_p]:
    """Return the number of the capture that a stream takes part in, which no other has, and its graph."""
    status, capture, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
    nodes, edges, count = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
    found = ctypes.byref(status), ctypes.byref(capture), ctypes.byref(graph)
    driver = _driver()
    if hasattr(driver, "cuStreamGetCaptureInfo_v3"):  # else, before CUDA 12.3, no edge holds data
        of_edges = ctypes.byref(nodes), ctypes.byref(edges), ctypes.byref(count)
        _check(driver.cuStreamGetCaptureInfo_v3(ctypes.c_void_p(stream.ptr), *found, *of_edges))
    else:
        of_nodes = ctypes.byref(nodes), ctypes.byref(count)
        _check(driver.cuStreamGetCaptureInfo_v2(ctypes.c_void_p(stream.ptr), *found, *of_nodes))
    if status.value != ACTIVE:
        raise RuntimeError("the capture of the current stream has failed: what was captured is invalid")
    return capture.value, graph


def _let_graph_release(graph: ctypes.c_void_p, lock: _Lock) -> None:
    """Let the driver release a lock once a graph, and what was instantiated from it, is gone."""
    driver, made = _driver(), ctypes.c_void_p()
    release = ctypes.cast(_release_lock, ctypes.c_void_p)
    _check(
        driver.cuUserObjectCreate(
            ctypes.byref(made), ctypes.c_void_p(lock.address), release, ctypes.c_uint(1),
            ctypes.c_uint(NO_DESTRUCTOR_SYNC),
        )
    )  # fmt: skip
    status = driver.cuGraphRetainUserObject(graph, made, ctypes.c_uint(1), ctypes.c_uint(MOVE))
    if status:
        driver.cuUserObjectRelease(made, ctypes.c_uint(1))
    _check(status)


def _exchange_mode(mode: int) -> int:
    """Set what this thread may do while something is captured, and return what it might before."""
    value = ctypes.c_int(mode)
    _check(_driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(value)))
    return value.value


@cache
def _driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def _check(status: int) -> None:
    if status:
        from cupy_backends.cuda.api import driver

        driver.check_status(status)


def _cuda() -> Any:
    import cupy

    return cupy.cuda
