"""Attention of new query tokens over a paged context: prompts, chunks of prompts, and tokens of decoding among them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cupaged import layouts
from cupaged.config import CacheConfig
from cupaged.errors import UnsupportedError
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import as_backend_array, check_alignment, empty_for, like_caller
from cupaged.ops.attention import MAX_TOKENS, paged_attention
from cupaged.ops.checks import (
    as_numpy,
    check_block_tables,
    check_cache,
    check_contiguous,
    check_dtype,
    check_query_start,
    check_shape,
    checked_flag,
    checked_heads,
    checked_integer,
    checked_out,
    checked_scale,
    checked_window,
    must_validate,
)
from cupaged.ops.occupancy import device_attribute, dynamic_shared_bytes, resident_blocks
from cupaged.ops.plan import DecodePlan, why_no_tensor_cores
from cupaged.ops.rungs import multiprocessors
from cupaged.ops.streams import on_callers_streams
from cupaged.ops.variants import Variants, checked_of_heads, checked_variants
from cupaged.runtime.arguments import Strided
from cupaged.runtime.driver import can_overlap_launches
from cupaged.runtime.select import load_kernel
from cupaged.runtime.source import C_TYPE_OF_DTYPE

__all__ = ["PrefillPlan", "paged_prefill", "plan_prefill", "why_no_prefill"]

INT32 = np.dtype(np.int32)
NO_WINDOW = 2**31 - 1
TILE_TOKENS = 64  # of context, as in kernels_cu/attention/paged_prefill.cu
STAGES = 2
PIECE_INTS = 12  # of a PrefillPiece
PIECE_SEQ, PIECE_LENS = 0, (1, 4, 5)  # where its sequence stands, and first_token, context, seq_len
HOST_BLOCKS = 3  # enough to cut contexts, few enough for blocks to take several pieces
HOST_L2_BYTES = 64 * 1024  # small, so that heads fall into sections
L2_FRACTION = 1.0  # that keys and values of a section may take: where one ends, blocks run out of long pieces


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


class PrefillPlan:
    """Shares out one step of prefill; made by `plan_prefill`.

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
        config = cache.config
        self.config, self.backend, self.device = config, cache.backend, cache.device
        self.num_seqs, self.total_tokens, self.num_heads = num_seqs, total_tokens, num_heads
        self.causal, self.window = causal, window
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
            a_multiprocessor = resident_blocks(kernel, self.shape.threads, self.shape.shared_bytes(config))
            self.num_blocks = multiprocessors(cache) * a_multiprocessor
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
        kernel = load_kernel("attention/plan_prefill.cu", "plan_prefill", {}, self.backend)
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


@on_callers_streams
def plan_prefill(
    cache: KVCache,
    seq_lens: Any,
    query_start: Any,
    total_tokens: int,
    num_heads: int,
    *,
    causal: bool = True,
    window: int | None = None,
    overlap: bool = True,
) -> PrefillPlan:
    """Return a plan for `paged_prefill` calls with these lengths.

    Parameters
    ----------
    cache : KVCache
        In float16 or bfloat16, a plain layout, head_dim a multiple of 16.
    seq_lens, query_start : array, int32 [num_seqs], [num_seqs + 1]
        On the cache's backend; they are not read back.
    total_tokens : int
        Query tokens of all sequences.
    num_heads : int
        Query heads.
    causal, window
        Those of the calls.
    overlap : bool
        As `plan_decode` takes it.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    UnsupportedError
        If tensor cores do not serve the cache, or there is a window without causality; the message names it.
    """
    check_cache(cache)
    causal, overlap = checked_flag(causal, "causal"), checked_flag(overlap, "overlap")
    window = checked_window(window)
    _check_served(cache, causal, window)
    total_tokens, num_heads = checked_integer(total_tokens, "total_tokens", 1), checked_heads(num_heads, cache)
    lens = as_backend_array(seq_lens, "seq_lens", cache.backend)
    check_shape(lens, "seq_lens", ("num_seqs",))
    plan = PrefillPlan(cache, lens.shape[0], total_tokens, num_heads, causal, window, overlap)
    plan.update(seq_lens, query_start)
    return plan


