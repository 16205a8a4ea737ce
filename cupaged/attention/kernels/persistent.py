"""paged_attention_persistent: work shared out over thread blocks by a plan, which is made on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cupaged.attention.call import AttentionCall
from cupaged.attention.kernel import Kernel, Launch, Serves, cache_arguments, load, row_defines
from cupaged.attention.logits import LOGITS_OPTIONS
from cupaged.attention.mask import MASK_OPTIONS
from cupaged.attention.plans import Plan
from cupaged.config import CacheConfig
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import as_backend_array
from cupaged.ops.checks import as_numpy, check_dtype, check_shape
from cupaged.ops.streams import on_callers_streams
from cupaged.runtime.device import (
    device_attribute,
    dynamic_shared_bytes,
    resident_blocks,
    shared_bytes_for_at_most,
)
from cupaged.runtime.driver import can_overlap_launches
from cupaged.runtime.info import KernelInfo
from cupaged.runtime.launch import CheckedCalls
from cupaged.runtime.select import load_kernel

__all__ = ["PERSISTENT", "DecodeShares", "TileShape", "tile_shape"]

HOST_BLOCKS = 7  # enough to cut sequences in the middle, few enough to be quick
MERGE_BYTES = 72 * 1024  # what an SM of an H100 reads while parts are merged, some 3 us
PIECE_BYTES = 16 * 1024  # and while a block changes to the next piece
ALONE_SPEED = {2: 0.8, 4: 1.36, 8: 1.75}  # what a block of so many warps reads without company, in an SM's fair shares
NO_WINDOW = 2**31 - 1
TALL_TILES_DIM = 64  # of longer rows, registers hold no more than 16 well: at 128 taller tiles take 15 to 25 % longer
PREFIX_ALONE, PREFIX_BEFORE = 1, 2  # values of SHARED_PREFIX, as in kernels_cu/include/shared_prefix.cuh

INFO = KernelInfo(
    "paged_attention_persistent",
    "attention/paged_attention_persistent.cu",
    "tensor cores, copies that are always under way, and work shared out in chunks of tokens",
    Serves(
        ("float16", "bfloat16"),
        range(32, 257, 16),
        whole_rows=True,
        mask=MASK_OPTIONS,
        logits=LOGITS_OPTIONS,
        shared_prefix=True,
        capability=80,
    ),
    rounds_weights=True,
)
PLANNER = KernelInfo(
    "plan_decode",
    "attention/plan_decode.cu",
    "shares decode work out over thread blocks, on the device, from lengths that the host need not know",
    "what paged_attention_persistent serves",
)


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


def attention_kernel(config: CacheConfig, shape: TileShape, backend: str, asked: dict[str, int]) -> Any:
    """Return the kernel for a cache, a tile and what a call asks for besides plain decode."""
    of_shape = {"ROWS": shape.rows, "WARPS": shape.warps, "STAGES": shape.stages, "CHUNK_TOKENS": shape.chunk}
    return load(INFO, {**row_defines(config), **of_shape, **asked}, backend)


class DecodeShares(Plan):
    """What `cupaged.DecodePlan` is, all but that it prepares calls."""

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
        super().__init__(cache, window)
        config = cache.config
        self.num_seqs, self.num_heads, self.query_tokens = num_seqs, num_heads, query_tokens
        self.shared_prefix = shared_prefix
        self.prefix: DecodeShares | None = None
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
        self.updates = CheckedCalls(cache.backend)

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

    def _keep_out(self, follower: DecodeShares) -> None:
        """Let no block of the plan whose calls follow this one's find room before one of this leaves, either."""
        at_once = self.num_blocks // self.num_sms
        enough = shared_bytes_for_at_most(at_once, self.kernel, follower.kernel, follower.block_shared_bytes)
        self.block_shared_bytes = max(self.block_shared_bytes, enough)

    def _plan_prefix(self, cache: KVCache) -> None:
        """Plan the launch for the shared prefix, once, as its length stays; make room for what it finds."""
        xp, rows = cache.xp, self.num_seqs * self.query_tokens * self.num_heads
        self.prefix = DecodeShares(
            cache, 1, self.num_heads, self.query_tokens, shared_by=self.num_seqs, overlap=self.overlap
        )
        self.prefix_lens = xp.full(1, self.shared_prefix, dtype=np.int32)
        self.prefix.update(self.prefix_lens)
        self.prefix_out = xp.empty((rows, self.config.head_dim), dtype=np.float32)
        self.prefix_state = xp.empty((rows, 2), dtype=np.float32)

    def made_for(self, call: AttentionCall) -> list[tuple[str, Any, Any]]:
        """Return what must be the same as in a call."""
        return [
            ("number of sequences", self.num_seqs, call.query.shape[0]),
            ("number of query heads", self.num_heads, call.num_heads),
            ("number of query tokens", self.query_tokens, call.mask.query_tokens),
            ("shared prefix", self.shared_prefix, call.mask.shared_prefix),
        ]

    def check_contents(self, call: AttentionCall) -> None:
        """Raise ValueError unless the plan holds every token of a call."""
        self.check_lens(call.pages.seq_lens)

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
        kernel = load_kernel(PLANNER.file, PLANNER.name, {"CHUNK_TOKENS": self.shape.chunk}, self.backend)
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


