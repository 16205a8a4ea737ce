"""A device whose streams do their work in any order that streams and events permit: what is missing shows, by chance.

Arrays are CuPy's, over the host's memory; kernels are run by the host backend when their turn comes.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np

from cupaged.runtime import cuda, driver
from cupaged.runtime.select import load_kernel
from tests.kit.cuda_stub import CudaStub

HOST_TO_DEVICE = 1  # cudaMemcpyKind


class Event:
    """What is recorded last counts, and a stream that waits looks at that when it is told to."""

    def __init__(self, disable_timing=False):
        self.recorded = self._streams = None

    def record(self, stream):
        mark = self.recorded = SimpleNamespace(done=False)
        self._streams = stream.streams
        stream.add(lambda: setattr(mark, "done", True))

    @property
    def done(self):
        return self.recorded.done

    def synchronize(self):
        while not self.recorded.done:
            self._streams.step()


class Stream:
    """A queue of work; a piece waits for the one before it, and for an event if it has one."""

    def __init__(self, streams):
        self.streams, self.queue, self.ptr = streams, [], len(streams.all)
        streams.all.append(self)

    def add(self, work, mark=None):
        self.queue.append((work, mark))

    def is_capturing(self):
        return False

    def wait_event(self, event):
        if event.recorded is not None:
            self.add(lambda: None, event.recorded)

    def record(self):
        event = Event()
        event.record(self)
        return event

    def synchronize(self):
        while self.queue:
            self.streams.step()

    def __enter__(self):
        self.streams.current.append(self)

    def __exit__(self, *_):
        self.streams.current.pop()


class Streams:
    """All streams of a simulated device, and what is on them.

    Attributes
    ----------
    uploads, launches, copies : int
        Asked for so far.
    copied_on : list of Stream
        On which stream each copy was.
    """

    def __init__(self, monkeypatch, seed):
        import cupy

        self.all, self._rng = [], np.random.default_rng(seed)
        self.current = [Stream(self)]
        self.uploads = self.launches = 0
        self.copied_on, self._made_on = [], {}
        self._memory, self._pinned, self._stub = {}, [], CudaStub(monkeypatch)
        for name in ("zeros", "empty"):
            monkeypatch.setattr(cupy, name, self.array)
        monkeypatch.setattr(cupy.cuda, "Stream", lambda non_blocking: Stream(self))
        monkeypatch.setattr(cupy.cuda, "Event", Event)
        monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda *_: self.current[-1])
        monkeypatch.setattr(cupy.cuda.runtime, "memcpyAsync", self._copy)
        monkeypatch.setattr(cuda.CudaKernel, "raw_kernel", lambda kernel: self._raw_kernel(kernel))
        monkeypatch.setattr(driver.DriverLaunch, "_launch", lambda launch: self._launched(launch))

    def array(self, shape, dtype=np.float32):
        """Return a CuPy array of zeros, over the host's memory."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        room = np.zeros(nbytes + 512, np.uint8)
        address = room.ctypes.data + -room.ctypes.data % 512
        self._memory[address] = room  # kept
        self._made_on[address] = self.current[-1]
        return self._stub.array(shape, dtype, address)

    @property
    def copies(self):
        return len(self.copied_on)

    def made_on(self, array):
        """Return the stream that an array was made on, which may give its memory to others once it is freed."""
        return self._made_on[array.data.ptr]

    def pin(self, array):
        """Let copies to the device read a NumPy array when their turn comes."""
        self._pinned.append(range(array.ctypes.data, array.ctypes.data + array.nbytes))

    @staticmethod
    def seen(array):
        """Return a contiguous CuPy array as NumPy's, over the same memory."""
        words = (ctypes.c_uint8 * array.nbytes).from_address(array.data.ptr)
        return np.frombuffer(words, np.uint8).view(array.dtype).reshape(array.shape)

    def step(self):
        """Do the next piece of one of the streams that have one that can be done."""
        ready = [s for s in self.all if s.queue and (s.queue[0][1] is None or s.queue[0][1].done)]
        assert ready, "every stream waits for another"
        work, _ = ready[self._rng.integers(len(ready))].queue.pop(0)
        work()

    def run(self):
        """Do all that is left."""
        while any(stream.queue for stream in self.all):
            self.step()

    def _copy(self, to, source, nbytes, kind, stream):
        if kind == HOST_TO_DEVICE and not any(source in memory for memory in self._pinned):
            content = ctypes.string_at(source, nbytes)  # the driver reads such memory before it returns
            self.all[stream].add(lambda: ctypes.memmove(to, content, nbytes))
            self.uploads += 1
        else:
            self.all[stream].add(lambda: ctypes.memmove(to, source, nbytes))
            self.copied_on.append(self.all[stream])

    def _raw_kernel(self, kernel):
        source = kernel.source
        twin = load_kernel(source.file, source.entry, dict(source.defines), "host")
        return SimpleNamespace(
            twin=twin,
            parameters=source.parameters,
            kernel=SimpleNamespace(ptr=0),
            num_regs=128,
            shared_size_bytes=0,
            max_dynamic_shared_size_bytes=0,
        )

    def _launched(self, launch):
        told, kernel = launch._config, launch._kernel
        given = {p.name: self._value(p, word) for p, word in zip(kernel.parameters, launch._words, strict=True)}
        grid, block, shared_bytes = tuple(told.grid), tuple(told.block), told.shared_bytes
        self.launches += 1
        self.current[-1].add(lambda: kernel.twin(grid, block, shared_bytes, **given))

    def _value(self, parameter, word):
        """Return what a kernel would read from a word: a number, or all memory from an address on."""
        if not parameter.is_pointer:
            return np.frombuffer(word.to_bytes(8, "little"), parameter.dtype, 1)[0].item()
        if word == 0:
            return None
        start = max(address for address in self._memory if address <= word)
        room = self._memory[start]
        nbytes = room.ctypes.data + room.nbytes - word
        words = (ctypes.c_uint8 * (nbytes - nbytes % parameter.dtype.itemsize)).from_address(word)
        return np.frombuffer(words, np.uint8).view(parameter.dtype)
