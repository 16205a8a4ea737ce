"""Decode attention over a paged cache: one query token a sequence, or a few."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from cupaged import layouts
from cupaged.errors import UnsupportedError, written
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import as_backend_array, check_alignment, empty_for, like_caller
from cupaged.ops.checks import (
    check_block_tables,
    check_cache,
    check_contiguous,
    check_dtype,
    check_query_to_seq,
    check_shape,
    check_shared_prefix,
    checked_flag,
    checked_out,
    checked_scale,
    checked_shared_prefix,
    must_validate,
)
from cupaged.ops.plan import DecodePlan, PreparedAttention, attention_kernel, plan_decode, why_no_tensor_cores
from cupaged.ops.registry import ATTENTION_KERNELS, kernels
from cupaged.ops.rungs import RUNGS, launch_batched, launch_v2
from cupaged.ops.streams import foreign_arrays, on_callers_streams
from cupaged.ops.textures import why_no_textures
from cupaged.ops.variants import Variants, checked_variants
from cupaged.runtime.arguments import Strided
from cupaged.runtime.launch import CheckedCalls, PreparedLaunch
from cupaged.runtime.select import load_kernel
from cupaged.runtime.source import C_TYPE_OF_DTYPE

__all__ = ["Choice", "choose_kernel", "explain", "paged_attention"]

INT32 = np.dtype(np.int32)
MAX_TOKENS = 2**31 - 2**16  # of a sequence: a kernel's int may run past the last token by what it reads at once
V1_THREADS = 128
V1_STRETCH_TOKENS = 4096  # 16 KiB of logits: several thread blocks fit an SM, and few contexts need a second stretch
ARRAYS_OF_A_CALL = (
    "query", "block_tables", "seq_lens", "alibi_slopes", "sinks", "key_cache", "value_cache", "out", "lse",
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Which kernel runs, and why; `shared_prefix` is how many tokens are read once for all sequences."""

    kernel: str
    reason: str
    shared_prefix: int = 0


