"""Plans of decode work: how it is shared out over thread blocks, made on the device, reused over layers and steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cupaged.config import CacheConfig
from cupaged.errors import UnsupportedError
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import as_backend_array
from cupaged.ops.checks import check_cache, check_dtype, check_shape
from cupaged.runtime.select import load_kernel
from cupaged.runtime.source import C_TYPE_OF_DTYPE

__all__ = ["DecodePlan", "plan_decode"]

CHUNK = 16  # tokens, as in kernels_cu/include/decode_plan.cuh
WARPS = 4
HOST_BLOCKS = 7  # enough to cut sequences in the middle, few enough to be quick
SHARED_BYTES_PER_SM = 228 * 1024  # of an H100; 1 KiB a block is the system's
REGISTERS_PER_SM = 65536


@dataclass(frozen=True)
class TileShape:
    """What paged_attention_mma is specialised to besides the cache."""

    rows: int
    stages: int

    def chunk_bytes(self, config: CacheConfig) -> int:
        """Return the bytes of a chunk's keys and values in shared memory."""
        itemsize = config.numpy_dtype.itemsize
        return 2 * CHUNK * (config.head_dim + 16 // itemsize) * itemsize

    def shared_bytes(self, config: CacheConfig) -> int:
        """Return a block's dynamic shared memory."""
        return WARPS * self.stages * self.chunk_bytes(config)


def tile_shape(config: CacheConfig, group: int) -> TileShape:
    """Return rows and stages for a cache and a number of query heads per KV head."""
    rows = 8 if group <= 8 else 16
    stages = {64: 6, 80: 4, 96: 4, 112: 2, 128: 2}.get(config.head_dim, 8 if config.head_dim < 64 else 3)
    if rows == 16 and config.head_dim < 112:
        stages -= 1
    return TileShape(rows, stages)


def attention_kernel(config: CacheConfig, group: int, backend: str) -> Any:
    """Return paged_attention_mma for a cache and a group."""
    shape = tile_shape(config, group)
    defines = {
        "STORAGE": C_TYPE_OF_DTYPE[config.numpy_dtype],
        "HEAD_DIM": config.head_dim,
        "BLOCK_SIZE": config.block_size,
        "ROWS": shape.rows,
        "STAGES": shape.stages,
    }
    return load_kernel("attention/paged_attention_mma.cu", "paged_attention_mma", defines, backend)


class DecodePlan:
    """Shares out one step of decode attention; made by `plan_decode`.

    A plan serves every layer of a step, and the next steps after `update`, which runs on the device, reads no length
    back and can be captured in a CUDA graph with the attention calls behind it.

    Attributes
    ----------
    num_seqs, num_heads : int
        What it was made for.
    num_blocks : int
        Thread blocks that the work is shared out over.
    """

    def __init__(self, cache: KVCache, num_seqs: int, num_heads: int) -> None:
        config = cache.config
        self.config, self.backend = config, cache.backend
        self.num_seqs, self.num_heads = num_seqs, num_heads
        self.group = num_heads // config.num_kv_heads
        self.shape = tile_shape(config, self.group)
        self.kernel = attention_kernel(config, self.group, cache.backend)
        self.num_blocks = _resident_blocks(self)
        xp, rows = cache.xp, self.shape.rows
        self.offsets = xp.zeros(num_seqs + 1, dtype=np.int32)
        self.first_seq = xp.zeros(self.num_blocks, dtype=np.int32)
        self.partial_out = xp.empty((self.num_blocks, 2, rows, config.head_dim), dtype=np.float32)
        self.partial_state = xp.empty((self.num_blocks, 2, rows, 2), dtype=np.float32)
        self.arrivals = xp.zeros(self.num_blocks, dtype=np.uint32)

    def update(self, seq_lens: Any) -> None:
        """Share out anew for other lengths, int32 [num_seqs]; returns without waiting for the device."""
        seq_lens = as_backend_array(seq_lens, "seq_lens", self.backend)
        check_dtype(seq_lens, "seq_lens", np.dtype(np.int32))
        check_shape(seq_lens, "seq_lens", (self.num_seqs,))
        kernel = load_kernel("attention/plan_decode.cu", "plan_decode", backend=self.backend)
        kernel(
            (1,),
            (1024,),
            offsets=self.offsets,
            first_seq=self.first_seq,
            seq_lens=seq_lens,
            num_seqs=self.num_seqs,
            tiles=self.config.num_kv_heads * -(-self.group // self.shape.rows),
            blocks=self.num_blocks,
        )


def plan_decode(cache: KVCache, seq_lens: Any, num_heads: int) -> DecodePlan:
    """Return a plan for decode attention of these lengths.

    Parameters
    ----------
    cache : KVCache
        In float16 or bfloat16, a plain layout, head_dim a multiple of 16.
    seq_lens : array, int32 [num_seqs]
        Lengths on the cache's backend; they are not read back.
    num_heads : int
        Query heads.

    Raises
    ------
    UnsupportedError
        If tensor cores do not serve the cache; the message names the limit.
    """
    check_cache(cache)
    reason = why_no_tensor_cores(cache)
    if reason:
        raise UnsupportedError(reason)
    if num_heads < 1 or num_heads % cache.config.num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of the cache's {cache.config.num_kv_heads} KV heads; got {num_heads}"
        )
    lens = as_backend_array(seq_lens, "seq_lens", cache.backend)
    plan = DecodePlan(cache, lens.shape[0], num_heads)
    plan.update(lens)
    return plan


def why_no_tensor_cores(cache: KVCache) -> str | None:
    """Return None if paged_attention_mma serves the cache where it lies, else what it does not."""
    config = cache.config
    if cache.backend == "cuda" and _compute_capability(cache.device) < 80:
        return "paged_attention_mma needs compute capability 8.0"
    if config.dtype == "float32":
        return "paged_attention_mma takes float16 or bfloat16; the cache is float32"
    if config.head_dim % 16:
        return f"paged_attention_mma takes a head_dim that is a multiple of 16; the cache's is {config.head_dim}"
    if config.layout == "BHDSX" and config.block_size > 1:
        return "paged_attention_mma takes layouts that keep a token's row together; BHDSX does not"
    return None


@cache
def _compute_capability(device: int) -> int:
    import cupy

    return int(cupy.cuda.Device(device).compute_capability)


def _resident_blocks(plan: DecodePlan) -> int:
    """Return how many thread blocks run at once: all of them, so that the work is shared out in one wave."""
    if plan.backend == "host":
        return HOST_BLOCKS
    import cupy

    raw = plan.kernel.raw_kernel()
    shared = plan.shape.shared_bytes(plan.config) + raw.shared_size_bytes + 1024
    by_shared = SHARED_BYTES_PER_SM // shared
    by_registers = REGISTERS_PER_SM // (32 * WARPS * raw.num_regs)
    per_sm = max(1, min(by_shared, by_registers))
    return per_sm * cupy.cuda.Device().attributes["MultiProcessorCount"]
