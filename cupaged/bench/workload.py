"""A decode call to measure: a filled cache, block tables placed in order or at random, queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupaged.config import CacheConfig
from cupaged.kv_cache import KVCache, aligned_zeros

__all__ = ["PLACEMENTS", "DecodeWorkload", "decode_workload"]

PLACEMENTS = ("sequential", "random")


@dataclass(frozen=True)
class DecodeWorkload:
    """The arguments of `cupaged.paged_attention`, and the bytes of keys and values that it must read."""

    query: Any
    cache: KVCache
    block_tables: Any
    seq_lens: Any
    kv_bytes: int

    @property
    def arguments(self) -> tuple[Any, KVCache, Any, Any]:
        """Query, cache, block tables, lengths."""
        return self.query, self.cache, self.block_tables, self.seq_lens

    def some(self, seqs: slice) -> tuple[Any, KVCache, Any, Any]:
        """Return the arguments of some sequences."""
        return self.query[seqs], self.cache, self.block_tables[seqs], self.seq_lens[seqs]


def decode_workload(
    seq_lens: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    *,
    dtype: str = "float16",
    layout: str = "BSHD",
    placement: str = "random",
    backend: str,
    seed: int = 0,
) -> DecodeWorkload:
    """Return a workload whose cache holds standard normal values in every slot.

    Parameters
    ----------
    seq_lens : sequence of int
        Context of each sequence in tokens.
    num_heads, num_kv_heads, head_dim, block_size, dtype, layout
        See `cupaged.CacheConfig`.
    placement : {"sequential", "random"}
        Whether the blocks of a sequence are neighbours in the pool, or anywhere.
    backend : {"cuda", "host"}
        Where the arrays lie.
    seed : int
        Of the values and the placement.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}; got {placement!r}")
    rng = np.random.default_rng(seed)
    lens = np.asarray(seq_lens, dtype=np.int32)
    blocks_of = -(-lens // block_size)
    num_blocks = max(1, int(blocks_of.sum()))
    cache = KVCache(CacheConfig(num_blocks, block_size, num_kv_heads, head_dim, dtype, layout), backend)
    ids = np.arange(num_blocks) if placement == "sequential" else rng.permutation(num_blocks)
    tables = np.full((len(lens), max(1, int(blocks_of.max(initial=0)))), -1, dtype=np.int32)
    for row, first, count in zip(tables, np.cumsum(blocks_of) - blocks_of, blocks_of, strict=True):
        row[:count] = ids[first : first + count]
    for array in cache.storage:
        _fill(array, cache, rng)
    query = rng.standard_normal((len(lens), num_heads, head_dim)).astype(cache.config.numpy_dtype)
    kv_bytes = int(lens.sum()) * cache.config.bytes_per_token
    return DecodeWorkload(_place(query, cache), cache, _place(tables, cache), _place(lens, cache), kv_bytes)


def _fill(array: Any, cache: KVCache, rng: np.random.Generator) -> None:
    """Fill with normal values, a piece at a time: the float32 values take more room than the cache's own."""
    flat = array.reshape(-1)
    generator = rng if cache.backend == "host" else cache.xp.random.default_rng(int(rng.integers(2**31)))
    for first in range(0, flat.size, 1 << 26):
        piece = flat[first : first + (1 << 26)]
        piece[...] = generator.standard_normal(piece.size, dtype=np.float32).astype(piece.dtype)


def _place(array: np.ndarray, cache: KVCache) -> Any:
    """Move an array to the backend; on the host, to where a GPU's allocator would let it start."""
    if cache.backend != "host":
        return cache.xp.asarray(array)
    placed = aligned_zeros(array.shape, array.dtype)
    placed[...] = array
    return placed