def paged_attention(
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    scale: float | None = None,
    kernel: str = "auto",
    *,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    out: Any = None,
    return_lse: bool = False,
    plan: DecodePlan | None = None,
    query_to_seq: Any = None,
    shared_prefix: int = 0,
    validate: bool | None = None,
) -> Any:
    """Attend with one query token per sequence, or a few, over keys and values in a paged cache.

    The logit of query token at position p and key at position t is ``x = scale * q.k``, then, where given,
    ``softcap * tanh(x / softcap)``, then ``+ slope * (t - p)``; keys outside the window take no part, and a sink joins
    the sum of exponentials that weights are divided by.

    Logits are float32. One beyond 2.3e38 counts as 2.3e38, and one below -2.3e38 as that: several such tokens weigh the
    same. On tensor cores that also holds for a product ``q.k`` beyond 3.4e38 before `scale` shrinks it. Products whose
    sum passes through both infinities make the row NaN.

    The work goes to CuPy's current stream, or, if any array is a torch tensor, to torch's current stream of its device,
    in order with what is on CuPy's (`cupaged.ops.streams`).

    Parameters
    ----------
    query : array, [num_seqs, H, D] or [num_seqs, Q, H, D]
        In the cache's dtype; H a multiple of the cache's KV heads: query head h reads KV head ``h // (H // Hkv)``.
        With Q query tokens a sequence, as in speculative decoding, token i stands at position ``seq_len - Q + i`` and
        sees the tokens up to its own.
    cache : KVCache
        Keys and values.
    block_tables : array, int32 [num_seqs, max_blocks]
        Block ids of each sequence in order. -1 marks an unmapped block, whose tokens take no part. Entries past a
        sequence's last block are never followed, nor those of blocks that lie before every query token's window: such
        blocks may have been freed.
    seq_lens : array, int32 [num_seqs]
        Tokens with keys and values in the cache, all query tokens included. A query token that sees no token (length
        0, a position below 0) has output 0 and log-sum-exp -inf, or its head's sink where there are sinks.
    scale : float, optional
        Factor of the logits; ``1 / sqrt(D)`` if not given.
    kernel : str
        A name of `cupaged.kernels`, or "auto"; `explain` says what "auto" takes.
    window : int, optional
        A query at position p sees the tokens in ``(p - window, p]``: the last `window`, its own among them.
    softcap : float, optional
        Bounds the logits (Gemma 2), before ALiBi.
    alibi_slopes : array, float32 [H], optional
        ALiBi's slope of each head, positive to favour what is near [2]_.
    sinks : array, float32 [H], optional
        One learned logit for each head, in the units of the logits after `scale`, that has no value (gpt-oss).
    out : array, of the query's shape, optional
        Where to write the result; it shares no memory with any other argument.
    return_lse : bool
        Also return the log-sum-exp of each head's logits, the sink among them, by which `merge_states` merges parts
        of a context: give the sinks to one of the parts.
    plan : DecodePlan, optional
        How to share the work out, from `plan_decode`, for kernels that do; one plan serves all layers of a step, and is
        made for `seq_lens` as they are: see `DecodePlan`.
        Without it each call plans for itself. A plan also remembers calls that passed their checks: another like it,
        with the same options and with arrays of the backend that are alike in all but place and content, is launched
        at once. `DecodePlan.prepare` leaves out even that.
    query_to_seq : array, int32 [num_queries], optional
        Which row of `block_tables` and `seq_lens` each query of `query`, then [num_queries, H, D], belongs to: several
        queries can attend to one sequence, each to all of its tokens. Without it query i belongs to sequence i.
        paged_attention_batched serves it.
    shared_prefix : int
        So many first tokens of all sequences, a multiple of the block size, lie in the same blocks: all rows of
        `block_tables`, complete as ever, begin with the same ids, also those of empty sequences. A length counts them,
        and is 0 or at least ``shared_prefix + Q``, so that the query tokens come after them. The result is that of a
        call without it, but paged_attention_persistent reads these tokens for all sequences at once [3]_, in a launch
        of its own; other kernels read them for each. Not with a window, which hides another part of them from each
        sequence.
    validate : bool, optional
        Read `block_tables`, `seq_lens` and `query_to_seq` and check them, which on a GPU waits for it. The default
        reads them on the host backend only, or everywhere if CUPAGED_VALIDATE is set to 1, which a remembered
        call notices within 10 ms.

    Returns
    -------
    out : array, of the query's shape
        Of the kind and dtype of `query`.
    lse : array, float32 [num_seqs, H] or [num_seqs, Q, H]
        Natural logarithm; only with `return_lse`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; nothing was launched.
    UnsupportedError
        If the named kernel does not serve this shape or variant; for `shared_prefix` with a window.

    References
    ----------
    .. [1] Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023.
    .. [2] Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
       ICLR 2022.
    .. [3] Juravsky et al., "Hydragen: High-Throughput LLM Inference with Shared Prefixes", arXiv 2402.05099.
    """
    known_calls = plan.calls if isinstance(plan, DecodePlan) and isinstance(cache, KVCache) else None
    if known_calls is not None and query_to_seq is None:
        # every argument that anything below goes by stands in `asked`: a call that differs in it is another call
        arrays = (query, block_tables, seq_lens, alibi_slopes, sinks)
        options = (
            cache.config,
            cache.device,
            scale,
            kernel,
            window,
            softcap,
            shared_prefix,
            return_lse,
            validate,
        )
        asked = options, (*arrays, out)
        always_read = cache.backend == "host" if validate is None else validate is not False
        checked = None if always_read else known_calls.find(*asked, cache.bounds, len(arrays))
        if checked is not None:
            result = cache.xp.empty_like(query) if out is None else out
            lse = cache.xp.empty(query.shape[:-1], dtype=np.float32) if return_lse else None
            checked.launch(*arrays, cache.key, cache.value, result, lse)
            return (result, lse) if return_lse else result
        to_remember = asked, known_calls
    else:
        to_remember = None
    return _checked_attention(
        query, cache, block_tables, seq_lens, scale, kernel, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
        sinks=sinks, shared_prefix=shared_prefix, out=out, return_lse=return_lse, plan=plan, query_to_seq=query_to_seq,
        validate=validate, asked=to_remember,
    )  # fmt: skip


