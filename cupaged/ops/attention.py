"""Decode attention over a paged cache: one query token a sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cupaged import layouts
from cupaged.errors import UnsupportedError
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import as_backend_array, check_alignment, like_caller
from cupaged.ops.checks import (
    check_block_tables,
    check_cache,
    check_contiguous,
    check_dtype,
    check_query_to_seq,
    check_shape,
    must_validate,
)
from cupaged.ops.plan import WARPS, DecodePlan, plan_decode, why_no_tensor_cores
from cupaged.ops.registry import ATTENTION_KERNELS, kernels
from cupaged.ops.rungs import RUNGS, launch_batched
from cupaged.runtime.arguments import Strided
from cupaged.runtime.select import load_kernel
from cupaged.runtime.source import C_TYPE_OF_DTYPE

__all__ = ["Choice", "choose_kernel", "explain", "paged_attention"]

INT32 = np.dtype(np.int32)
MAX_TOKENS = 2**31 - 2**16  # of a sequence: a kernel's int may run past the last token by what it reads at once
V1_THREADS = 128
V1_FILLS_A_GPU = 1024  # (sequence, head) pairs, several thread blocks for each SM of the largest GPUs
V1_STRETCH_TOKENS = 4096  # 16 KiB of logits: several thread blocks fit an SM, and few contexts need a second stretch


@dataclass(frozen=True)
class Choice:
    """Which kernel runs, and why."""

    kernel: str
    reason: str


def paged_attention(
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    scale: float | None = None,
    kernel: str = "auto",
    *,
    out: Any = None,
    return_lse: bool = False,
    plan: DecodePlan | None = None,
    query_to_seq: Any = None,
    validate: bool | None = None,
) -> Any:
    """Attend with one query token per sequence over keys and values in a paged cache.

    Parameters
    ----------
    query : array, [num_seqs, H, D]
        In the cache's dtype; H a multiple of the cache's KV heads: query head h reads KV head ``h // (H // Hkv)``.
    cache : KVCache
        Keys and values.
    block_tables : array, int32 [num_seqs, max_blocks]
        Block ids of each sequence in order. -1 marks an unmapped block, whose tokens take no part. Entries past a
        sequence's last block are never read.
    seq_lens : array, int32 [num_seqs]
        Tokens with keys and values in the cache, the query's own included. 0 gives output 0 and log-sum-exp -inf.
    scale : float, optional
        Factor of the logits; ``1 / sqrt(D)`` if not given.
    kernel : str
        A name of `cupaged.kernels`, or "auto"; `explain` says what "auto" takes.
    out : array, [num_seqs, H, D], optional
        Where to write the result.
    return_lse : bool
        Also return the log-sum-exp of each head's logits, by which parts of a context can be merged.
    plan : DecodePlan, optional
        How to share the work out, from `plan_decode`, for kernels that do; one plan serves all layers of a step.
        Without it each call plans for itself.
    query_to_seq : array, int32 [num_queries], optional
        Which row of `block_tables` and `seq_lens` each query of `query`, then [num_queries, H, D], belongs to: several
        queries can attend to one sequence, each to all of its tokens. Without it query i belongs to sequence i.
        paged_attention_batched serves it.
    validate : bool, optional
        Read `block_tables`, `seq_lens` and `query_to_seq` and check them, which on a GPU waits for it. The default
        reads them on the host backend only, or everywhere if CUPAGED_VALIDATE is set to 1.

    Returns
    -------
    out : array, [num_seqs, H, D]
        Of the kind and dtype of `query`.
    lse : array, float32 [num_seqs, H]
        Natural logarithm; only with `return_lse`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; nothing was launched.
    UnsupportedError
        If the named kernel does not serve this shape.

    References
    ----------
    .. [1] Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023.
    """
    caller = query
    query, block_tables, seq_lens = _checked_arrays(query, cache, block_tables, seq_lens, query_to_seq is not None)
    if query_to_seq is not None:
        query_to_seq = _checked_query_to_seq(query_to_seq, query, cache)
    scale = _checked_scale(scale, query.shape[2])
    result = cache.xp.empty_like(query) if out is None else _checked_out(out, query, cache)
    if must_validate(validate, cache.backend):
        check_block_tables(cache, block_tables, seq_lens)
        check_query_to_seq(query_to_seq, seq_lens.shape[0])
    lse = cache.xp.empty(query.shape[:2], dtype=np.float32) if return_lse else None
    choice = choose_kernel(query, cache, kernel, planned=plan is not None, mapped=query_to_seq is not None)
    if plan is not None:
        _check_plan(plan, choice, query, cache)
    if query.size:
        arguments = (result, lse, query, cache, block_tables, seq_lens, scale)
        if choice.kernel == "paged_attention_mma":
            _launch_mma(*arguments, plan or _plan_for_one_call(cache, query, seq_lens))
        elif query_to_seq is not None:
            launch_batched(*arguments, query_to_seq=query_to_seq)
        elif choice.kernel in RUNGS:
            RUNGS[choice.kernel](*arguments)
        else:
            _launch_v1(*arguments)
    result = like_caller(result, caller) if out is None else out
    return (result, like_caller(lse, caller)) if return_lse else result


def explain(
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    scale: float | None = None,
    kernel: str = "auto",
    *,
    query_to_seq: Any = None,
) -> Choice:
    """Return which kernel `paged_attention` would run with these arguments, and why; launches nothing."""
    query, _, _ = _checked_arrays(query, cache, block_tables, seq_lens, query_to_seq is not None)
    _checked_scale(scale, query.shape[2])
    return choose_kernel(query, cache, kernel, mapped=query_to_seq is not None)


def choose_kernel(
    query: Any, cache: KVCache, kernel: str = "auto", *, planned: bool = False, mapped: bool = False
) -> Choice:
    """Return the kernel that runs for queries, [num_seqs, H, D], and a cache, and why.

    `planned` and `mapped` say whether a plan and a query_to_seq are given.

    Raises
    ------
    ValueError
        If `kernel` is no kernel's name.
    UnsupportedError
        If it was named and does not serve the cache.
    """
    if kernel not in ("auto", *ATTENTION_KERNELS):
        raise ValueError(f"kernel must be 'auto' or one of {', '.join(ATTENTION_KERNELS)}; got {kernel!r}")
    if mapped and kernel == "auto":
        return Choice("paged_attention_batched", "it serves query_to_seq")
    if mapped and kernel != "paged_attention_batched":
        raise UnsupportedError(f"query_to_seq is served by paged_attention_batched; the call names {kernel}")
    limit = why_no_tensor_cores(cache)
    if kernel == "auto" and limit is None:
        num_seqs, num_heads, _ = query.shape
        if num_heads == cache.config.num_kv_heads and num_seqs * num_heads >= V1_FILLS_A_GPU and not planned:
            return Choice("paged_attention_v1", "no query heads share a KV head, and there is work for every SM")
        return Choice("paged_attention_mma", "tensor cores serve it, and each byte of the cache is read once")
    if kernel == "auto":
        return Choice("paged_attention_v1", f"it serves every shape; {limit}")
    if kernel == "paged_attention_mma" and limit is not None:
        raise UnsupportedError(limit)
    return Choice(kernel, "it was named")


def _check_plan(plan: DecodePlan, choice: Choice, query: Any, cache: KVCache) -> None:
    if not isinstance(plan, DecodePlan):
        raise TypeError(f"plan must be a DecodePlan, from plan_decode; got {type(plan).__name__}")
    if choice.kernel != "paged_attention_mma":
        raise ValueError(f"plan must be left out for {choice.kernel}, which shares nothing out")
    for name, planned, given in (
        ("backend", plan.backend, cache.backend),
        ("number of sequences", plan.num_seqs, query.shape[0]),
        ("number of query heads", plan.num_heads, query.shape[1]),
        ("cache", replace(plan.config, num_blocks=1), replace(cache.config, num_blocks=1)),
    ):
        if planned != given:
            raise ValueError(f"plan must be made for the same {name}: it is for {planned}, the call has {given}")


_captured_plans: list[DecodePlan] = []  # a graph keeps no arrays alive: these must outlive it


def _plan_for_one_call(cache: KVCache, query: Any, seq_lens: Any) -> DecodePlan:
    plan = plan_decode(cache, seq_lens, query.shape[1])
    if cache.backend == "cuda" and cache.xp.cuda.get_current_stream().is_capturing():
        _captured_plans.append(plan)
    return plan


def _checked_arrays(
    query: Any, cache: KVCache, block_tables: Any, seq_lens: Any, mapped: bool = False
) -> tuple[Any, Any, Any]:
    """Return queries, tables and lengths as the backend's own arrays, or raise by name.

    `mapped`: the number of queries is not that of sequences.
    """
    check_cache(cache)
    named = {"query": query, "block_tables": block_tables, "seq_lens": seq_lens}
    query, block_tables, seq_lens = (as_backend_array(array, name, cache.backend) for name, array in named.items())
    config = cache.config
    check_dtype(query, "query", config.numpy_dtype)
    check_shape(query, "query", ("num_seqs", "H", config.head_dim))
    num_queries, num_heads, _ = query.shape
    if num_heads == 0 or num_heads % config.num_kv_heads:
        raise ValueError(
            f"query must have a number of heads that is a multiple of the cache's {config.num_kv_heads} KV heads; "
            f"got {num_heads}"
        )
    check_dtype(block_tables, "block_tables", INT32)
    check_shape(block_tables, "block_tables", ("num_seqs" if mapped else num_queries, "max_blocks"))
    check_dtype(seq_lens, "seq_lens", INT32)
    check_shape(seq_lens, "seq_lens", (block_tables.shape[0],))
    for array, name in ((query, "query"), (block_tables, "block_tables"), (seq_lens, "seq_lens")):
        check_contiguous(array, name)
    if query.size:
        check_alignment(query, "query")
    pairs = num_queries * num_heads
    if pairs > 2**31 - 1:
        raise UnsupportedError(f"query must have at most 2**31 - 1 (sequence, head) pairs; got {pairs}")
    if block_tables.shape[1] * config.block_size > MAX_TOKENS:
        raise UnsupportedError(
            f"block_tables must map at most {MAX_TOKENS} tokens a sequence; got {block_tables.shape[1]} blocks "
            f"of {config.block_size}"
        )
    return query, block_tables, seq_lens


def _checked_query_to_seq(query_to_seq: Any, query: Any, cache: KVCache) -> Any:
    array = as_backend_array(query_to_seq, "query_to_seq", cache.backend)
    check_dtype(array, "query_to_seq", INT32)
    check_shape(array, "query_to_seq", query.shape[:1])
    check_contiguous(array, "query_to_seq")
    return array


def _checked_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, int | float | np.floating | np.integer) or isinstance(scale, bool):
        raise TypeError(f"scale must be a real number; got {type(scale).__name__} {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite; got {scale!r}")
    return float(scale)


def _checked_out(out: Any, query: Any, cache: KVCache) -> Any:
    array = as_backend_array(out, "out", cache.backend)
    check_dtype(array, "out", query.dtype)
    check_shape(array, "out", query.shape)
    check_contiguous(array, "out")
    for name, read in (("query", query), *(("cache", storage) for storage in cache.storage)):
        if cache.xp.may_share_memory(array, read):
            raise ValueError(f"out must not share memory with {name}: other thread blocks still read it")
    return array


def _launch_v1(out: Any, lse: Any, query: Any, cache: KVCache, block_tables: Any, seq_lens: Any, scale: float) -> None:
    config = cache.config
    num_seqs, num_heads, head_dim = query.shape
    key, value = layouts.kv_strides(config, "key"), layouts.kv_strides(config, "value")
    kernel = load_kernel(
        kernels()["paged_attention_v1"].file,
        "paged_attention_v1",
        {
            "STORAGE": C_TYPE_OF_DTYPE[config.numpy_dtype],
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": config.block_size,
            "KEY_PACK": key.pack_size,
            "VALUE_COLUMNS": int(value.pack_size == 1),
        },
        cache.backend,
    )
    max_blocks = block_tables.shape[1]
    stretch_blocks = max(1, min(max_blocks, V1_STRETCH_TOKENS // config.block_size))
    stretch_tokens = stretch_blocks * config.block_size
    kernel(
        (num_seqs * num_heads,),
        (V1_THREADS,),
        shared_bytes=4 * max(stretch_tokens, V1_THREADS // 32 * head_dim),
        out=out,
        lse=lse,
        query=query,
        key_cache=Strided(cache.key),
        value_cache=Strided(cache.value),
        block_tables=block_tables,
        seq_lens=seq_lens,
        scale=scale,
        num_heads=num_heads,
        group=num_heads // config.num_kv_heads,
        max_blocks=max_blocks,
        stretch_tokens=stretch_tokens,
        **layouts.stride_arguments(key, value),
    )


def _launch_mma(
    out: Any, lse: Any, query: Any, cache: KVCache, block_tables: Any, seq_lens: Any, scale: float, plan: DecodePlan
) -> None:
    config = cache.config
    key, value = layouts.kv_strides(config, "key"), layouts.kv_strides(config, "value")
    plan.kernel(
        (plan.num_blocks,),
        (32 * WARPS,),
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
        seq_lens=seq_lens,
        offsets=plan.offsets,
        first_seq=plan.first_seq,
        scale=scale,
        num_seqs=query.shape[0],
        num_kv_heads=config.num_kv_heads,
        group=plan.group,
        max_blocks=block_tables.shape[1],
        **layouts.stride_arguments(key, value, ("block", "head", "slot")),
    )