@on_callers_streams
def paged_prefill(
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    query_start: Any,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    out: Any = None,
    return_lse: bool = False,
    plan: PrefillPlan | DecodePlan | None = None,
    validate: bool | None = None,
) -> Any:
    """Attend with the new tokens of each sequence, any number, over its keys and values in a paged cache.

    The new tokens are a sequence's last: the last of them stands at position ``seq_len - 1``. Their own keys and values
    are in the cache by now (`append_kv`). What the logits are, `paged_attention` says.

    Parameters
    ----------
    query : array, [total_tokens, H, D]
        New tokens of all sequences, one sequence behind the other, in the cache's dtype; H a multiple of the cache's KV
        heads: query head h reads KV head ``h // (H // Hkv)``.
    cache : KVCache
        Keys and values, in any layout but BHDSX.
    block_tables : array, int32 [num_seqs, max_blocks]
        Block ids of each sequence in order. -1 marks an unmapped block, whose tokens take no part. Entries past a
        sequence's last block are never followed, nor those of blocks that lie before every window.
    seq_lens : array, int32 [num_seqs]
        Tokens with keys and values in the cache, the new ones included. A new token at a position below 0 sees nothing:
        output 0 and log-sum-exp -inf, or its head's sink where there are sinks.
    query_start : array, int32 [num_seqs + 1]
        Where each sequence's new tokens begin in `query`; from 0 to total_tokens. A sequence may have none,
        but with a plan from `plan_decode`.
    scale : float, optional
        Factor of the logits; ``1 / sqrt(D)`` if not given.
    causal : bool
        Whether a token sees the tokens up to its own only, or all of its sequence's.
    window, softcap, alibi_slopes, sinks
        As `paged_attention` takes them; a window only with `causal`.
    out : array, of the query's shape, optional
        Where to write the result; it shares no memory with any other argument.
    return_lse : bool
        Also return the log-sum-exp of each token's and head's logits, the sink among them.
    plan : PrefillPlan or DecodePlan, optional
        How to share the work out, from `plan_prefill` for lengths and starts as they are; without it each call plans
        for itself. Where every sequence has the same few new tokens, as in speculative decoding, a plan from
        `plan_decode` for so many `query_tokens` has the decode kernel answer, which is quicker for them; what
        `query_start` says is then only read to check it.
    validate : bool, optional
        Read `block_tables`, `seq_lens` and `query_start` and check them, which on a GPU waits for it. The default
        reads them on the host backend only, or everywhere if CUPAGED_VALIDATE is set to 1.

    Returns
    -------
    out : array, [total_tokens, H, D]
        Of the kind and dtype of `query`.
    lse : array, float32 [total_tokens, H]
        Natural logarithm; only with `return_lse`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; nothing was launched.
    UnsupportedError
        If tensor cores do not serve the cache, or there is a window without causality, or a plan from `plan_decode`
        without it or with a shared prefix; the message names it.

    References
    ----------
    .. [1] Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv 2307.08691.
    """
    caller = query
    check_cache(cache)
    causal, return_lse = checked_flag(causal, "causal"), checked_flag(return_lse, "return_lse")
    window = checked_window(window)
    if not isinstance(plan, DecodePlan):  # whose kernel asks for less shared memory
        _check_served(cache, causal, window)
    query, block_tables, seq_lens, query_start = _checked_arrays(query, cache, block_tables, seq_lens, query_start)
    config, (total_tokens, num_heads, head_dim) = cache.config, query.shape
    num_seqs, must_read = seq_lens.shape[0], must_validate(validate, cache.backend)
    options = {"window": window, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks}
    if out is None:
        result = empty_for(caller, query.shape, query.dtype, cache.backend)
    else:
        result = checked_out(
            out, query, cache, block_tables=block_tables, seq_lens=seq_lens, query_start=query_start,
            **checked_of_heads(query, cache.backend, alibi_slopes, sinks),
        )  # fmt: skip
    lse = None
    if isinstance(plan, DecodePlan):
        _check_few(plan, query_start, total_tokens, causal, must_read)
        rows = (num_seqs, plan.query_tokens, num_heads)
        few, into = query.reshape(*rows, head_dim), result.reshape(*rows, head_dim)
        common = {"out": into, "return_lse": return_lse, "plan": plan, "validate": validate}
        answer = paged_attention(few, cache, block_tables, seq_lens, scale, **options, **common)
        if return_lse:
            lse = answer[1].reshape(total_tokens, num_heads)
    else:
        scale = checked_scale(scale, head_dim)
        capacity = block_tables.shape[1] * config.block_size
        variants = checked_variants(query, cache.backend, capacity, **options)
        if return_lse:
            lse = empty_for(caller, query.shape[:-1], np.float32, cache.backend)
        if plan is not None:
            _check_plan(plan, cache, num_seqs, total_tokens, num_heads, causal, variants.window, capacity)
        if must_read:
            check_query_start(query_start, total_tokens)
            new_tokens = np.diff(as_numpy(query_start).astype(np.int64))
            check_block_tables(cache, block_tables, seq_lens, new_tokens, variants.window)
            if plan is not None:
                plan.check_lens(seq_lens, query_start)
        if query.size:
            if plan is None:
                plan = PrefillPlan(cache, num_seqs, total_tokens, num_heads, causal, variants.window)
                plan.update(seq_lens, query_start)
            _launch(result, lse, query, cache, block_tables, scale, variants, plan)
    returned = like_caller(result, caller) if out is None else out
    return (returned, like_caller(lse, caller)) if return_lse else returned