@on_callers_streams
def _checked_attention(
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    scale: float | None,
    kernel: str,
    *,
    out: Any,
    plan: DecodePlan | None,
    query_to_seq: Any,
    validate: bool | None,
    asked: tuple[tuple[tuple[Any, ...], tuple[Any, ...]], CheckedCalls] | None,
    **options: Any,
) -> Any:
    """Check a call and launch it; `asked` is as what it is remembered, if it is, and where."""
    call = _checked_call(
        query, cache, block_tables, seq_lens, scale, kernel, out=out, plan=plan, query_to_seq=query_to_seq,
        validate=validate, **options,
    )  # fmt: skip
    if call.query.size:
        if call.kernel == "paged_attention_persistent":
            launches = _persistent_launches(*call.arguments, call.variants, plan or _plan_for_one_call(call))
            for launch in launches:
                launch()
            if asked is not None and len(launches) == 1 and not must_validate(validate, cache.backend):
                options_and_arrays, calls = asked
                still_known = None if validate is False else _environment_asks_for_nothing
                calls.add(*options_and_arrays, launches[0], ARRAYS_OF_A_CALL, still_known)
        elif query_to_seq is not None:
            launch_batched(*_on_three_axes(*call.arguments), query_to_seq=call.query_to_seq)
        elif call.kernel == "paged_attention_v2":
            launch_v2(*_on_three_axes(*call.arguments), variants=call.variants)
        elif call.kernel in RUNGS:
            RUNGS[call.kernel](*_on_three_axes(*call.arguments))
        else:
            _launch_v1(*call.arguments, call.variants)
    return _returned(call, query, out)


def _environment_asks_for_nothing() -> bool:
    return not must_validate(None, "cuda")


def prepare_attention(
    plan: DecodePlan, query: Any, cache: KVCache, block_tables: Any, seq_lens: Any, **options: Any
) -> PreparedAttention:
    """Check a planned call of `paged_attention`, and return it to be launched; see `DecodePlan.prepare`."""
    foreign = foreign_arrays((query, block_tables, seq_lens, *options.values()))
    call = _checked_call(query, cache, block_tables, seq_lens, plan=plan, **options)
    launches = _persistent_launches(*call.arguments, call.variants, plan) if call.query.size else ()
    return PreparedAttention(launches, _returned(call, query, options.get("out")), foreign)


class _Call(NamedTuple):
    """A call that passed its checks; arrays are the backend's."""

    kernel: str
    out: Any
    lse: Any
    query: Any
    cache: KVCache
    block_tables: Any
    seq_lens: Any
    scale: float
    variants: Variants
    query_to_seq: Any
    shared_prefix: int

    @property
    def arguments(self) -> tuple[Any, Any, Any, KVCache, Any, Any, float]:
        """What every kernel takes."""
        return self.out, self.lse, self.query, self.cache, self.block_tables, self.seq_lens, self.scale


def _checked_call(
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    scale: float | None = None,
    kernel: str = "auto",
    *,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    shared_prefix: int = 0,
    out: Any = None,
    return_lse: bool = False,
    plan: DecodePlan | None = None,
    query_to_seq: Any = None,
    validate: bool | None = None,
) -> _Call:
    """Check a call of `paged_attention`, choose its kernel, and make room for what it writes."""
    caller = query
    query, block_tables, seq_lens = _checked_arrays(query, cache, block_tables, seq_lens, query_to_seq is not None)
    if query_to_seq is not None:
        query_to_seq = _checked_query_to_seq(query_to_seq, query, cache)
    scale = checked_scale(scale, query.shape[-1])
    variants = checked_variants(
        query, cache.backend, block_tables.shape[1] * cache.config.block_size,
        window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
    )  # fmt: skip
    block_size, max_blocks = cache.config.block_size, block_tables.shape[1]
    shared_prefix = checked_shared_prefix(shared_prefix, block_size, variants.window, max_blocks)
    if out is None:
        result = empty_for(caller, query.shape, query.dtype, cache.backend)
    else:
        result = checked_out(
            out, query, cache, block_tables=block_tables, seq_lens=seq_lens, query_to_seq=query_to_seq,
            alibi_slopes=variants.alibi_slopes, sinks=variants.sinks,
        )  # fmt: skip
    validating = must_validate(validate, cache.backend)
    if validating:
        check_block_tables(cache, block_tables, seq_lens, variants.query_tokens, variants.window)
        check_query_to_seq(query_to_seq, seq_lens.shape[0])
        check_shared_prefix(shared_prefix, block_size, block_tables, seq_lens, variants.query_tokens)
    wants_lse = checked_flag(return_lse, "return_lse")
    lse = empty_for(caller, query.shape[:-1], np.float32, cache.backend) if wants_lse else None
    mapped = query_to_seq is not None
    choice = choose_kernel(query, cache, kernel, mapped=mapped, variants=variants, shared_prefix=shared_prefix)
    if plan is not None:
        _check_plan(plan, choice, query, cache, max_blocks * block_size, variants, shared_prefix)
        if validating:
            plan.check_lens(seq_lens)
    return _Call(
        choice.kernel, result, lse, query, cache, block_tables, seq_lens, scale, variants, query_to_seq, shared_prefix
    )


