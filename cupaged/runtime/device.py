"""What a device is and gives a thread block, and how many blocks of a kernel one multiprocessor runs at once."""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = [
    "compute_capability",
    "device_attribute",
    "dynamic_shared_bytes",
    "multiprocessors",
    "resident_blocks",
    "shared_bytes_for_at_most",
]

STATIC_SHARED_BYTES = 4096  # of a block, at most
SYSTEM_SHARED_BYTES = 1024  # that the GPU keeps of each block's
SHARED_GRANULE = 128  # in which it is given out
REGISTERS_PER_SM = 65536
UNLIMITED = 2**30  # what the host backend gives
HOST_MULTIPROCESSORS = 16  # enough to cut the contexts of the tests


@cache
def compute_capability(device: int) -> int:
    """Return a GPU's compute capability, ten times as CUDA writes it: 90 for 9.0."""
    import cupy

    return int(cupy.cuda.Device(device).compute_capability)


def multiprocessors(backend: str, device: int) -> int:
    """Return how many multiprocessors run a launch."""
    return HOST_MULTIPROCESSORS if backend == "host" else _multiprocessors(device)


@cache
def _multiprocessors(device: int) -> int:
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


def device_attribute(backend: str, name: str, on_host: int) -> int:
    """Return an attribute of the current device, by CUDA's name; `on_host` on the host backend."""
    if backend == "host":
        return on_host
    import cupy

    return int(cupy.cuda.Device().attributes[name])


def dynamic_shared_bytes(backend: str) -> int:
    """Return the dynamic shared memory that a block may have."""
    most = device_attribute(backend, "MaxSharedMemoryPerBlockOptin", UNLIMITED)
    return most if backend == "host" else most - STATIC_SHARED_BYTES


def resident_blocks(kernel: Any, threads: int, shared_bytes: int) -> int:
    """Return how many blocks of so many threads and dynamic shared bytes a multiprocessor of the GPU runs at once."""
    by_shared = _shared_bytes_per_sm() // (shared_bytes + _shared_bytes_unasked(kernel))
    by_registers = REGISTERS_PER_SM // (threads * kernel.raw_kernel().num_regs)
    return max(1, min(by_shared, by_registers))


def shared_bytes_for_at_most(blocks: int, kernel: Any, other: Any = None, shared_bytes_of_other: int = 0) -> int:
    """Return the dynamic shared bytes that a block must ask for so that an SM has room for so many of them and no more.

    With another kernel: room for so many, and besides for none of the other's blocks, which ask for
    `shared_bytes_of_other`.
    """
    if other is None:
        share = _shared_bytes_per_sm() // (blocks + 1)
    else:
        share = (_shared_bytes_per_sm() - shared_bytes_of_other - _shared_bytes_unasked(other)) // blocks
    share += SHARED_GRANULE
    return share - share % SHARED_GRANULE - _shared_bytes_unasked(kernel)


def _shared_bytes_unasked(kernel: Any) -> int:
    return int(kernel.raw_kernel().shared_size_bytes) + SYSTEM_SHARED_BYTES


def _shared_bytes_per_sm() -> int:
    return device_attribute("cuda", "MaxSharedMemoryPerMultiprocessor", 0)
