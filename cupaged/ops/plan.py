"""Plans of decode work: how it is shared out over thread blocks, made on the device, reused over layers and steps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from cupaged.config import CacheConfig
from cupaged.errors import UnsupportedError
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import as_backend_array
from cupaged.ops.checks import (
    as_numpy,
    check_cache,
    check_dtype,
    check_shape,
    checked_flag,
    checked_heads,
    checked_integer,
    checked_shared_prefix,
    checked_window,
)
from cupaged.ops.occupancy import device_attribute, dynamic_shared_bytes, resident_blocks, shared_bytes_for_at_most
from cupaged.ops.streams import callers_streams, on_callers_streams
from cupaged.runtime.driver import can_overlap_launches
from cupaged.runtime.launch import CheckedCalls, PreparedLaunch
from cupaged.runtime.select import load_kernel
from cupaged.runtime.source import C_TYPE_OF_DTYPE

__all__ = ["DecodePlan", "PreparedAttention", "plan_decode"]

HOST_BLOCKS = 7  # enough to cut sequences in the middle, few enough to be quick
MERGE_BYTES = 72 * 1024  # what an SM of an H100 reads while parts are merged, some 3 us
PIECE_BYTES = 16 * 1024  # and while a block changes to the next piece
ALONE_SPEED = {2: 0.8, 4: 1.36, 8: 1.75}  # what a block of so many warps reads without company, in an SM's fair shares
NO_WINDOW = 2**31 - 1
NO_CONTEXT = nullcontext()
TALL_TILES_DIM = 64  # of longer rows, registers hold no more than 16 well: at 128 taller tiles take 15 to 25 % longer
PREFIX_ALONE, PREFIX_BEFORE = 1, 2  # values of SHARED_PREFIX, as in kernels_cu/include/shared_prefix.cuh


@dataclass(frozen=True)
class TileShape:
    """What paged_attention_persistent is specialised to besides the cache."""

    rows: int
    warps: int
    stages: int
    chunk: int = 16  # tokens
    blocks_per_sm: int = 1  # at most

    def chunk_bytes(self, config: CacheConfig) -> int:
        """Return the bytes of a chunk in shared memory."""
        return 2 * self.chunk * config.head_dim * config.numpy_dtype.itemsize

    def shared_bytes(self, config: CacheConfig) -> int:
        """Return a block's dynamic shared memory."""
        return self.warps * self.stages * self.chunk_bytes(config)


def tile_shape(config: CacheConfig, rows: int, many: bool, shared: bool = False) -> TileShape:
    """Return rows, warps and stages: about 64 KiB on the way to an SM are enough, and more slow each other down.

    Parameters
    ----------
    config : CacheConfig
        Of the cache.
    rows : int
        Query rows of a KV head.
    many : bool
        Whether there are many head tiles for each SM: then two small blocks on an SM, each busy while the other starts
        or ends a piece, beat a large one.
    shared : bool
        Whether many tiles read the same tokens at about the same time: the taller they are, the fewer times.
    """
    tile_rows = 8 if rows <= 8 else 32 if shared and rows > 16 and config.head_dim <= TALL_TILES_DIM else 16
    if config.head_dim <= 64:
        return TileShape(tile_rows, warps=8, stages=2 if config.head_dim == 64 else 3, chunk=32)
    if config.head_dim > 192:
        return TileShape(tile_rows, 2, 2, blocks_per_sm=2) if many else TileShape(tile_rows, 4, 2)
    return TileShape(tile_rows, 4, 2, blocks_per_sm=2) if many else TileShape(tile_rows, 8, 2)


def attention_kernel(config: CacheConfig, shape: TileShape, backend: str, variants: dict[str, int]) -> Any:
    """Return paged_attention_persistent for a cache, a tile and what a call asks for besides plain decode."""
    defines = {
        "STORAGE": C_TYPE_OF_DTYPE[config.numpy_dtype],
        "HEAD_DIM": config.head_dim,
        "BLOCK_SIZE": config.block_size,
        "ROWS": shape.rows,
        "WARPS": shape.warps,
        "STAGES": shape.stages,
        "CHUNK_TOKENS": shape.chunk,
        **variants,
    }
    return load_kernel("attention/paged_attention_persistent.cu", "paged_attention_persistent", defines, backend)