def _returned(call: _Call, caller: Any, out: Any) -> Any:
    """Return what a call returns: arrays of the kind that `caller`, its query, is, or the caller's own `out`."""
    result = like_caller(call.out, caller) if out is None else out
    return result if call.lse is None else (result, like_caller(call.lse, caller))


def _on_three_axes(out: Any, lse: Any, query: Any, *rest: Any) -> tuple[Any, ...]:
    """Return the arguments of a kernel whose query is [rows, H, D]: the query tokens of a sequence in order."""
    shape = (-1, *query.shape[-2:])
    return out.reshape(shape), None if lse is None else lse.reshape(shape[:2]), query.reshape(shape), *rest


@on_callers_streams
def explain(
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    scale: float | None = None,
    kernel: str = "auto",
    *,
    query_to_seq: Any = None,
    shared_prefix: int = 0,
    **variants: Any,
) -> Choice:
    """Return which kernel `paged_attention` would run with these arguments, and why; launches nothing.

    `variants` are `window`, `softcap`, `alibi_slopes` and `sinks`, as `paged_attention` takes them.
    """
    mapped = query_to_seq is not None
    query, block_tables, _ = _checked_arrays(query, cache, block_tables, seq_lens, mapped)
    checked_scale(scale, query.shape[-1])
    asked = checked_variants(query, cache.backend, block_tables.shape[1] * cache.config.block_size, **variants)
    shared_prefix = checked_shared_prefix(shared_prefix, cache.config.block_size, asked.window, block_tables.shape[1])
    return choose_kernel(query, cache, kernel, mapped=mapped, variants=asked, shared_prefix=shared_prefix)


def choose_kernel(
    query: Any,
    cache: KVCache,
    kernel: str = "auto",
    *,
    mapped: bool = False,
    variants: Variants | None = None,
    shared_prefix: int = 0,
) -> Choice:
    """Return the kernel that runs for queries, [num_seqs, H, D] or [num_seqs, Q, H, D], and a cache, and why.

    `mapped` says whether a query_to_seq is given.

    Raises
    ------
    ValueError
        If `kernel` is no kernel's name.
    UnsupportedError
        If it was named and does not serve the cache or the variants.
    """
    if not isinstance(kernel, str):
        raise TypeError(f"kernel must be a name; got {type(kernel).__name__} {written(kernel)}")
    if kernel not in ("auto", *ATTENTION_KERNELS):
        raise ValueError(f"kernel must be 'auto' or one of {', '.join(ATTENTION_KERNELS)}; got {kernel!r}")
    choice = _choose(cache, kernel, mapped, variants or Variants())
    if not shared_prefix:
        return choice
    tokens = f"the {shared_prefix} tokens that sequences share"
    if choice.kernel != "paged_attention_persistent":
        return replace(choice, reason=f"{choice.reason}; it reads {tokens} for each of them")
    if query.shape[0] < 2:
        return replace(choice, reason=f"{choice.reason}; there is no other sequence to share with")
    return replace(
        choice, reason=f"{choice.reason}; {tokens} are read for all of them at once", shared_prefix=shared_prefix
    )


def _choose(cache: KVCache, kernel: str, mapped: bool, variants: Variants) -> Choice:
    if mapped and kernel not in ("auto", "paged_attention_batched"):
        raise UnsupportedError(f"query_to_seq is served by paged_attention_batched; the call names {kernel}")
    if mapped or kernel != "auto":
        chosen = "paged_attention_batched" if mapped else kernel
        limit = _limit(chosen, cache, variants)
        if limit is not None:
            raise UnsupportedError(limit)
        return Choice(chosen, "it serves query_to_seq" if mapped else "it was named")
    limit = _limit("paged_attention_persistent", cache, variants)
    if limit is None:
        return Choice("paged_attention_persistent", "tensor cores serve it, and up to 16 query rows share each read")
    return Choice(
        "paged_attention_v2", f"it serves everything: partitions fill the GPU, and heads share loads; {limit}"
    )


def _limit(kernel: str, cache: KVCache, variants: Variants) -> str | None:
    """Return None if a kernel serves the cache and the variants, else what it does not."""
    if kernels()[kernel].rounds_weights and (limit := why_no_tensor_cores(cache, kernel)):
        return limit
    if kernel == "paged_attention_texture" and (limit := why_no_textures(cache.config)):
        return limit
    missing = sorted(variants.names - kernels()[kernel].variants)
    if missing:
        return f"{kernel} does not take {' and '.join(missing)}"
    return None


