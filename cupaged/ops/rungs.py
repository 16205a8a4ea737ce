"""Launches of the decode kernels that are steps of a ladder; `cupaged.ops.attention` has checked their arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from cupaged import layouts
from cupaged.config import CacheConfig
from cupaged.kv_cache import KVCache
from cupaged.ops.registry import kernels
from cupaged.ops.textures import load_path
from cupaged.ops.variants import Variants
from cupaged.runtime.arguments import Strided
from cupaged.runtime.select import load_kernel
from cupaged.runtime.source import C_TYPE_OF_DTYPE

__all__ = ["RUNGS", "launch_batched", "rung_defines", "split_context"]

THREADS = 128
MMA_CHUNK = 16  # tokens, as in kernels_cu/include/attention_tile.cuh
WARPS = THREADS // 32
MAX_HEADS_OF_TILE = 4  # query heads that share a load in paged_attention_v2: more take too many registers
BLOCKS_TO_FILL = 8  # thread blocks for each multiprocessor: two waves of what runs at once
MOST_WAVES = 16
PARTITION_TOKENS = 1024
MIN_PARTITION_TOKENS = 128  # below, starting and merging a partition takes as long as reading it
STEP_TOKENS = 32  # a multiple of them keeps all lanes of a step busy at D = 128 in half precision
MAX_PARTITIONS = 65535  # of a grid's second axis
BATCHED_BLOCKS_PER_MULTIPROCESSOR = 4  # that run at once
HOST_MULTIPROCESSORS = 16  # enough to cut the contexts of the tests
PLAIN = Variants()


def rung_defines(config: CacheConfig) -> dict[str, object]:
    """Return what every rung is specialised to."""
    return {
        "STORAGE": C_TYPE_OF_DTYPE[config.numpy_dtype],
        "HEAD_DIM": config.head_dim,
        "BLOCK_SIZE": config.block_size,
        "KEY_PACK": layouts.kv_strides(config, "key").pack_size,
        "VALUE_PACK": layouts.kv_strides(config, "value").pack_size,
    }


def _load(name: str, cache: KVCache, **defines: int) -> Any:
    return load_kernel(kernels()[name].file, name, {**rung_defines(cache.config), **defines}, cache.backend)


def _arguments(
    out: Any, lse: Any, query: Any, cache: KVCache, block_tables: Any, seq_lens: Any, scale: float
) -> dict[str, Any]:
    """Return the arguments that all rungs take."""
    key, value = layouts.kv_strides(cache.config, "key"), layouts.kv_strides(cache.config, "value")
    return {
        "out": out,
        "lse": lse,
        "query": query,
        "key_cache": Strided(cache.key),
        "value_cache": Strided(cache.value),
        "block_tables": block_tables,
        "seq_lens": seq_lens,
        "scale": scale,
        "num_heads": query.shape[1],
        "group": query.shape[1] // cache.config.num_kv_heads,
        "max_blocks": block_tables.shape[1],
        **layouts.stride_arguments(key, value),
    }


def launch_block_per_head(name: str, out: Any, lse: Any, query: Any, cache: KVCache, *rest: Any) -> None:
    """Launch paged_attention_naive or _online: a thread block for every (sequence, query head)."""
    kernel = _load(name, cache)
    kernel((query.shape[0] * query.shape[1],), (THREADS,), **_arguments(out, lse, query, cache, *rest))


def launch_warp(out: Any, lse: Any, query: Any, cache: KVCache, *rest: Any) -> None:
    """Launch paged_attention_warp: a warp for every (sequence, query head)."""
    kernel = _load("paged_attention_warp", cache)
    num_seqs, num_heads, _ = query.shape
    blocks = -(-num_seqs * num_heads // WARPS)
    kernel((blocks,), (THREADS,), **_arguments(out, lse, query, cache, *rest), num_seqs=num_seqs)


def launch_texture(out: Any, lse: Any, query: Any, cache: KVCache, *rest: Any) -> None:
    """Launch paged_attention_texture: by `tex1Dfetch`, or as ``kernels_defining(LOAD_PATH=...)`` has it."""
    of_path, textures = load_path(cache)
    defines = {name: rung_defines(cache.config)[name] for name in ("STORAGE", "HEAD_DIM", "BLOCK_SIZE")}
    name = "paged_attention_texture"
    kernel = load_kernel(kernels()[name].file, name, {**defines, **of_path}, cache.backend)
    arguments = _arguments(out, lse, query, cache, *rest)
    del arguments["key_pack_stride"], arguments["value_pack_stride"]  # a row is one pack
    kernel((query.shape[0] * query.shape[1],), (THREADS,), **arguments, **textures)


def launch_v2(out: Any, lse: Any, query: Any, cache: KVCache, *rest: Any, variants: Variants = PLAIN) -> None:
    """Launch paged_attention_v2, tiles of up to 4 query heads, and merge_partitions.

    `query`, [rows, H, D], has the query tokens of a sequence one behind the other.
    """
    tiles = -(-_group(query, cache) // MAX_HEADS_OF_TILE)
    kernel = _load("paged_attention_v2", cache, HEADS=-(-_group(query, cache) // tiles), **variants.defines)
    arguments = {**_arguments(out, lse, query, cache, *rest), **variants.arguments}
    _launch_over_partitions(kernel, tiles, 0, arguments, cache, variants)


def launch_mma(out: Any, lse: Any, query: Any, cache: KVCache, *rest: Any) -> None:
    """Launch paged_attention_mma, tiles of 8 or 16 query heads, and merge_partitions."""
    config, group = cache.config, _group(query, cache)
    rows = 8 if group <= 8 else 16
    defines = {name: rung_defines(config)[name] for name in ("STORAGE", "HEAD_DIM", "BLOCK_SIZE")}
    name = "paged_attention_mma"
    kernel = load_kernel(kernels()[name].file, name, {**defines, "ROWS": rows}, cache.backend)
    arguments = _arguments(out, lse, query, cache, *rest)
    del arguments["key_pack_stride"], arguments["value_pack_stride"]  # a row is one pack
    chunk_bytes = 2 * MMA_CHUNK * config.head_dim * config.numpy_dtype.itemsize
    _launch_over_partitions(kernel, -(-group // rows), WARPS * chunk_bytes, arguments, cache, PLAIN)


def _group(query: Any, cache: KVCache) -> int:
    return int(query.shape[1]) // cache.config.num_kv_heads


def _launch_over_partitions(
    kernel: Any, tiles: int, shared_bytes: int, arguments: dict[str, Any], cache: KVCache, variants: Variants
) -> None:
    """Launch a kernel over (query token, KV head, tile of its query heads) and partitions, then merge_partitions."""
    config, xp = cache.config, cache.xp
    rows, num_heads, head_dim = arguments["query"].shape
    blocks = rows * config.num_kv_heads * tiles
    capacity = arguments["max_blocks"] * config.block_size if variants.window is None else variants.window
    tokens, partitions = split_context(capacity, blocks, multiprocessors(cache))
    partial: dict[str, Any] = {"partial_out": None, "partial_state": None}
    if partitions > 1:
        partial["partial_out"] = xp.empty((rows, num_heads, partitions, head_dim), dtype=np.float32)
        partial["partial_state"] = xp.empty((rows, num_heads, partitions, 2), dtype=np.float32)
    grid = (blocks, partitions)
    kernel(grid, (THREADS,), shared_bytes=shared_bytes, **arguments, **partial, partition_tokens=tokens)
    if partitions > 1:
        defines = {name: rung_defines(config)[name] for name in ("STORAGE", "HEAD_DIM")}
        defines |= {name: 1 for name in variants.defines if name in ("QUERY_TOKENS", "WINDOW", "SINKS")}
        merge = load_kernel(kernels()["merge_partitions"].file, "merge_partitions", defines, cache.backend)
        merge(
            (rows * num_heads,),
            (THREADS,),
            **{name: arguments[name] for name in ("out", "lse", "seq_lens", "num_heads")},
            **{name: variants.arguments[name] for name in ("query_tokens", "window", "sinks")},
            **partial,
            partitions=partitions,
            partition_tokens=tokens,
        )


def launch_batched(out: Any, lse: Any, query: Any, cache: KVCache, *rest: Any, query_to_seq: Any = None) -> None:
    """Launch paged_attention_batched: the thread blocks that run at once take (query, head) pairs in turns.

    `query_to_seq`, int32 [num_queries], says which row of the tables a query reads; None is the identity.
    """
    kernel = _load("paged_attention_batched", cache)
    num_queries, num_heads, _ = query.shape
    arguments = _arguments(out, lse, query, cache, *rest)
    blocks = batched_blocks(cache, num_queries * num_heads)
    kernel((blocks,), (THREADS,), **arguments, query_to_seq=query_to_seq, num_queries=num_queries)


def batched_blocks(cache: KVCache, pairs: int) -> int:
    """Return the grid of paged_attention_batched: what runs at once. Any other gives the same result."""
    return min(pairs, BATCHED_BLOCKS_PER_MULTIPROCESSOR * multiprocessors(cache))


def split_context(capacity: int, blocks: int, processors: int) -> tuple[int, int]:
    """Return the tokens of a partition, and how many partitions cover a context of up to `capacity` tokens.

    Lengths are on the device and not read back, so this goes by what a table can hold. Enough partitions that `blocks`
    thread blocks for each fill the GPU; of PARTITION_TOKENS, so that sequences of unlike length are cut into equal
    work; but no more than MOST_WAVES times what fills the GPU, as most of them may turn out to be empty.
    """
    fill = BLOCKS_TO_FILL * processors
    most = min(max(1, MOST_WAVES * fill // blocks), MAX_PARTITIONS)
    wanted = min(max(fill // blocks, -(-capacity // PARTITION_TOKENS), 1), most)
    tokens = max(-(-capacity // wanted), MIN_PARTITION_TOKENS)
    tokens = -(-tokens // STEP_TOKENS) * STEP_TOKENS
    return tokens, max(1, -(-capacity // tokens))


def multiprocessors(cache: KVCache) -> int:
    """Return how many multiprocessors run a launch."""
    return HOST_MULTIPROCESSORS if cache.backend == "host" else _multiprocessors(cache.device)


@functools.cache
def _multiprocessors(device: int) -> int:
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


RUNGS: dict[str, Callable[..., None]] = {
    "paged_attention_naive": functools.partial(launch_block_per_head, "paged_attention_naive"),
    "paged_attention_warp": launch_warp,
    "paged_attention_online": functools.partial(launch_block_per_head, "paged_attention_online"),
    "paged_attention_texture": launch_texture,
    "paged_attention_v2": launch_v2,
    "paged_attention_batched": launch_batched,
    "paged_attention_mma": launch_mma,
}
