"""paged_prefill: many new tokens of each sequence, on tensor cores, shared out by a plan that is made on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cupaged import layouts
from cupaged.attention.call import QUERY_START, AttentionCall
from cupaged.attention.kernel import Kernel, Launch, Serves, load, row_defines
from cupaged.attention.logits import LOGITS_OPTIONS
from cupaged.attention.plans import Plan
from cupaged.config import CacheConfig
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import as_backend_array
from cupaged.ops.checks import (
    as_numpy,
    check_contiguous,
    check_dtype,
    check_query_start,
    check_shape,
    must_validate,
)
from cupaged.ops.streams import on_callers_streams
from cupaged.runtime.arguments import Strided
from cupaged.runtime.device import device_attribute, dynamic_shared_bytes, multiprocessors, resident_blocks
from cupaged.runtime.driver import can_overlap_launches
from cupaged.runtime.info import KernelInfo
from cupaged.runtime.select import load_kernel

__all__ = ["PREFILL", "PrefillPlan", "PrefillShape", "prefill_shape"]

INT32 = np.dtype(np.int32)
NO_WINDOW = 2**31 - 1
TILE_TOKENS = 64  # of context, as in kernels_cu/attention/paged_prefill.cu
STAGES = 2
PIECE_INTS = 12  # of a PrefillPiece
PIECE_SEQ, PIECE_LENS = 0, (1, 4, 5)  # where its sequence stands, and first_token, context, seq_len
HOST_BLOCKS = 3  # enough to cut contexts, few enough for blocks to take several pieces
HOST_L2_BYTES = 64 * 1024  # small, so that heads fall into sections
L2_FRACTION = 1.0  # that keys and values of a section may take: where one ends, blocks run out of long pieces

INFO = KernelInfo(
    "paged_prefill",
    "attention/paged_prefill.cu",
    "new tokens of any number over a paged context: tiles of rows on tensor cores, tiles of tokens copied ahead",
    Serves(
        ("float16", "bfloat16"),
        range(32, 257, 16),
        whole_rows=True,
        queries=frozenset({QUERY_START}),
        mask=frozenset({"window"}),
        logits=LOGITS_OPTIONS,
        capability=80,
    ),
    rounds_weights=True,
)
PLANNER = KernelInfo(
    "plan_prefill",
    "attention/plan_prefill.cu",
    "shares prefill work out over thread blocks, on the device, the longest pieces first",
    "what paged_prefill serves",
)


@dataclass(frozen=True)
class PrefillShape:
    """What paged_prefill is specialised to besides the cache and the variants.

    Attributes
    ----------
    row_warps, token_warps : int
        Warps that share a tile's rows, and its tokens.
    warp_rows : int
        Query rows of a warp, 16 or 32.
    held_steps : int
        Of the query, tiles of 16 dimensions that stay in registers.
    blocks_per_sm : int
        That registers leave room for.
    """

    row_warps: int
    token_warps: int
    warp_rows: int
    held_steps: int
    blocks_per_sm: int

    @property
    def rows(self) -> int:
        """Query rows of a tile."""
        return self.row_warps * self.warp_rows

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.row_warps * self.token_warps

    @property
    def uncut(self) -> float:
        """Shares of the whole work, one a block, up to which a piece is left whole: parts of many rows cost memory."""
        return 0.5 if self.token_warps > 1 else 1.25

    @property
    def parts_a_share(self) -> float:
        """How finely others are cut."""
        return 3.0 if self.token_warps > 1 else 2.0

    def shared_bytes(self, config: CacheConfig) -> int:
        """Return a block's dynamic shared memory: query rows, and stages of keys and values."""
        rows = self.rows + 2 * STAGES * TILE_TOKENS
        return rows * config.head_dim * config.numpy_dtype.itemsize