class DecodePlan:
    """Shares out one step of decode attention; made by `plan_decode`.

    A plan serves every layer of a step, and the next steps after `update`, which runs on the device, reads no length
    back and can be captured in a CUDA graph with the attention calls behind it. The lengths of a call must be those of
    the last `update`, or, without a window, shorter ones: tokens that are not in the plan take no part, which is an
    error where calls are validated.

    A plan has work space: its calls and updates must run one after the other, on one stream or in an order that events
    keep. For several streams make several plans. A graph that captured calls with a plan uses that work space, and
    keeps neither the plan nor the arrays of the calls: keep them for as long as it is replayed. Calls without a plan
    make one, which the graph keeps.

    Attributes
    ----------
    num_seqs, num_heads : int
        What it was made for.
    num_blocks, block_shared_bytes : int
        Thread blocks that the work is shared out over, and the dynamic shared memory that each asks for.
    shared_prefix : int
        Tokens that all sequences share.
    prefix : DecodePlan or None
        Of the launch that reads these for all sequences at once; None: each sequence reads its own.
    overlap : bool
        Whether a call starts while the kernel before it on the stream ends: it waits by itself, and meanwhile fetches
        keys that it will read first into the L2 cache.
    """

    def __init__(
        self,
        cache: KVCache,
        num_seqs: int,
        num_heads: int,
        query_tokens: int = 1,
        window: int | None = None,
        shared_prefix: int = 0,
        shared_by: int = 1,
        overlap: bool = True,
    ) -> None:
        """Make room for a plan; `shared_by` sequences, if several, share the one that it is for, as their prefix."""
        config = cache.config
        self.config, self.backend, self.device = config, cache.backend, cache.device
        self.num_seqs, self.num_heads = num_seqs, num_heads
        self.query_tokens, self.window = query_tokens, window
        self.shared_prefix = shared_prefix
        self.prefix: DecodePlan | None = None
        self.overlap = overlap and can_overlap_launches(cache.backend, cache.device)
        self.defines: dict[str, int] = {"LAUNCH_OVERLAP": int(self.overlap)}  # besides those of a call's variants
        if shared_by > 1:
            self.defines |= {"QUERY_TOKENS": 1, "SHARED_PREFIX": PREFIX_ALONE}
        elif shared_prefix and num_seqs > 1:
            self.defines |= {"SHARED_PREFIX": PREFIX_BEFORE}
            self._plan_prefix(cache)
        rows_of_kv_head = shared_by * query_tokens * num_heads // config.num_kv_heads
        sms = device_attribute(cache.backend, "MultiProcessorCount", HOST_BLOCKS)
        shape = tile_shape(config, rows_of_kv_head, num_seqs * config.num_kv_heads > sms, shared_by > 1)
        self.shape = _fitting(shape, config, cache.backend)
        self.tiles = config.num_kv_heads * -(-rows_of_kv_head // self.shape.rows)
        self.kernel = attention_kernel(config, self.shape, cache.backend, self.defines)
        blocks_per_sm, self.block_shared_bytes = self._residency()
        if self.overlap and self.prefix is not None and self.backend != "host":
            self.prefix._keep_out(self)
        self.num_sms, self.num_blocks = sms, sms * blocks_per_sm
        xp, rows, max_slots = cache.xp, self.shape.rows, 4 * self.num_blocks
        max_pieces = max(self.num_blocks, num_seqs * self.tiles) + max_slots
        self.summary = xp.zeros(2, dtype=np.int32)
        self.pieces = xp.zeros((max_pieces, 8), dtype=np.int32)
        self.ranges = xp.zeros((num_seqs, 2), dtype=np.int32)
        self.order = xp.zeros(num_seqs, dtype=np.int32)
        self.offsets = xp.zeros((num_seqs + 1, 2), dtype=np.int32)
        self.partial_out = xp.empty((max_slots, rows, config.head_dim), dtype=np.float32)
        self.partial_state = xp.empty((max_slots, rows, 2), dtype=np.float32)
        self.arrivals = xp.zeros(1 + max_slots, dtype=np.uint32)
        self.calls = CheckedCalls(cache.backend)  # of paged_attention
        self.updates = CheckedCalls(cache.backend)

    @on_callers_streams
    def prepare(
        self, query: Any, cache: KVCache, block_tables: Any, seq_lens: Any, scale: float | None = None, **options: Any
    ) -> PreparedAttention:
        """Check a call of `paged_attention` with this plan, and return it to be launched as often as need be.

        Parameters
        ----------
        query, cache, block_tables, seq_lens, scale, **options
            As `paged_attention` takes them; without `out`, one array is made here that every launch writes to.

        Returns
        -------
        PreparedAttention
            Called without arguments, it launches on CuPy's current stream (with torch tensors, on torch's), checks
            nothing again and returns what `paged_attention` would. It holds the arrays: what they contain may change
            between launches, lengths too (after `update`). It keeps the kernel that it was made with, also if the
            kernel's file is edited.

        Raises
        ------
        TypeError, ValueError, UnsupportedError
            As `paged_attention` does.
        """
        from cupaged.ops.attention import prepare_attention  # which itself takes plans

        return prepare_attention(self, query, cache, block_tables, seq_lens, scale=scale, **options)

    def _residency(self) -> tuple[int, int]:
        """Return how many thread blocks an SM runs at once, and a block's dynamic shared memory.

        Where calls overlap, that is so much that no block of the plan's next call finds room before one of this leaves:
        it would fetch what it reads first long before its time.
        """
        shape, needed = self.shape, self.shape.shared_bytes(self.config)
        if self.backend == "host":
            return 1, needed
        blocks = min(shape.blocks_per_sm, resident_blocks(self.kernel, 32 * shape.warps, needed))
        if not self.overlap:
            return blocks, needed
        return blocks, max(needed, shared_bytes_for_at_most(blocks, self.kernel))

    def _keep_out(self, follower: DecodePlan) -> None:
        """Let no block of the plan whose calls follow this one's find room before one of this leaves, either."""
        at_once = self.num_blocks // self.num_sms
        enough = shared_bytes_for_at_most(at_once, self.kernel, follower.kernel, follower.block_shared_bytes)
        self.block_shared_bytes = max(self.block_shared_bytes, enough)

    def _plan_prefix(self, cache: KVCache) -> None:
        """Plan the launch for the shared prefix, once, as its length stays; make room for what it finds."""
        xp, rows = cache.xp, self.num_seqs * self.query_tokens * self.num_heads
        self.prefix = DecodePlan(
            cache, 1, self.num_heads, self.query_tokens, shared_by=self.num_seqs, overlap=self.overlap
        )
        self.prefix_lens = xp.full(1, self.shared_prefix, dtype=np.int32)
        self.prefix.update(self.prefix_lens)
        self.prefix_out = xp.empty((rows, self.config.head_dim), dtype=np.float32)
        self.prefix_state = xp.empty((rows, 2), dtype=np.float32)

    @on_callers_streams
    def check_lens(self, seq_lens: Any) -> None:
        """Raise ValueError unless the plan holds every token of these lengths, int32 [num_seqs], that takes part.

        Reads both, and so waits for the device.
        """
        seq_lens = as_backend_array(seq_lens, "seq_lens", self.backend)
        lens, ranges = (as_numpy(array).astype(np.int64) for array in (seq_lens, self.ranges))
        hidden = np.maximum(lens - self.query_tokens, 0) - ((NO_WINDOW if self.window is None else self.window) - 1)
        first = np.maximum(hidden, self.shared_prefix if self.prefix else 0) // self.shape.chunk
        missing = (lens > 0) & ((first < ranges[:, 0]) | (-(-lens // self.shape.chunk) > ranges[:, 1]))
        if missing.any():
            seq = int(np.argmax(missing))
            raise ValueError(
                f"seq_lens must be what the plan was last made for: call plan.update(seq_lens); seq_lens[{seq}] is "
                f"{lens[seq]}, and the plan holds its tokens {ranges[seq, 0] * self.shape.chunk} to "
                f"{ranges[seq, 1] * self.shape.chunk - 1}"
            )

    def update(self, seq_lens: Any) -> None:
        """Share out anew for other lengths, int32 [num_seqs]; returns without waiting for the device."""
        checked = self.updates.find((), (seq_lens,))
        if checked is not None:
            checked.launch(seq_lens)
        else:
            self._checked_update(seq_lens)

    @on_callers_streams
    def _checked_update(self, seq_lens: Any) -> None:
        given = seq_lens
        seq_lens = as_backend_array(seq_lens, "seq_lens", self.backend)
        check_dtype(seq_lens, "seq_lens", np.dtype(np.int32))
        check_shape(seq_lens, "seq_lens", (self.num_seqs,))
        chunks_per_byte = self.num_sms / self.num_blocks / self.shape.chunk_bytes(self.config)
        kernel = load_kernel(
            "attention/plan_decode.cu", "plan_decode", {"CHUNK_TOKENS": self.shape.chunk}, self.backend
        )
        launch = kernel.prepare(
            (1,),
            (1024,),
            summary=self.summary,
            pieces=self.pieces,
            ranges=self.ranges,
            order=self.order,
            offsets=self.offsets,
            seq_lens=seq_lens,
            num_seqs=self.num_seqs,
            tiles=self.tiles,
            query_tokens=self.query_tokens,
            window=NO_WINDOW if self.window is None else self.window,
            prefix=self.shared_prefix if self.prefix else 0,
            blocks=self.num_blocks,
            min_piece=2 * self.shape.warps,
            max_slots=4 * self.num_blocks,
            alone_speed=ALONE_SPEED[self.shape.warps] * self.num_blocks / self.num_sms,
            merge_chunks=MERGE_BYTES * chunks_per_byte,
            piece_chunks=PIECE_BYTES * chunks_per_byte,
        )
        launch()
        self.updates.add((), (given,), launch, ("seq_lens",))


class PreparedAttention:
    """A planned call of `paged_attention` that passed its checks; made by `DecodePlan.prepare`.

    Attributes
    ----------
    launches : sequence of PreparedLaunch
        What a call does, in order; none if there is no query.
    result : array or tuple of array
        What a call returns.
    """

    def __init__(self, launches: Sequence[PreparedLaunch], result: Any, foreign: Sequence[Any] = ()) -> None:
        self.launches = tuple(launches)
        self.result = result
        self._foreign = tuple(foreign)  # arrays of other libraries, by which streams go

    def __call__(self) -> Any:
        """Launch, and return the result: the same arrays each time.

        Raises
        ------
        ValueError
            If another device is current than when it was made.
        """
        with callers_streams(self._foreign) if self._foreign else NO_CONTEXT:
            for launch in self.launches:
                launch()
        return self.result


@on_callers_streams
def plan_decode(
    cache: KVCache,
    seq_lens: Any,
    num_heads: int,
    *,
    query_tokens: int = 1,
    window: int | None = None,
    shared_prefix: int = 0,
    overlap: bool = True,
) -> DecodePlan:
    """Return a plan for decode attention of these lengths.

    Parameters
    ----------
    cache : KVCache
        In float16 or bfloat16, a plain layout, head_dim a multiple of 16.
    seq_lens : array, int32 [num_seqs]
        Lengths on the cache's backend; they are not read back.
    num_heads : int
        Query heads.
    query_tokens, window, shared_prefix : int
        Those of the calls. A plan's shared prefix stays as it is: `DecodePlan.update` is told the whole lengths.
    overlap : bool
        Whether calls start while the kernel before them on the stream ends, where the GPU can: from compute capability
        9.0 and a driver of CUDA 12.3 on. They change nothing before it has ended.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    UnsupportedError
        If tensor cores do not serve the cache, or there is a window besides a shared prefix; the message names it.
    """
    check_cache(cache)
    query_tokens, window = checked_integer(query_tokens, "query_tokens", 1), checked_window(window)
    overlap, num_heads = checked_flag(overlap, "overlap"), checked_heads(num_heads, cache)
    shared_prefix = checked_shared_prefix(shared_prefix, cache.config.block_size, window)
    reason = why_no_tensor_cores(cache)
    if reason:
        raise UnsupportedError(reason)
    lens = as_backend_array(seq_lens, "seq_lens", cache.backend)
    check_shape(lens, "seq_lens", ("num_seqs",))
    plan = DecodePlan(cache, lens.shape[0], num_heads, query_tokens, window, shared_prefix, overlap=overlap)
    plan.update(lens)
    return plan


def why_no_tensor_cores(cache: KVCache, kernel: str = "paged_attention_persistent") -> str | None:
    """Return None if a kernel on tensor cores serves the cache where it lies, else what it does not."""
    config = cache.config
    if cache.backend == "cuda" and _compute_capability(cache.device) < 80:
        return f"{kernel} needs compute capability 8.0"
    if config.dtype == "float32":
        return f"{kernel} takes float16 or bfloat16; the cache is float32"
    if config.head_dim % 16:
        return f"{kernel} takes a head_dim that is a multiple of 16; the cache's is {config.head_dim}"
    if config.layout == "BHDSX" and config.block_size > 1:
        return f"{kernel} takes layouts that keep a token's row together; BHDSX does not"
    return None


@cache
def _compute_capability(device: int) -> int:
    import cupy

    return int(cupy.cuda.Device(device).compute_capability)


def _fitting(shape: TileShape, config: CacheConfig, backend: str) -> TileShape:
    """Return the shape with as few warps less as it takes for a block to fit the device's shared memory."""
    most = dynamic_shared_bytes(backend)
    while shape.shared_bytes(config) > most and shape.warps > 2:
        shape = replace(shape, warps=shape.warps // 2)
    return shape
