"""What the memory can do at best, measured in the same run as whatever is held to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

from cupaged.bench.timing import time_graph
from cupaged.runtime.select import load_kernel

__all__ = ["copy_ceiling", "read_ceiling"]

# Threads in a block, and blocks per SM: which shape reads fastest differs between GPUs, so the best of them counts.
LAUNCH_SHAPES = ((256, 2), (256, 8), (256, 32), (512, 1), (512, 4), (512, 16), (1024, 1), (1024, 2), (1024, 8))
# The same of copies; None: as many blocks as it takes for each to copy one chunk.
COPY_SHAPES = ((256, None), (512, None), (1024, None), (256, 8), (512, 4), (1024, 2))
COPIES_IN_FLIGHT = (2, 4, 8)  # vectors of a thread


def read_ceiling(nbytes: int = 2 << 30) -> float:
    """Return the GPU's read bandwidth in GB/s (10^9 bytes).

    A kernel that reads `nbytes` once and does nothing else, in the launch shape that is fastest; the shapes are gone
    through twice, so that the GPU's clocks have risen when they are timed.
    """
    import cupy

    data = cupy.random.randint(0, 2**31, size=nbytes // 4, dtype=cupy.uint32)
    combined = cupy.zeros(1, dtype=cupy.uint32)
    kernel = load_kernel("bench/read_stream.cu", "read_stream", backend="cuda")
    multiprocessors = cupy.cuda.Device().attributes["MultiProcessorCount"]

    def read(threads: int, blocks_per_sm: int) -> None:
        grid = (blocks_per_sm * multiprocessors,)
        kernel(grid, (threads,), combined=combined, data=data, vectors=data.size // 4)

    times = [time_graph([lambda s=shape: read(*s)]).median_us for _ in range(2) for shape in LAUNCH_SHAPES]  # type: ignore[misc]
    return data.nbytes / min(times) / 1e3


def copy_ceiling(nbytes: int = 1 << 30) -> float:
    """Return the bandwidth of a copy on the device in GB/s: the bytes read and the bytes written, `nbytes` each.

    It is what appending, copying and gathering blocks are held to: the faster of the driver's own copy and a kernel
    that copies and does nothing else, in the launch shape that is fastest. As the L2 cache may hold part of what is
    copied, `nbytes` should be as many as of what is held to it. All are timed twice, so that clocks have risen.
    """
    import cupy

    source = cupy.zeros(nbytes // 16 * 4, dtype=cupy.uint32)
    target = cupy.empty_like(source)
    vectors = source.size // 4
    multiprocessors = cupy.cuda.Device().attributes["MultiProcessorCount"]

    def copies() -> Iterator[Callable[[], Any]]:
        yield lambda: cupy.copyto(target, source)
        for in_flight, streaming in product(COPIES_IN_FLIGHT, (0, 1)):
            defines = {"IN_FLIGHT": in_flight, "STREAMING": streaming}
            kernel = load_kernel("bench/copy_stream.cu", "copy_stream", defines, backend="cuda")
            for threads, blocks_per_sm in COPY_SHAPES:
                all_at_once = -(-vectors // (threads * in_flight))
                blocks = min(blocks_per_sm * multiprocessors, all_at_once) if blocks_per_sm else all_at_once
                arguments = {"to": target, "from": source, "vectors": vectors}
                yield partial(kernel, (blocks,), (threads,), **arguments)

    times = [time_graph([copy]).median_us for _ in range(2) for copy in copies()]
    return 2 * source.nbytes / min(times) / 1e3
