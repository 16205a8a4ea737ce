"""Launches of the decode kernels that are steps of a ladder; `cupaged.ops.attention` has checked their arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from cupaged import layouts
from cupaged.config import CacheConfig
from cupaged.kv_cache import KVCache
from cupaged.ops.registry import kernels
from cupaged.runtime.arguments import Strided
from cupaged.runtime.select import load_kernel
from cupaged.runtime.source import C_TYPE_OF_DTYPE

__all__ = ["RUNGS", "rung_defines"]

THREADS = 128
WARPS = THREADS // 32


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


RUNGS: dict[str, Callable[..., None]] = {
    "paged_attention_naive": functools.partial(launch_block_per_head, "paged_attention_naive"),
    "paged_attention_warp": launch_warp,
    "paged_attention_online": functools.partial(launch_block_per_head, "paged_attention_online"),
}