class Persistent(Kernel):
    """As many thread blocks as run at once, each with its share of all chunks of tokens."""

    info = INFO
    helpers = (PLANNER,)
    because = "tensor cores serve it, and up to 16 query rows share each read"
    takes_plan = True

    def plan(self, call: AttentionCall) -> DecodeShares:
        """Return a plan for one call."""
        mask = call.mask
        plan = DecodeShares(
            call.cache, call.num_seqs, call.num_heads, mask.query_tokens or 1, mask.window, mask.shared_prefix
        )
        plan.update(call.pages.seq_lens)
        return plan

    def prepare(self, call: AttentionCall, plan: DecodeShares) -> list[Launch]:
        """Return the launches: for a shared prefix first, without the sinks, which count once."""
        if plan.prefix is None:
            of_prefix = {"prefix_out": None, "prefix_state": None, "prefix_tokens": 0}
            return [_planned_launch(call, plan, of_prefix)]
        of_prefix = {
            "prefix_out": plan.prefix_out,
            "prefix_state": plan.prefix_state,
            "prefix_tokens": plan.shared_prefix,
        }
        alone = replace(call, lse=None, logits=replace(call.logits, sinks=None))
        return [_planned_launch(alone, plan.prefix, of_prefix), _planned_launch(call, plan, of_prefix)]


def _planned_launch(call: AttentionCall, plan: DecodeShares, of_prefix: dict[str, Any]) -> Launch:
    config = call.config
    kernel = attention_kernel(config, plan.shape, call.cache.backend, {**plan.defines, **call.defines})
    arguments = {
        **cache_arguments(call, packs=False),
        "partial_out": plan.partial_out,
        "partial_state": plan.partial_state,
        "arrivals": plan.arrivals,
        "summary": plan.summary,
        "pieces": plan.pieces,
        "num_kv_heads": config.num_kv_heads,
        "num_blocks": config.num_blocks,
        **call.mask.arguments,
        **call.logits.arguments,
        **of_prefix,
        "num_seqs": call.num_seqs,
    }
    return Launch(kernel, (plan.num_blocks,), (32 * plan.shape.warps,), arguments, plan.block_shared_bytes)


PERSISTENT = Persistent()


def _fitting(shape: TileShape, config: CacheConfig, backend: str) -> TileShape:
    """Return the shape with as few warps less as it takes for a block to fit the device's shared memory."""
    most = dynamic_shared_bytes(backend)
    while shape.shared_bytes(config) > most and shape.warps > 2:
        shape = replace(shape, warps=shape.warps // 2)
    return shape