def _check_plan(
    plan: DecodePlan,
    choice: Choice,
    query: Any,
    cache: KVCache,
    max_tokens: int,
    variants: Variants,
    shared_prefix: int,
) -> None:
    if not isinstance(plan, DecodePlan):
        raise TypeError(f"plan must be a DecodePlan, from plan_decode; got {type(plan).__name__}")
    if choice.kernel != "paged_attention_persistent":
        raise ValueError(
            f"plan must be left out for {choice.kernel}, which shares nothing out; it runs as {choice.reason}"
        )
    planned_window = None if plan.window is None or plan.window >= max_tokens else plan.window  # as for the call
    for name, planned, given in (
        ("backend", plan.backend, cache.backend),
        ("device", plan.device, cache.device),
        ("number of sequences", plan.num_seqs, query.shape[0]),
        ("number of query heads", plan.num_heads, query.shape[-2]),
        ("number of query tokens", plan.query_tokens, variants.query_tokens),
        ("window", planned_window, variants.window),
        ("shared prefix", plan.shared_prefix, shared_prefix),
        ("cache", replace(plan.config, num_blocks=1), replace(cache.config, num_blocks=1)),
    ):
        if planned != given:
            raise ValueError(f"plan must be made for the same {name}: it is for {planned}, the call has {given}")


def _plan_for_one_call(call: _Call) -> DecodePlan:
    cache, variants = call.cache, call.variants
    return plan_decode(
        cache, call.seq_lens, call.query.shape[-2],
        query_tokens=variants.query_tokens, window=variants.window, shared_prefix=call.shared_prefix,
    )  # fmt: skip


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
    several = ("Q",) if query.ndim == 4 else ()
    check_shape(query, "query", ("num_seqs", *several, "H", config.head_dim))
    num_queries, num_heads = query.shape[0], query.shape[-2]
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
    rows = query.size // config.head_dim
    if rows > 2**31 - 1:
        raise UnsupportedError(f"query must have at most 2**31 - 1 (query token, head) pairs; got {rows}")
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


def _launch_v1(
    out: Any,
    lse: Any,
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    scale: float,
    variants: Variants,
) -> None:
    config = cache.config
    num_heads, head_dim = query.shape[-2:]
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
            **variants.defines,
        },
        cache.backend,
    )
    max_blocks = block_tables.shape[1]
    blocks_in_sight = max_blocks if variants.window is None else (variants.window - 2) // config.block_size + 2
    stretch_blocks = max(1, min(max_blocks, blocks_in_sight, V1_STRETCH_TOKENS // config.block_size))
    stretch_tokens = stretch_blocks * config.block_size
    kernel(
        (query.size // head_dim,),
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
        **variants.arguments,
    )


def _persistent_launches(
    out: Any,
    lse: Any,
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    scale: float,
    variants: Variants,
    plan: DecodePlan,
) -> tuple[PreparedLaunch, ...]:
    """Return the launches of what a plan shares out: a shared prefix first, without the sinks, which count once."""
    arguments = (query, cache, block_tables, seq_lens, scale)
    of_prefix = {"prefix_out": None, "prefix_state": None, "prefix_tokens": 0}
    if plan.prefix is None:
        return (_planned_launch(out, lse, *arguments, variants, plan, of_prefix),)
    of_prefix = {
        "prefix_out": plan.prefix_out,
        "prefix_state": plan.prefix_state,
        "prefix_tokens": plan.shared_prefix,
    }
    first = _planned_launch(out, None, *arguments, replace(variants, sinks=None), plan.prefix, of_prefix)
    return first, _planned_launch(out, lse, *arguments, variants, plan, of_prefix)


def _planned_launch(
    out: Any,
    lse: Any,
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    scale: float,
    variants: Variants,
    plan: DecodePlan,
    of_prefix: dict[str, Any],
) -> PreparedLaunch:
    config = cache.config
    key, value = layouts.kv_strides(config, "key"), layouts.kv_strides(config, "value")
    kernel = attention_kernel(config, plan.shape, cache.backend, {**plan.defines, **variants.defines})
    return kernel.prepare(
        (plan.num_blocks,),
        (32 * plan.shape.warps,),
        shared_bytes=plan.block_shared_bytes,
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
        summary=plan.summary,
        pieces=plan.pieces,
        scale=scale,
        num_kv_heads=config.num_kv_heads,
        group=query.shape[-2] // config.num_kv_heads,
        max_blocks=block_tables.shape[1],
        num_blocks=config.num_blocks,
        **layouts.stride_arguments(key, value, ("block", "head", "slot")),
        **variants.arguments,
        **of_prefix,
        num_seqs=query.shape[0],
    )