def _launch(
    out: Any,
    lse: Any,
    query: Any,
    cache: KVCache,
    block_tables: Any,
    scale: float,
    variants: Variants,
    plan: PrefillPlan,
) -> None:
    config = cache.config
    strides = layouts.kv_strides(config, "key")  # the values' too, in the layouts that are served
    arguments = variants.arguments
    del arguments["query_tokens"]  # which are each sequence's own
    kernel = prefill_kernel(config, plan.shape, cache.backend, {**plan.defines, **variants.defines})
    kernel(
        (plan.num_blocks,),
        (plan.shape.threads,),
        shared_bytes=plan.shape.shared_bytes(config),
        out=out,
        lse=lse,
        partial_out=plan.partial_out,
        partial_state=plan.partial_state,
        arrivals=plan.arrivals,
        query=query,
        key_cache=Strided(cache.key),
        value_cache=Strided(cache.value),
        block_tables=block_tables,
        summary=plan.summary,
        pieces=plan.pieces,
        scale=scale,
        num_kv_heads=config.num_kv_heads,
        max_blocks=block_tables.shape[1],
        block_stride=strides.block,
        head_stride=strides.head,
        slot_stride=strides.slot,
        **arguments,
    )


def prefill_kernel(config: CacheConfig, shape: PrefillShape, backend: str, variants: dict[str, int]) -> Any:
    """Return paged_prefill for a cache, a shape, and what a call asks for."""
    defines = {
        "STORAGE": C_TYPE_OF_DTYPE[config.numpy_dtype],
        "HEAD_DIM": config.head_dim,
        "BLOCK_SIZE": config.block_size,
        "ROW_WARPS": shape.row_warps,
        "TOKEN_WARPS": shape.token_warps,
        "WARP_ROWS": shape.warp_rows,
        "HELD_STEPS": shape.held_steps,
        "BLOCKS_PER_SM": shape.blocks_per_sm,
        **variants,
    }
    return load_kernel("attention/paged_prefill.cu", "paged_prefill", defines, backend)


def _check_served(cache: KVCache, causal: bool, window: int | None) -> None:
    reason = why_no_prefill(cache)
    if reason:
        raise UnsupportedError(reason)
    if window is not None and not causal:
        raise UnsupportedError(f"window must be left out where causal is False; got window {window}")


