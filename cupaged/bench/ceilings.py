"""What the memory can do at best, measured in the same run as whatever is held to it."""

from __future__ import annotations

from cupaged.bench.timing import time_graph
from cupaged.runtime.select import load_kernel

__all__ = ["copy_ceiling", "read_ceiling"]

# Threads in a block, and blocks per SM: which shape reads fastest differs between GPUs, so the best of them counts.
LAUNCH_SHAPES = ((256, 2), (256, 8), (256, 32), (512, 1), (512, 4), (512, 16), (1024, 1), (1024, 2), (1024, 8))


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

    It is what appending, copying and gathering blocks are held to. The driver's own copy does it, on arrays that
    outgrow any L2; it is timed twice, so that the GPU's clocks have risen.
    """
    import cupy

    source = cupy.zeros(nbytes, dtype=cupy.uint8)
    target = cupy.empty_like(source)
    times = [time_graph([lambda: cupy.copyto(target, source)]).median_us for _ in range(2)]
    return 2 * nbytes / min(times) / 1e3
