"""The doors of attention: each makes a call of its arguments, and a kernel answers it."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from cupaged.attention.call import (
    AttentionCall,
    Pages,
    check_contents,
    checked_call,
    results_for,
    with_results,
)
from cupaged.attention.choose import PLANNED, PREFILLING, choose
from cupaged.attention.kernels.merge_states import merged_states
from cupaged.attention.kernels.persistent import DecodeShares
from cupaged.attention.kernels.prefill import PrefillPlan
from cupaged.attention.logits import Logits
from cupaged.attention.mask import Mask, checked_mask
from cupaged.attention.plans import Answer, PreparedAttention, answer, prepared_attention, remembers_calls
from cupaged.errors import UnsupportedError
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import as_backend_array
from cupaged.ops.checks import (
    as_numpy,
    check_cache,
    check_shape,
    checked_flag,
    checked_heads,
    checked_integer,
    must_validate,
)
from cupaged.ops.streams import on_callers_streams

__all__ = [
    "DecodePlan",
    "PrefillPlan",
    "PreparedAttention",
    "merge_states",
    "paged_attention",
    "paged_prefill",
    "plan_decode",
    "plan_prefill",
    "why_no_plan",
    "why_no_prefill",
]


@remembers_calls
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
    same. On tensor cores that also holds for a product ``q.k`` beyond 3.4e38 before `scale` shrinks it. Where
    the sum of a product ``q.k`` passes both ends of float32, the token counts as the largest, the lowest, or NaN: that
    depends on the order in which the kernel adds.

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
    if plan is not None and not isinstance(plan, DecodeShares):
        raise TypeError(f"plan must be a DecodePlan, from plan_decode; got {type(plan).__name__}")
    pages = Pages(block_tables, seq_lens, query_to_seq=query_to_seq)
    mask = Mask(window=window, shared_prefix=shared_prefix)
    call = checked_call(query, cache, pages, mask, Logits(scale, softcap, alibi_slopes, sinks))
    call = with_results(call, query, out, return_lse)
    if must_validate(validate, cache.backend):
        check_contents(call)
    chosen = choose(call, kernel)
    launches = answer(call, chosen.served_by, chosen.reason, plan, validate)
    return Answer(launches, results_for(query, call, out))


@remembers_calls
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
    check_cache(cache)
    if plan is not None and not isinstance(plan, PrefillPlan | DecodeShares):
        raise TypeError(f"plan must be a PrefillPlan or a DecodePlan; got {type(plan).__name__}")
    pages = Pages(block_tables, seq_lens, query_start=as_backend_array(query_start, "query_start", cache.backend))
    mask = Mask(causal, window)
    call = checked_call(query, cache, pages, mask, Logits(scale, softcap, alibi_slopes, sinks))
    call = with_results(call, query, out, return_lse)
    asked, validating = call, must_validate(validate, cache.backend)
    if isinstance(plan, DecodeShares):
        _check_even(call, plan, validating)
        asked = call.as_decode(plan.query_tokens)
    if validating:
        check_contents(asked)
    chosen = choose(asked)
    launches = answer(asked, chosen.served_by, chosen.reason, plan, validate)
    return Answer(launches, results_for(query, call, out))


def _check_even(call: AttentionCall, plan: DecodeShares, validating: bool) -> None:
    """Raise unless every sequence of a call has the new tokens that a plan for decoding is made for."""
    if not call.mask.causal:
        raise UnsupportedError("causal must be True where plan is a DecodePlan; got False")
    if plan.shared_prefix:
        raise UnsupportedError(f"plan must be for no shared prefix; it is for one of {plan.shared_prefix} tokens")
    num_seqs, new, total_tokens = plan.num_seqs, plan.query_tokens, call.query.shape[0]
    if call.num_seqs != num_seqs or total_tokens != num_seqs * new:
        raise ValueError(
            f"plan must be made for the same new tokens: it is for {new} of each of {num_seqs} sequences, the call has "
            f"{total_tokens} of {call.num_seqs}"
        )
    if validating and (as_numpy(call.pages.query_start) != np.arange(num_seqs + 1) * new).any():
        raise ValueError(
            f"query_start must give every sequence the {new} new tokens that plan is made for; "
            f"got {as_numpy(call.pages.query_start).tolist()[:8]}"
        )


# --- plans --------------------------------------------------------------------------------------------------------


class DecodePlan(DecodeShares):
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
        arguments = query, cache, block_tables, seq_lens, scale
        answered = inspect.unwrap(paged_attention)(*arguments, plan=self, **options)
        return prepared_attention(answered, (*arguments, *options.values()))


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
    query_tokens = checked_integer(query_tokens, "query_tokens", 1)
    overlap, num_heads = checked_flag(overlap, "overlap"), checked_heads(num_heads, cache)
    mask = checked_mask(Mask(window=window, shared_prefix=shared_prefix), cache.config.block_size)
    reason = why_no_plan(cache)
    if reason:
        raise UnsupportedError(reason)
    lens = as_backend_array(seq_lens, "seq_lens", cache.backend)
    check_shape(lens, "seq_lens", ("num_seqs",))
    plan = DecodePlan(cache, lens.shape[0], num_heads, query_tokens, mask.window, mask.shared_prefix, overlap=overlap)
    plan.update(lens)
    return plan


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
    overlap = checked_flag(overlap, "overlap")
    mask = checked_mask(Mask(causal, window), cache.config.block_size)
    reason = why_no_prefill(cache)
    if reason:
        raise UnsupportedError(reason)
    total_tokens, num_heads = checked_integer(total_tokens, "total_tokens", 1), checked_heads(num_heads, cache)
    lens = as_backend_array(seq_lens, "seq_lens", cache.backend)
    check_shape(lens, "seq_lens", ("num_seqs",))
    plan = PrefillPlan(cache, lens.shape[0], total_tokens, num_heads, mask.causal, mask.window, overlap)
    plan.update(seq_lens, query_start)
    return plan


def why_no_plan(cache: KVCache) -> str | None:
    """Return None if plans of `plan_decode` serve a cache where it lies, else what they do not."""
    return PLANNED.why_not_cache(cache)


def why_no_prefill(cache: KVCache) -> str | None:
    """Return None if `paged_prefill` serves a cache where it lies, else what it does not."""
    return PREFILLING.why_not_cache(cache)


# --- parts of contexts --------------------------------------------------------------------------------------------


@on_callers_streams
def merge_states(outs: Any, lses: Any) -> tuple[Any, Any]:
    """Merge attention over disjoint parts of a context into attention over all of it.

    The parts come from `paged_attention` with ``return_lse=True``. Where heads have sinks, give them to one part only:
    a log-sum-exp includes the sink.

    Parameters
    ----------
    outs : array, [parts, ..., D]
        The parts' outputs, in float16, bfloat16 or float32; D a multiple of 16 bytes.
    lses : array, float32 [parts, ...]
        Their log-sum-exps. A part with -inf counts nothing and is not read.

    Returns
    -------
    out : array, [..., D]
        Of the kind and dtype of `outs`; 0 where every part has log-sum-exp -inf.
    lse : array, float32 [...]
        The whole's log-sum-exp.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    UnsupportedError
        If D is no multiple of 16 bytes.

    References
    ----------
    .. [1] Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867.
    """
    return merged_states(outs, lses)
