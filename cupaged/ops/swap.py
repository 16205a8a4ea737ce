"""Blocks that move between a cache and the host's memory, beside the work that goes on."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from cupaged.config import CacheConfig
from cupaged.errors import BackendUnavailableError, written
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import array_module
from cupaged.ops.blocks import as_words, block_elements, halves, prepare_move
from cupaged.ops.checks import check_at_least_one, check_cache, checked_flag, checked_integer
from cupaged.ops.overlap import check_apart
from cupaged.ops.textures import refresh_blocks
from cupaged.runtime.captures import refuse_in_capture
from cupaged.runtime.launch import CheckedCall
from cupaged.runtime.select import why_no_gpu

__all__ = ["HostBlocks", "SwapEngine", "swap_blocks"]

# Of each of two buffers: a copy takes some 25 us of Python and, on an H100, 300 us of the link. The last scatter does
# not overlap with the link on the way in, nor the first gather, of a quarter as much, on the way out.
STAGING_BYTES = 16 * 2**20
KEPT_LAUNCHES = 8
UPLOADED_AT_ONCE = 64 * 1024  # bytes that the driver copies to its queue from memory that is not pinned


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
        if not isinstance(config, CacheConfig):
            raise TypeError(f"config must be a CacheConfig; got {type(config).__name__} {written(config)}")
        num_blocks = checked_integer(num_blocks, "num_blocks", 1)
        pinned = None if pinned is None else checked_flag(pinned, "pinned")
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

    A swap waits for the work that is on CuPy's current stream when it is asked for; the work that follows there waits
    for the swap only after `wait`. Calls of the toolkit with torch tensors are in order with CuPy's current stream, and
    so with swaps. A CUDA graph cannot capture a swap. Two buffers of up to 16 MiB take turns: while one is gathered or
    scattered, the other is on the link. Swaps take place in the order in which they were asked for.

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
        If there is no cache, if they are not alike, or if one comes twice.
    """

    def __init__(self, caches: Sequence[KVCache], num_host_blocks: int, pinned: bool | None = None) -> None:
        if not isinstance(caches, Sequence):
            raise TypeError(f"caches must be a sequence of KVCache; got {type(caches).__name__} {written(caches)}")
        self.caches = tuple(caches)
        check_at_least_one(num_host_blocks, "num_host_blocks")
        if not self.caches:
            raise ValueError("caches must hold one cache at least; got none")
        for cache in self.caches:
            check_cache(cache)
            if cache.config != self.caches[0].config or cache.backend != self.caches[0].backend:
                raise ValueError(f"caches must be alike; got {self.caches[0]} and {cache}")
        check_apart({f"caches[{i}]": cache for i, cache in enumerate(self.caches)}, {})
        if pinned is None:
            pinned = self.caches[0].backend == "cuda"
        self.host = tuple(HostBlocks(cache.config, num_host_blocks, pinned) for cache in self.caches)
        self._mover = _Mover(self.caches)

    def swap_out(self, pairs: Any) -> None:
        """Move blocks to the host: (GPU block, CPU block) pairs, as `BlockManager.swap_out` returns them."""
        self._mover.move(self.caches, self.host, pairs, out=True)

    def swap_in(self, pairs: Any) -> None:
        """Move blocks back: (CPU block, GPU block) pairs, as `BlockManager.swap_in` returns them."""
        self._mover.move(self.caches, self.host, pairs, out=False)

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

    Notes
    -----
    The cache keeps two buffers on its device from its first swap on, each of up to 16 MiB and no larger than the cache.
    A `SwapEngine` has one such pair for all layers.
    """
    out = isinstance(src, KVCache)
    cache, host = (src, dst) if out else (dst, src)
    if not isinstance(cache, KVCache) or not isinstance(host, HostBlocks):
        raise TypeError(
            f"src and dst must be a KVCache and a HostBlocks; got {type(src).__name__} and {type(dst).__name__}"
        )
    if cache.config != host.config:
        raise ValueError(f"src and dst must be of the same config; got {cache.config} and {host.config}")
    with _mover_lock:
        if cache.mover is None:
            cache.mover = _Mover((cache,))  # kept: its buffers must outlive the copies
    cache.mover.move((cache,), (host,), pairs, out)
    cache.mover.wait()


_mover_lock = threading.Lock()


class _Mover:
    """Two buffers on the device that take turns, each with a stream on which it is filled and emptied.

    What all layers have in common is worked out once a call; a layer's share of it is a launch, and a copy for each run
    of neighbours, a buffer at a time. Threads may share a mover: it takes their calls one after the other.
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        cache = caches[0]
        _refuse_in_capture(cache)
        config, elements = cache.config, block_elements(cache)
        self.block_bytes = elements * config.numpy_dtype.itemsize
        self.at_once = max(1, min(config.num_blocks, STAGING_BYTES // self.block_bytes))
        self.buffers = [cache.xp.empty((self.at_once, elements), config.numpy_dtype) for _ in range(2)]
        self.words_of_buffers = [as_words(halves(cache, buffer)) for buffer in self.buffers]
        self.words_of_caches = [as_words(each.storage) for each in caches]
        self.launches: dict[tuple[int, bool], CheckedCall] = {}
        self.moved: Any = None  # an event: when all that was started is done
        self.lock = threading.Lock()  # on the buffers, and on what `streams` notes of a move
        self.streams = _Streams() if cache.backend == "cuda" else None
        if self.streams is not None:
            self.streams.wait_for_current()  # which may still use what the buffers' memory held before

    def move(self, caches: Sequence[KVCache], hosts: Sequence[HostBlocks], pairs: Any, out: bool) -> None:
        """Start to move (source, destination) blocks of all layers, out to the host or in from it."""
        on_device, on_host = _checked(caches[0].config, hosts[0].num_blocks, pairs, out)
        if not len(on_host):
            return
        with self.lock:
            self._move(caches, hosts, _Blocks(self, caches[0], on_device, on_host, out), on_device)

    def _move(
        self, caches: Sequence[KVCache], hosts: Sequence[HostBlocks], blocks: _Blocks, on_device: np.ndarray
    ) -> None:
        if self.streams is None:
            self._move_layers(caches, hosts, blocks)
            return
        _refuse_in_capture(caches[0])
        self.streams.wait_for_current()
        self.streams.wait_for(host.moved for host in hosts)  # by this mover or another
        try:
            self._move_layers(caches, hosts, blocks)
        except BaseException:
            self.synchronise()  # a copy may be on its way into a buffer that nobody will say is free
            raise
        finally:
            self.moved = self.streams.join(on_device)
            for host in hosts:
                host.moved = self.moved

    def __del__(self) -> None:
        with suppress(Exception):  # the driver may be gone before us
            self.synchronise()  # others may get the buffers then

    def wait(self) -> None:
        """Let the current stream wait for what was started."""
        if self.streams is not None and self.moved is not None:
            self.streams.let_current_wait(self.moved)

    def synchronise(self) -> None:
        """Wait for what was started."""
        if self.streams is not None:
            self.streams.synchronise()

    def _move_layers(self, caches: Sequence[KVCache], hosts: Sequence[HostBlocks], blocks: _Blocks) -> None:
        out = blocks.out
        turn = 0 if out else 1  # ids go up on the first: it takes them to the first gather, or beside the first copy
        for part in blocks.parts():
            for cache, words, host in zip(caches, self.words_of_caches, hosts, strict=True):
                with self.streams.own[turn] if self.streams is not None else nullcontext():
                    if not out:
                        self._use_link(host, part.runs, turn, out)
                    self._use_device(cache, words, *part.on_device, turn, out)
                    if out:
                        self._use_link(host, part.runs, turn, out)
                turn ^= 1

    def launch(self, cache: KVCache, ids: Any, out: bool) -> CheckedCall:
        """Return the launch that gathers or scatters as many blocks, kept from an earlier call if there was one."""
        key = len(ids), out
        launch = self.launches.get(key)
        if launch is None or not launch.is_current():
            if len(self.launches) >= KEPT_LAUNCHES:
                self.launches.clear()
            self.launches[key] = launch = prepare_move(cache, ids, self.buffers[0], gather=out)
        return launch

    def _use_device(
        self, cache: KVCache, words: tuple[Any, Any], ids: Any, launch: CheckedCall, turn: int, out: bool
    ) -> None:
        """Gather blocks into a buffer, or scatter them from there."""
        buffer = self.words_of_buffers[turn]
        to, source = (buffer, words) if out else (words, buffer)
        launch.launch(*to, *source, ids)
        if not out:
            refresh_blocks(cache, ids)

    def _use_link(self, host: HostBlocks, runs: list[tuple[int, int, int]], turn: int, out: bool) -> None:
        """Copy a buffer to the host's blocks, or from them, a run of neighbours at a time."""
        if self.streams is not None:
            self.streams.copy(turn, self.buffers[turn].data.ptr, host.blocks.ctypes.data, runs, out)
            return
        near, far = self.buffers[turn].view(np.uint8).reshape(-1), host.blocks.view(np.uint8).reshape(-1)
        for near_at, far_at, nbytes in runs:
            to, source = near[near_at : near_at + nbytes], far[far_at : far_at + nbytes]
            np.copyto(*((source, to) if out else (to, source)))


class _Blocks:
    """The blocks of a swap, in the order of the host's; what all buffers of them have in common is worked out once."""

    def __init__(self, mover: _Mover, cache: KVCache, on_device: np.ndarray, on_host: np.ndarray, out: bool) -> None:
        self.mover, self.cache, self.on_host, self.out = mover, cache, on_host, out
        self._on_device = on_device

    def parts(self) -> Iterator[_Part]:
        """Return them a buffer at a time; a quarter of one first on the way out, where the link waits for a gather."""
        count, at_once = len(self.on_host), self.mover.at_once
        first = max(1, at_once // 4) if self.out else at_once
        return (_Part(self, *bounds) for bounds in pairwise([0, *range(first, count, at_once), count]))

    @cached_property
    def ids(self) -> Any:
        """On the device, int32 on the cache's backend."""
        streams = self.mover.streams
        return self._on_device if streams is None else streams.upload(self._on_device)

    @cached_property
    def begins(self) -> list[int]:
        """Where neighbours on the host begin, all but the first."""
        return (np.flatnonzero(self.on_host[1:] != self.on_host[:-1] + 1) + 1).tolist()


class _Part:
    """As many blocks as a buffer holds, or less.

    All is worked out when it is first asked for: the first gather does not wait for the host's runs, nor the first copy
    to the device for ids there.
    """

    def __init__(self, blocks: _Blocks, first: int, end: int) -> None:
        self._blocks, self._first, self._end = blocks, first, end

    @cached_property
    def on_device(self) -> tuple[Any, CheckedCall]:
        """Ids, and what gathers or scatters them."""
        blocks = self._blocks
        ids = blocks.ids[self._first : self._end]
        return ids, blocks.mover.launch(blocks.cache, ids, blocks.out)

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Neighbours, which share a copy: where in the buffer, where in the host's blocks, and how many bytes."""
        begins, ids, size = self._blocks.begins, self._blocks.on_host, self._blocks.mover.block_bytes
        first, end = self._first, self._end
        inner = begins[bisect_right(begins, first) : bisect_left(begins, end)]
        runs = zip([first, *inner], [*inner, end], strict=True)
        return [((begin - first) * size, int(ids[begin]) * size, (stop - begin) * size) for begin, stop in runs]


class _Streams:
    """Two streams that take turns, and events that keep swaps in order with each other and with other work."""

    def __init__(self) -> None:
        cuda = array_module("cuda").cuda
        self.own = [cuda.Stream(non_blocking=True) for _ in range(2)]
        self._asked, self._uploaded, self._other_done = (cuda.Event(disable_timing=True) for _ in range(3))
        self._ids: Any = None  # on the device
        self._kept: deque[tuple[Any, Any]] = deque()  # when swaps are done, and what may be read until then
        self._cuda = cuda

    def wait_for_current(self) -> None:
        """Let both wait for the work that is on the current stream now."""
        self._asked.record(self._cuda.get_current_stream())
        self.wait_for([self._asked])

    def wait_for(self, events: Iterable[Any]) -> None:
        """Let both wait for events; None is none."""
        for event in dict.fromkeys(events):
            if event is not None:
                for stream in self.own:
                    stream.wait_event(event)

    def upload(self, ids: np.ndarray) -> Any:
        """Return ids on the device, for both to read until the next swap.

        The first stream writes them, and the other waits for it: as the first waited for the other at the end of the
        swap before, nothing on the device overtakes that. `ids` need not be pinned: a few KiB go into the driver's
        queue, where more would make the host wait for the stream. CUDA does not promise to have read them when this
        returns: `join` keeps them until the swap is done.
        """
        first, other = self.own
        if self._ids is None or len(self._ids) < len(ids):
            with first:
                self._ids = array_module("cuda").empty(len(ids), ids.dtype)
        runtime, to, source = self._cuda.runtime, self._ids.data.ptr, ids.ctypes.data
        for at in range(0, ids.nbytes, UPLOADED_AT_ONCE):
            nbytes = min(UPLOADED_AT_ONCE, ids.nbytes - at)
            runtime.memcpyAsync(to + at, source + at, nbytes, runtime.memcpyHostToDevice, first.ptr)
        self._uploaded.record(first)
        other.wait_event(self._uploaded)
        return self._ids

    def copy(self, turn: int, near: int, far: int, runs: Iterable[tuple[int, int, int]], out: bool) -> None:
        """Copy runs of bytes between the device's address `near` and the host's, `far`."""
        runtime, stream = self._cuda.runtime, self.own[turn].ptr
        copy = runtime.memcpyAsync
        if out:
            for near_at, far_at, nbytes in runs:
                copy(far + far_at, near + near_at, nbytes, runtime.memcpyDeviceToHost, stream)
        else:
            for near_at, far_at, nbytes in runs:
                copy(near + near_at, far + far_at, nbytes, runtime.memcpyHostToDevice, stream)

    def join(self, ids: np.ndarray) -> Any:
        """Return an event, when all that was started so far on both is done, and keep ids until then."""
        first, other = self.own
        self._other_done.record(other)
        first.wait_event(self._other_done)
        done = self._cuda.Event(disable_timing=True)
        done.record(first)
        while self._kept and self._kept[0][0].done:
            self._kept.popleft()
        self._kept.append((done, ids))
        return done

    def let_current_wait(self, event: Any) -> None:
        """Let the current stream wait for an event."""
        self._cuda.get_current_stream().wait_event(event)

    def synchronise(self) -> None:
        """Wait for what was started so far."""
        for stream in self.own:
            stream.synchronize()


def _refuse_in_capture(cache: KVCache) -> None:
    refuse_in_capture(cache.backend, "blocks must be swapped by calls, as swaps run on streams of their own")


def _checked(config: CacheConfig, num_host_blocks: int, pairs: Any, out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return blocks of the cache, int32, and of the host, in the order of the latter: neighbours share a copy."""
    array = np.asarray(pairs)
    if array.size == 0:
        array = np.empty((0, 2), np.int32)
    if array.dtype.kind not in "iu":
        raise TypeError(f"pairs must be integers; got dtype {array.dtype}")
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"pairs must have shape [num_pairs, 2]; got {list(array.shape)}")
    if not len(array):
        return np.empty(0, np.int32), np.empty(0, np.int64)
    columns = np.ascontiguousarray(array.T)
    on_device, on_host = columns if out else columns[::-1]
    if not (on_host[1:] > on_host[:-1]).all():
        order = np.argsort(on_host, kind="stable")
        on_device, on_host = on_device[order], on_host[order]
    _check_ascending(on_host, "host", num_host_blocks, once=out)
    _check_ascending(np.sort(on_device), "cache", config.num_blocks, once=not out)
    return on_device.astype(np.int32), on_host.astype(np.int64)


def _check_ascending(ids: np.ndarray, what: str, limit: int, once: bool) -> None:
    """Raise ValueError unless ascending ids are those of blocks, and none comes again where each may come once."""
    if ids[0] < 0 or ids[-1] >= limit:
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        raise ValueError(f"pairs must name blocks of the {what} from 0 to below {limit}; got {wrong}")
    if once and (ids[1:] == ids[:-1]).any():
        twice = ids[1:][ids[1:] == ids[:-1]]
        raise ValueError(f"pairs must write a block once; block {twice[0]} is written twice")
