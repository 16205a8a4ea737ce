"""What the memory can do at best, measured in the same run as whatever is held to it."""

from __future__ import annotations

from cupaged.bench.timing import time_graph
from cupaged.runtime.select import load_kernel

__all__ = ["read_ceiling"]

THREADS = 512
BLOCKS_PER_SM = 4


def read_ceiling(nbytes: int = 2 << 30) -> float:
    """Return the GPU's read bandwidth in GB/s (10^9 bytes): a kernel that reads `nbytes` once and does nothing else."""
    import cupy

    data = cupy.random.randint(0, 2**31, size=nbytes // 4, dtype=cupy.uint32)
    combined = cupy.zeros(1, dtype=cupy.uint32)
    kernel = load_kernel("bench/read_stream.cu", "read_stream", backend="cuda")
    blocks = BLOCKS_PER_SM * cupy.cuda.Device().attributes["MultiProcessorCount"]
    timing = time_graph([lambda: kernel((blocks,), (THREADS,), combined=combined, data=data, vectors=data.size // 4)])
    return data.nbytes / timing.median_us / 1e3