def _checked_arrays(
    query: Any, cache: KVCache, block_tables: Any, seq_lens: Any, query_start: Any
) -> tuple[Any, Any, Any, Any]:
    """Return queries, tables, lengths and starts as the backend's own arrays, or raise by name."""
    named = {"query": query, "block_tables": block_tables, "seq_lens": seq_lens, "query_start": query_start}
    arrays = {name: as_backend_array(array, name, cache.backend) for name, array in named.items()}
    config, query = cache.config, arrays["query"]
    check_dtype(query, "query", config.numpy_dtype)
    check_shape(query, "query", ("total_tokens", "H", config.head_dim))
    num_heads = query.shape[1]
    if num_heads == 0 or num_heads % config.num_kv_heads:
        raise ValueError(
            f"query must have a number of heads that is a multiple of the cache's {config.num_kv_heads} KV heads; "
            f"got {num_heads}"
        )
    for name in ("block_tables", "seq_lens", "query_start"):
        check_dtype(arrays[name], name, INT32)
    check_shape(arrays["block_tables"], "block_tables", ("num_seqs", "max_blocks"))
    num_seqs, max_blocks = arrays["block_tables"].shape
    check_shape(arrays["seq_lens"], "seq_lens", (num_seqs,))
    check_shape(arrays["query_start"], "query_start", (num_seqs + 1,))
    for name, array in arrays.items():
        check_contiguous(array, name)
    if query.size:
        check_alignment(query, "query")
    if query.shape[0] * num_heads > 2**31 - 1:
        raise UnsupportedError(
            f"query must have at most 2**31 - 1 (query token, head) pairs; got {query.shape[0] * num_heads}"
        )
    if max_blocks * config.block_size > MAX_TOKENS:
        raise UnsupportedError(
            f"block_tables must map at most {MAX_TOKENS} tokens a sequence; got {max_blocks} blocks "
            f"of {config.block_size}"
        )
    return arrays["query"], arrays["block_tables"], arrays["seq_lens"], arrays["query_start"]


def _check_plan(
    plan: PrefillPlan,
    cache: KVCache,
    num_seqs: int,
    total_tokens: int,
    num_heads: int,
    causal: bool,
    window: int | None,
    capacity: int,
) -> None:
    if not isinstance(plan, PrefillPlan):
        raise TypeError(f"plan must be a PrefillPlan or a DecodePlan; got {type(plan).__name__}")
    planned_window = None if plan.window is None or plan.window >= capacity else plan.window  # as for the call
    for name, planned, given in (
        ("backend", plan.backend, cache.backend),
        ("device", plan.device, cache.device),
        ("number of sequences", plan.num_seqs, num_seqs),
        ("number of query tokens", plan.total_tokens, total_tokens),
        ("number of query heads", plan.num_heads, num_heads),
        ("causality", plan.causal, causal),
        ("window", planned_window, window),
        ("cache", replace(plan.config, num_blocks=1), replace(cache.config, num_blocks=1)),
    ):
        if planned != given:
            raise ValueError(f"plan must be made for the same {name}: it is for {planned}, the call has {given}")


def _check_few(plan: DecodePlan, query_start: Any, total_tokens: int, causal: bool, validate: bool) -> None:
    """Raise unless every sequence of a call has the new tokens that a plan for decoding is made for."""
    if not causal:
        raise UnsupportedError("causal must be True where plan is a DecodePlan; got False")
    if plan.shared_prefix:
        raise UnsupportedError(f"plan must be for no shared prefix; it is for one of {plan.shared_prefix} tokens")
    num_seqs, new = plan.num_seqs, plan.query_tokens
    if query_start.shape[0] - 1 != num_seqs or total_tokens != num_seqs * new:
        raise ValueError(
            f"plan must be made for the same new tokens: it is for {new} of each of {num_seqs} sequences, the call has "
            f"{total_tokens} of {query_start.shape[0] - 1}"
        )
    if validate and (as_numpy(query_start) != np.arange(num_seqs + 1) * new).any():
        raise ValueError(
            f"query_start must give every sequence the {new} new tokens that plan is made for; "
            f"got {as_numpy(query_start).tolist()[:8]}"
        )


def _fitting(shape: PrefillShape, config: CacheConfig, most: int) -> PrefillShape:
    """Return the shape with as few warps less as it takes for a block to fit into `most` bytes of shared memory."""
    while shape.shared_bytes(config) > most and shape.row_warps > 1:
        shape = replace(shape, row_warps=shape.row_warps // 2)
    return shape


def why_no_prefill(cache: KVCache) -> str | None:
    """Return None if paged_prefill serves the cache where it lies, else what it does not."""
    reason = why_no_tensor_cores(cache, "paged_prefill")
    needed, most = PrefillShape(1, 1, 16, 0, 1).shared_bytes(cache.config), dynamic_shared_bytes(cache.backend)
    if reason is None and needed > most:
        reason = (
            f"paged_prefill needs {needed} bytes of shared memory for a head_dim of {cache.config.head_dim}; this "
            f"device gives a block {most}"
        )
    return reason
