"""The arrays of one cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from cupaged import layouts
from cupaged.config import CacheConfig
from cupaged.ops.arrays import as_backend_array
from cupaged.ops.overlap import check_apart
from cupaged.ops.streams import on_callers_streams
from cupaged.runtime.arguments import byte_bounds
from cupaged.runtime.launch import CheckedCalls
from cupaged.runtime.select import choose_backend

__all__ = ["KVCache", "aligned_zeros"]

ALLOCATION_ALIGNMENT = 512  # bytes; what cudaMalloc and CuPy's pool give


class KVCache:
    """Keys and values of all blocks, on the GPU or on the host.

    Parameters
    ----------
    config : CacheConfig
        Shape, dtype and layout.
    backend : {"cuda", "host"}, optional
        Where the arrays lie; None takes the best that runs here.

    Attributes
    ----------
    key, value : ndarray
        With the layout's axes (see `cupaged.layouts`), zero at first. In a fused layout, views of `storage`.
    storage : tuple of ndarray
        The arrays that own the memory: one if the layout is fused, else keys and values.

    Raises
    ------
    BackendUnavailableError
        If the backend does not run here.
    """

    def __init__(self, config: CacheConfig, backend: str | None = None) -> None:
        if not isinstance(config, CacheConfig):
            raise TypeError(f"config must be a CacheConfig; got {type(config).__name__}")
        self.config = config
        self.backend = choose_backend(backend)
        self.xp = _array_module(self.backend)
        layout = layouts.LAYOUTS[config.layout]
        if layout.fused:
            both = self._zeros(layout.key_axes)
            self.storage: tuple[Any, ...] = (both,)
            split = (slice(None),) * layout.key_axes.index("kv")
            self._key, self._value = both[(*split, 0)], both[(*split, 1)]
        else:
            self.storage = self._zeros(layout.key_axes), self._zeros(layout.value_axes)
            self._key, self._value = self.storage
        self.appends = CheckedCalls(self.backend)  # of append_kv
        self.textures: dict[Any, Any] = {}  # of cupaged.ops.textures.bind_textures
        self.mover: Any = None  # of cupaged.ops.swap.swap_blocks
        self.turns: dict[Any, Any] = {}  # of rope_append_kv: its frequencies, on the device

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """The addresses between which each array of `storage` lies."""
        return tuple(map(byte_bounds, self.storage))

    @cached_property
    def device(self) -> int:
        """The CUDA device that holds the arrays; 0 on the host."""
        return self.storage[0].device.id if self.backend == "cuda" else 0

    def __repr__(self) -> str:
        return f"KVCache({self.config}, backend={self.backend!r})"

    @property
    def key(self) -> Any:
        """Keys, with the layout's axes."""
        return self._key

    @property
    def value(self) -> Any:
        """Values, with the layout's axes."""
        return self._value

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.storage)

    def to_dense(self) -> tuple[Any, Any]:
        """Return copies of keys and values, each [num_blocks, block_size, num_kv_heads, head_dim]."""
        name = self.config.layout
        return layouts.to_dense(self.key, name, "key"), layouts.to_dense(self.value, name, "value")

    @on_callers_streams
    def fill_from_dense(self, key: Any, value: Any) -> None:
        """Copy dense keys and values, each [num_blocks, block_size, num_kv_heads, head_dim], into the cache.

        Raises
        ------
        ValueError
            If a shape or dtype differs from the cache's, or an array lies in the cache.
        """
        config = self.config
        expected = (config.num_blocks, config.block_size, config.num_kv_heads, config.head_dim)
        given = {"key": key, "value": value}
        for name, dense in given.items():
            if not isinstance(dense, np.ndarray):
                given[name] = dense = as_backend_array(dense, name, self.backend)
            if tuple(dense.shape) != expected or dense.dtype != config.numpy_dtype:
                raise ValueError(
                    f"{name} must be {config.dtype} with shape {expected}; got {dense.dtype} with shape {dense.shape}"
                )
        check_apart({"cache": self}, given)
        self.key[...] = layouts.from_dense(self.xp.asarray(given["key"]), config.layout, "key")
        self.value[...] = layouts.from_dense(self.xp.asarray(given["value"]), config.layout, "value")

    @on_callers_streams
    def blocks(self, block_ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return NumPy copies of the listed blocks' keys and values, [len(block_ids), block_size, heads, dim]."""
        host_ids = isinstance(block_ids, np.ndarray | Sequence)
        ids = self.xp.asarray(block_ids if host_ids else as_backend_array(block_ids, "block_ids", self.backend))
        pair = []
        for array, kind in ((self.key, "key"), (self.value, "value")):
            dense = layouts.take_blocks(array, self.config.layout, kind, ids)  # type: ignore[arg-type]
            pair.append(dense if isinstance(dense, np.ndarray) else dense.get())
        return pair[0], pair[1]

    def _zeros(self, axes: tuple[str, ...]) -> Any:
        shape, dtype = layouts.shape(self.config, axes), self.config.numpy_dtype
        return aligned_zeros(shape, dtype) if self.backend == "host" else self.xp.zeros(shape, dtype)


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return a NumPy array of zeros that starts where a GPU's allocator would let it start: a multiple of 512 bytes.

    Sectors of memory are then touched as on the GPU. Pages that nobody writes take no memory.
    """
    size = math.prod(shape) * dtype.itemsize
    room = np.zeros(size + ALLOCATION_ALIGNMENT, dtype=np.uint8)
    start = -room.ctypes.data % ALLOCATION_ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def _array_module(backend: str) -> Any:
    if backend == "host":
        return np
    import cupy

    return cupy
