"""Blocks that move between a cache and the host's memory, beside the work that goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from cupaged.config import CacheConfig
from cupaged.errors import BackendUnavailableError
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import array_module
from cupaged.ops.blocks import block_elements, gather_blocks, scatter_blocks
from cupaged.ops.checks import check_at_least_one, check_cache
from cupaged.runtime.select import why_no_gpu

__all__ = ["HostBlocks", "SwapEngine", "swap_blocks"]

STAGING_BYTES = 8 * 2**20  # of each of two buffers: long enough to hide the start of a copy, short enough to overlap


class HostBlocks:
    """Room for swapped-out blocks in the host's memory.

    Parameters
    ----------
    config : CacheConfig
        Of the cache whose blocks they are; its `num_blocks` is the cache's own.
    num_blocks : int
        How many blocks there is room for.
    pinned : bool, optional
        Whether the memory is page-locked, so that copies run on their own; where there is a GPU, it is by default.

    Attributes
    ----------
    blocks : ndarray, [num_blocks, elements]
        A block's keys, then its values, as they lie in the cache's layout.
    """

    def __init__(self, config: CacheConfig, num_blocks: int, pinned: bool | None = None) -> None:
        check_at_least_one(num_blocks, "num_blocks")
        reason = why_no_gpu()
        if pinned and reason:
            raise BackendUnavailableError(f"pinned memory needs a GPU: {reason}")
        self.config, self.num_blocks = config, num_blocks
        elements = 2 * config.block_size * config.num_kv_heads * config.head_dim
        nbytes = num_blocks * elements * config.numpy_dtype.itemsize
        self.pinned = reason is None if pinned is None else pinned
        memory: Any
        if self.pinned:
            import cupy

            memory = np.frombuffer(cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)
        else:
            memory = np.zeros(nbytes, np.uint8)
        self.blocks: np.ndarray = memory.view(config.numpy_dtype).reshape(num_blocks, elements)
        self.moved: Any = None  # an event: when all that was started is done

    def __del__(self) -> None:
        if getattr(self, "moved", None) is not None:
            with suppress(Exception):  # the driver may be gone before us
                self.moved.synchronize()  # CuPy gives pinned memory to others at once


class SwapEngine:
    """Moves blocks of the layers' caches to the host and back, on streams of its own.

    A swap waits for the work that is on the current stream when it is asked for; the work that follows waits for the
    swap only after `wait`. Two buffers take turns: while one is gathered or scattered on the device, the other is on
    the link. Swaps take place in the order in which they were asked for.

    Parameters
    ----------
    caches : sequence of KVCache
        One a layer, alike in all but content.
    num_host_blocks : int
        The size of the CPU pool.
    pinned : bool, optional
        See `HostBlocks`.

    Attributes
    ----------
    host : tuple of HostBlocks
        One a layer.

    Raises
    ------
    TypeError, ValueError
        If there is no cache, or they are not alike.
    """

    def __init__(self, caches: Sequence[KVCache], num_host_blocks: int, pinned: bool | None = None) -> None:
        self.caches = tuple(caches)
        if not self.caches:
            raise ValueError("caches must hold one cache at least; got none")
        for cache in self.caches:
            check_cache(cache)
            if cache.config != self.caches[0].config or cache.backend != self.caches[0].backend:
                raise ValueError(f"caches must be alike; got {self.caches[0]} and {cache}")
        if pinned is None:
            pinned = self.caches[0].backend == "cuda"
        self.host = tuple(HostBlocks(cache.config, num_host_blocks, pinned) for cache in self.caches)
        self._mover = _Mover(self.caches[0])

    def swap_out(self, pairs: Any) -> None:
        """Move blocks to the host: (GPU block, CPU block) pairs, as `BlockManager.swap_out` returns them."""
        for cache, host in zip(self.caches, self.host, strict=True):
            self._mover.move(cache, host, pairs, out=True)

    def swap_in(self, pairs: Any) -> None:
        """Move blocks back: (CPU block, GPU block) pairs, as `BlockManager.swap_in` returns them."""
        for cache, host in zip(self.caches, self.host, strict=True):
            self._mover.move(cache, host, pairs, out=False)

    def carry_out(self, transfers: Iterable[tuple[str, Any]]) -> None:
        """Make the transfers, (direction, pairs), that `BlockManager.take_transfers` returns, in their order."""
        for direction, pairs in transfers:
            if direction == "offload":
                self.swap_out(pairs)
            else:
                self.swap_in(pairs)

    def wait(self) -> None:
        """Let what follows on the current stream wait for all swaps so far; the host does not wait."""
        self._mover.wait()

    def synchronise(self) -> None:
        """Wait until all swaps so far are done."""
        self._mover.synchronise()


def swap_blocks(src: KVCache | HostBlocks, dst: KVCache | HostBlocks, pairs: Any) -> None:
    """Move blocks between a cache and the host's memory; what follows on the current stream waits for it.

    Parameters
    ----------
    src, dst : KVCache and HostBlocks, or the other way round
        Of the same config.
    pairs : int [num_pairs, 2], on the host
        (source, destination) blocks. No destination may come twice.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; nothing was moved.
    """
    out = isinstance(src, KVCache)
    cache, host = (src, dst) if out else (dst, src)
    if not isinstance(cache, KVCache) or not isinstance(host, HostBlocks):
        raise TypeError(
            f"src and dst must be a KVCache and a HostBlocks; got {type(src).__name__} and {type(dst).__name__}"
        )
    if cache.config != host.config:
        raise ValueError(f"src and dst must be of the same config; got {cache.config} and {host.config}")
    if cache.mover is None:
        cache.mover = _Mover(cache)  # kept: its buffers must outlive the copies
    cache.mover.move(cache, host, pairs, out)
    cache.mover.wait()


class _Mover:
    """Two buffers on the device that take turns, and the streams that fill and empty them."""

    def __init__(self, cache: KVCache) -> None:
        config, elements = cache.config, block_elements(cache)
        self.at_once = max(1, STAGING_BYTES // (elements * config.numpy_dtype.itemsize))
        self.buffers = [cache.xp.empty((self.at_once, elements), config.numpy_dtype) for _ in range(2)]
        self.turn = 0
        self.on_gpu = cache.backend == "cuda"
        if self.on_gpu:
            cupy = array_module("cuda")
            self.device_stream, self.link_stream = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
            self.free = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]  # when a buffer may be filled again
            self.full = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]

    def move(self, cache: KVCache, host: HostBlocks, pairs: Any, out: bool) -> None:
        """Start to move (source, destination) blocks, out to the host or in from it."""
        on_device, on_host = self._checked(cache, host, pairs, out)
        if self.on_gpu:
            now = array_module("cuda").cuda.get_current_stream().record()
            self.device_stream.wait_event(now)
            self.link_stream.wait_event(now)
        for first in range(0, len(on_host), self.at_once):
            chunk = slice(first, first + self.at_once)
            self._move_chunk(cache, host, on_device[chunk], on_host[chunk], out)
        if self.on_gpu:
            host.moved = self.link_stream.record()

    def __del__(self) -> None:
        with suppress(Exception):  # the driver may be gone before us
            self.synchronise()  # others may get the buffers then

    def wait(self) -> None:
        """Let the current stream wait for what was started."""
        if self.on_gpu:
            stream = array_module("cuda").cuda.get_current_stream()
            stream.wait_event(self.device_stream.record())
            stream.wait_event(self.link_stream.record())

    def synchronise(self) -> None:
        """Wait for what was started."""
        if self.on_gpu:
            self.device_stream.synchronize()
            self.link_stream.synchronize()

    def _checked(self, cache: KVCache, host: HostBlocks, pairs: Any, out: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return blocks of the cache and of the host, in the order of the latter: neighbours share a copy."""
        array = np.asarray(pairs)
        if array.size == 0:
            array = np.empty((0, 2), np.int32)
        if array.dtype.kind not in "iu":
            raise TypeError(f"pairs must be integers; got dtype {array.dtype}")
        if array.ndim != 2 or array.shape[1] != 2:
            raise ValueError(f"pairs must have shape [num_pairs, 2]; got {list(array.shape)}")
        on_device, on_host = array.T if out else array.T[::-1]
        for ids, what, limit in ((on_device, "cache", cache.config.num_blocks), (on_host, "host", host.num_blocks)):
            wrong = (ids < 0) | (ids >= limit)
            if wrong.any():
                raise ValueError(
                    f"pairs must name blocks of the {what} from 0 to below {limit}; got {ids[np.argmax(wrong)]}"
                )
        written, counts = np.unique(array[:, 1], return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"pairs must write a block once; block {written[np.argmax(counts > 1)]} is written twice")
        order = np.argsort(on_host, kind="stable")
        return on_device[order].astype(np.int32), on_host[order]

    def _move_chunk(
        self, cache: KVCache, host: HostBlocks, on_device: np.ndarray, on_host: np.ndarray, out: bool
    ) -> None:
        buffer = self.buffers[self.turn][: len(on_host)]
        if not self.on_gpu:
            if out:
                host.blocks[on_host] = gather_blocks(cache, on_device, buffer)
            else:
                buffer[...] = host.blocks[on_host]
                scatter_blocks(cache, on_device, buffer)
            return
        free, full = self.free[self.turn], self.full[self.turn]
        self.turn ^= 1
        first, second = (self.device_stream, self.link_stream) if out else (self.link_stream, self.device_stream)
        with first:
            first.wait_event(free)
            if out:
                gather_blocks(cache, on_device, buffer)
            else:
                self._copy(buffer, host, on_host, out, first)
            full.record(first)
        with second:
            second.wait_event(full)
            if out:
                self._copy(buffer, host, on_host, out, second)
            else:
                scatter_blocks(cache, on_device, buffer)
            free.record(second)

    def _copy(self, buffer: Any, host: HostBlocks, on_host: np.ndarray, out: bool, stream: Any) -> None:
        """Copy a buffer to the host's blocks or from them, a run of neighbours at a time."""
        runtime = array_module("cuda").cuda.runtime
        size = host.blocks.strides[0]
        kind = runtime.memcpyDeviceToHost if out else runtime.memcpyHostToDevice
        for first, count in _runs(on_host):
            near = buffer.data.ptr + first * size
            far = host.blocks.ctypes.data + int(on_host[first]) * size
            runtime.memcpyAsync(*((far, near) if out else (near, far)), count * size, kind, stream.ptr)


def _runs(ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """Return where each run of neighbouring ids begins, and how long it is."""
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)
    for first, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        yield int(first), int(end - first)