def prefill_shape(config: CacheConfig, rows: float) -> PrefillShape:
    """Return the shape for a cache, and so many query rows of a KV head that a sequence has on average.

    Few rows share the tokens of a tile; of many, each warp has rows of its own. 32 rows a warp halve what is read from
    shared memory, which else is the bottleneck; beyond D = 128 registers hold 16.
    """
    long_rows = config.head_dim > 128
    if rows <= 16:
        return PrefillShape(1, 4, 16, 0, 1 if config.head_dim > 192 else 2 if long_rows else 3)
    if rows <= 64:
        return PrefillShape(4, 1, 16, 0, 1 if long_rows else 2)
    if long_rows:
        return PrefillShape(8, 1, 16, 0, 1)
    return PrefillShape(4, 1, 32, config.head_dim // 16 if config.head_dim <= 64 else 0, 2)


class PrefillPlan(Plan):
    """Shares out one step of prefill; made by `cupaged.plan_prefill`.

    A plan serves every layer of a step, and later steps with as many sequences and query tokens after `update`, which
    runs on the device and can be captured in a CUDA graph with the calls behind it. It has work space: its calls and
    updates must run one after the other, and it must be kept for as long as a graph is replayed that captured them.

    Attributes
    ----------
    num_seqs, total_tokens, num_heads : int
        What it was made for.
    causal, window
        Those of the calls.
    num_blocks : int
        Thread blocks that the work is shared out over.
    overlap : bool
        Whether a call starts while the kernel before it on the stream ends; it waits by itself.
    """

    def __init__(
        self,
        cache: KVCache,
        num_seqs: int,
        total_tokens: int,
        num_heads: int,
        causal: bool = True,
        window: int | None = None,
        overlap: bool = True,
    ) -> None:
        super().__init__(cache, window)
        config, self.causal = cache.config, causal
        self.num_seqs, self.total_tokens, self.num_heads = num_seqs, total_tokens, num_heads
        self.group = num_heads // config.num_kv_heads
        self.overlap = overlap and can_overlap_launches(cache.backend, cache.device)
        self.defines = {  # besides those of a call's variants
            "GROUP": self.group,
            "CAUSAL": int(causal),
            "LAUNCH_OVERLAP": int(self.overlap),
        }
        rows = total_tokens * self.group
        best = prefill_shape(config, rows / max(1, num_seqs))
        self.shape = _fitting(best, config, dynamic_shared_bytes(cache.backend))
        self.num_blocks = HOST_BLOCKS
        if cache.backend == "cuda":
            kernel = prefill_kernel(config, self.shape, cache.backend, self.defines)
            blocks_per_sm = resident_blocks(kernel, self.shape.threads, self.shape.shared_bytes(config))
            self.num_blocks = multiprocessors(cache.backend, cache.device) * blocks_per_sm
        max_slots = int(self.shape.parts_a_share * self.num_blocks)
        max_pieces = -(-rows // self.shape.rows) + num_seqs + max_slots // config.num_kv_heads + 1
        xp = cache.xp
        self.summary = xp.zeros(2, dtype=np.int32)
        self.pieces = xp.empty((max_pieces, PIECE_INTS), dtype=np.int32)
        self.partial_out = xp.empty((max_slots, self.shape.rows, config.head_dim), dtype=np.float32)
        self.partial_state = xp.empty((max_slots, self.shape.rows, 2), dtype=np.float32)
        self.arrivals = xp.zeros(1 + max_slots, dtype=np.uint32)
        l2_bytes = device_attribute(cache.backend, "L2CacheSize", HOST_L2_BYTES)
        bytes_of_token = config.bytes_per_token // config.num_kv_heads
        # where a sequence has one tile of rows, nobody reads its tokens again: all heads of a token are read together
        self.cached_tokens = NO_WINDOW if self.shape.token_warps > 1 else int(L2_FRACTION * l2_bytes / bytes_of_token)

    @on_callers_streams
    def update(self, seq_lens: Any, query_start: Any) -> None:
        """Share out anew for other lengths and starts, int32 [num_seqs] and [num_seqs + 1]; waits for nothing."""
        seq_lens, query_start = (
            as_backend_array(array, name, self.backend)
            for array, name in ((seq_lens, "seq_lens"), (query_start, "query_start"))
        )
        for array, name, size in (
            (seq_lens, "seq_lens", self.num_seqs),
            (query_start, "query_start", self.num_seqs + 1),
        ):
            check_dtype(array, name, INT32)
            check_shape(array, name, (size,))
            check_contiguous(array, name)
        if must_validate(None, self.backend):
            check_query_start(query_start, self.total_tokens)
        kernel = load_kernel(PLANNER.file, PLANNER.name, {}, self.backend)
        kernel(
            (1,),
            (1024,),
            summary=self.summary,
            pieces=self.pieces,
            seq_lens=seq_lens,
            query_start=query_start,
            num_seqs=self.num_seqs,
            total_tokens=self.total_tokens,
            num_kv_heads=self.config.num_kv_heads,
            group=self.group,
            rows=self.shape.rows,
            tile_tokens=TILE_TOKENS,
            causal=int(self.causal),
            window=NO_WINDOW if self.window is None else self.window,
            blocks=self.num_blocks,
            uncut=self.shape.uncut,
            parts_a_share=self.shape.parts_a_share,
            min_part=8 if self.backend == "cuda" else 1,
            cached_tokens=self.cached_tokens,
        )

    def made_for(self, call: AttentionCall) -> list[tuple[str, Any, Any]]:
        """Return what must be the same as in a call."""
        return [
            ("number of sequences", self.num_seqs, call.num_seqs),
            ("number of query tokens", self.total_tokens, call.query.shape[0]),
            ("number of query heads", self.num_heads, call.num_heads),
            ("causality", self.causal, call.mask.causal),
        ]

    def check_contents(self, call: AttentionCall) -> None:
        """Raise ValueError unless the plan was last made for a call's lengths and starts."""
        self.check_lens(call.pages.seq_lens, call.pages.query_start)

    @on_callers_streams
    def check_lens(self, seq_lens: Any, query_start: Any) -> None:
        """Raise ValueError unless the plan was last made for these lengths and starts, which are those of a call.

        Reads them and the plan, and so waits for the device.
        """
        lens, starts = (
            as_numpy(as_backend_array(array, name, self.backend)).astype(np.int64)
            for array, name in ((seq_lens, "seq_lens"), (query_start, "query_start"))
        )
        pieces = as_numpy(self.pieces)[: int(as_numpy(self.summary)[0])].astype(np.int64)
        seq, first_token, context, seq_len = pieces[:, PIECE_SEQ], *(pieces[:, i] for i in PIECE_LENS)
        new_tokens = np.zeros_like(lens)
        new_tokens[seq] = seq_len - context + 1
        same = np.array_equal(new_tokens, np.diff(starts))
        if not (same and np.array_equal(seq_len, lens[seq]) and np.array_equal(first_token, starts[seq])):
            raise ValueError(
                "seq_lens and query_start must be what the plan was last made for: call plan.update(seq_lens, "
                f"query_start); got seq_lens {lens.tolist()[:8]} and query_start {starts.tolist()[:8]}"
            )


class Prefill(Kernel):
    """Tiles of query rows, each against tiles of its sequence's tokens."""

    info = INFO
    helpers = (PLANNER,)
    because = "tensor cores serve it"
    takes_plan = True

    def why_not_cache(self, cache: KVCache) -> str | None:
        """Return None if the cache is served where it lies, and a block has shared memory enough."""
        limit = super().why_not_cache(cache)
        needed, most = PrefillShape(1, 1, 16, 0, 1).shared_bytes(cache.config), dynamic_shared_bytes(cache.backend)
        if limit is None and needed > most:
            limit = (
                f"{INFO.name} needs {needed} bytes of shared memory for a head_dim of {cache.config.head_dim}; this "
                f"device gives a block {most}"
            )
        return limit

    def plan(self, call: AttentionCall) -> PrefillPlan:
        """Return a plan for one call."""
        mask, total_tokens = call.mask, call.query.shape[0]
        plan = PrefillPlan(call.cache, call.num_seqs, total_tokens, call.num_heads, mask.causal, mask.window)
        plan.update(call.pages.seq_lens, call.pages.query_start)
        return plan

    def prepare(self, call: AttentionCall, plan: PrefillPlan) -> list[Launch]:
        """Return the one launch."""
        config = call.config
        strides = layouts.kv_strides(config, "key")  # the values' too, in the layouts that are served
        kernel = prefill_kernel(config, plan.shape, call.cache.backend, {**plan.defines, **call.defines})
        arguments = {
            "out": call.out,
            "lse": call.lse,
            "partial_out": plan.partial_out,
            "partial_state": plan.partial_state,
            "arrivals": plan.arrivals,
            "query": call.query,
            "key_cache": Strided(call.cache.key),
            "value_cache": Strided(call.cache.value),
            "block_tables": call.pages.block_tables,
            "summary": plan.summary,
            "pieces": plan.pieces,
            "scale": call.logits.scale,
            "num_kv_heads": config.num_kv_heads,
            "max_blocks": call.max_blocks,
            "block_stride": strides.block,
            "head_stride": strides.head,
            "slot_stride": strides.slot,
            **call.mask.arguments,
            **call.logits.arguments,
        }
        shared_bytes = plan.shape.shared_bytes(config)
        return [Launch(kernel, (plan.num_blocks,), (plan.shape.threads,), arguments, shared_bytes)]


def prefill_kernel(config: CacheConfig, shape: PrefillShape, backend: str, asked: dict[str, int]) -> Any:
    """Return the kernel for a cache, a shape, and what a call asks for."""
    of_shape = {
        "ROW_WARPS": shape.row_warps,
        "TOKEN_WARPS": shape.token_warps,
        "WARP_ROWS": shape.warp_rows,
        "HELD_STEPS": shape.held_steps,
        "BLOCKS_PER_SM": shape.blocks_per_sm,
    }
    return load(INFO, {**row_defines(config), **of_shape, **asked}, backend)


PREFILL = Prefill()


def _fitting(shape: PrefillShape, config: CacheConfig, most: int) -> PrefillShape:
    """Return the shape with as few warps less as it takes for a block to fit into `most` bytes of shared memory."""
    while shape.shared_bytes(config) > most and shape.row_warps > 1:
        shape = replace(shape, row_warps=shape.row_warps // 2)
    return shape
