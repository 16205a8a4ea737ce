"""What every kernel means, in float64 NumPy, written for reading; slow on purpose."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from cupaged.attention.logits import Logits
from cupaged.attention.mask import Mask
from cupaged.kv_cache import KVCache
from cupaged.ops.checks import (
    as_numpy,
    check_shared_prefix,
    checked_scale,
    checked_shared_prefix,
    checked_softcap,
    checked_window,
)

__all__ = [
    "append_kv",
    "as_numpy",
    "attention",
    "merge_states",
    "paged_attention",
    "paged_prefill",
    "rotate",
    "sample",
    "sampling_probabilities",
    "uniform",
]


LARGEST_LOGIT = float(np.finfo(np.float32).max) * np.log(2)  # kernels keep logits in float32, in units of log 2


def saturated(logits: np.ndarray) -> np.ndarray:
    """Return logits, or log-sum-exps; those that float32 cannot hold become the largest, or lowest, that it can."""
    largest = logits.dtype.type(LARGEST_LOGIT)
    return np.clip(logits, -largest, largest)


def saturated_sinks(logits: np.ndarray) -> np.ndarray:
    """Return the same of logits of which -inf stands for one that is not there."""
    return np.where(np.isneginf(logits), logits, saturated(logits))


def attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    scale: float,
    dtype: type = np.float64,
    weight_dtype: np.dtype | None = None,
    *,
    softcap: float | None = None,
    bias: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return attention of one query token over a dense context, and the log-sum-exp of its logits.

    Parameters
    ----------
    query : ndarray, [H, D]
        Queries of all heads; head h reads KV head ``h // (H // Hkv)``.
    key, value : ndarray, [tokens, Hkv, D]
        The context; with no tokens the output is 0 and the log-sum-exp -inf, or the sink's logit.
    scale : float
        Factor of the logits.
    dtype : type
        What to compute in: float64, or float32 to see what that loses.
    weight_dtype : dtype, optional
        What the weights are rounded to before they meet the values, as tensor cores want them.
    softcap : float, optional
        Bounds the logits: ``softcap * tanh(scale * q.k / softcap)``.
    bias : ndarray, [H, tokens], optional
        Added to the logits, after the soft cap.
    sinks : ndarray, [H], optional
        One more logit for each head, without a value: it takes weight away from the tokens.

    A logit beyond `LARGEST_LOGIT` counts as that, as it does in the kernels: tokens beyond it weigh the same.

    Returns
    -------
    out : ndarray, [H, D]
    lse : ndarray, [H]
        The sink's logit included. Both of type `dtype`.
    """
    num_heads, head_dim = query.shape
    tokens = len(key)
    sink: np.ndarray = np.full(num_heads, -np.inf, dtype) if sinks is None else sinks.astype(dtype)
    sink = saturated_sinks(sink)
    if tokens == 0:
        return np.zeros((num_heads, head_dim), dtype), sink
    logits = dtype(scale) * by_kv_head(query.astype(dtype), key.astype(dtype))
    if softcap is not None:
        logits = dtype(softcap) * np.tanh(logits / dtype(softcap))
    if bias is not None:
        logits = logits + bias.astype(dtype).reshape(logits.shape)
    logits = saturated(logits)
    sink = sink.reshape(*logits.shape[:2], 1)
    largest = np.maximum(logits.max(axis=-1, keepdims=True), sink)
    weights = np.exp(logits - largest)
    total = weights.sum(axis=-1, keepdims=True) + np.exp(sink - largest)
    if weight_dtype is not None:
        weights = weights.astype(weight_dtype).astype(dtype)
    out = np.einsum("kgt,tkd->kgd", weights / total, value.astype(dtype))
    lse = np.log(total) + largest
    return out.reshape(num_heads, head_dim), lse.reshape(num_heads)


def by_kv_head(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return products of queries, [H, D], with keys, [tokens, Hkv, D], by KV head: [Hkv, H // Hkv, tokens]."""
    num_kv_heads, head_dim = key.shape[1:]
    with np.errstate(over="ignore"):  # in float32
        products: np.ndarray = np.einsum("kgd,tkd->kgt", query.reshape(num_kv_heads, -1, head_dim), key)
    return products


def paged_attention(
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    scale: float | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
    query_to_seq: Any = None,
    shared_prefix: int = 0,
    dtype: type = np.float64,
    weight_dtype: np.dtype | None = None,
    attend: Callable[..., tuple[np.ndarray, np.ndarray]] = attention,
) -> Any:
    """Return decode attention over a paged cache; the arguments are those of `cupaged.paged_attention`.

    Parameters
    ----------
    query : array, [num_seqs, H, D] or [num_seqs, Q, H, D]
        Query token i of Q stands at position ``seq_len - Q + i`` and sees the tokens up to its own.
    cache : KVCache
    block_tables : array, int [num_seqs, max_blocks]
        -1 marks an unmapped block: its tokens take no part. Entries whose tokens no query sees are not looked at.
    seq_lens : array, int [num_seqs]
        All query tokens included; a query token at a negative position sees nothing.
    scale : float, optional
        ``1 / sqrt(D)`` if not given.
    window : int, optional
        A query at position p sees the tokens in ``(p - window, p]``.
    softcap : float, optional
        See `attention`.
    alibi_slopes : array, [H], optional
        Adds ``slope * (key position - query position)`` to each logit, after the soft cap.
    sinks : array, [H], optional
        See `attention`.
    return_lse : bool
        Also return the log-sum-exp.
    query_to_seq : array, int [num_queries], optional
        The row of `block_tables` and `seq_lens` that each query belongs to.
    shared_prefix : int
        So many tokens of all sequences lie in the same blocks: checked, and it changes nothing.
    dtype, weight_dtype
        See `attention`.
    attend : callable
        What takes the place of `attention`, called as it is, for each query token and what it sees.

    Returns
    -------
    out : ndarray, of the query's shape
    lse : ndarray, [num_seqs, H] or [num_seqs, Q, H]
        Only with `return_lse`; both of type `dtype`.
    """
    query, block_tables, seq_lens = (as_numpy(array) for array in (query, block_tables, seq_lens))
    if query_to_seq is not None:
        block_tables, seq_lens = block_tables[as_numpy(query_to_seq)], seq_lens[as_numpy(query_to_seq)]
    logits = _logits(Logits(scale, softcap, alibi_slopes, sinks), query.shape[-1])
    mask = Mask(window=checked_window(window))
    several = query if query.ndim == 4 else query[:, np.newaxis]
    num_queries = several.shape[1]
    block_size = cache.config.block_size
    shared_prefix = checked_shared_prefix(shared_prefix, block_size, max_blocks=block_tables.shape[1])
    check_shared_prefix(shared_prefix, block_size, block_tables, seq_lens, num_queries)
    arithmetic = Arithmetic(dtype, weight_dtype, attend)
    out = np.zeros(several.shape, dtype)
    lse = np.full(several.shape[:3], -np.inf, dtype)
    for seq, seq_len in enumerate(seq_lens.tolist()):
        out[seq], lse[seq] = _attend(several[seq], cache, block_tables[seq], seq_len, mask, logits, arithmetic)
    out, lse = out.reshape(query.shape), lse.reshape(query.shape[:-1])
    return (out, lse) if return_lse else out


class Arithmetic(NamedTuple):
    """What a reference computes in, and by which function for each query token."""

    dtype: type
    weight_dtype: np.dtype | None
    attend: Callable[..., tuple[np.ndarray, np.ndarray]]


def _logits(logits: Logits, head_dim: int) -> Logits:
    """Return checked logits whose arrays are NumPy's."""
    slopes, sinks = (None if array is None else as_numpy(array) for array in (logits.alibi_slopes, logits.sinks))
    return Logits(checked_scale(logits.scale, head_dim), checked_softcap(logits.softcap), slopes, sinks)


def _attend(
    query: np.ndarray,
    cache: KVCache,
    table: np.ndarray,
    seq_len: int,
    mask: Mask,
    logits: Logits,
    arithmetic: Arithmetic,
) -> tuple[np.ndarray, np.ndarray]:
    """Return attention of a sequence's last tokens, [tokens, H, D], over its context, by its row of the table."""
    count, block_size, window = len(query), cache.config.block_size, mask.window
    dtype, slopes = arithmetic.dtype, logits.alibi_slopes
    positions = np.arange(seq_len - count, seq_len)
    first = 0 if window is None else max(0, seq_len - count - window + 1)
    tokens = np.arange(first, seq_len)
    blocks = table[tokens // block_size]
    mapped = blocks != -1
    used, which = np.unique(blocks[mapped], return_inverse=True)
    tokens = tokens[mapped]
    key, value = (array[which, tokens % block_size] for array in cache.blocks(used))
    out: np.ndarray = np.zeros(query.shape, dtype)
    lse: np.ndarray = np.full(query.shape[:2], -np.inf, dtype)
    for i, position in enumerate(positions):
        seen = tokens <= position if mask.causal else tokens >= 0
        if window is not None:
            seen = seen & (tokens > position - window)
        out[i], lse[i] = arithmetic.attend(
            query[i], key[seen], value[seen], logits.scale, dtype, arithmetic.weight_dtype,
            softcap=logits.softcap, sinks=logits.sinks,
            bias=None if slopes is None else slopes.astype(dtype)[:, np.newaxis] * (tokens[seen] - position),
        )  # fmt: skip
    return out, lse


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
    return_lse: bool = False,
    dtype: type = np.float64,
    weight_dtype: np.dtype | None = None,
    attend: Callable[..., tuple[np.ndarray, np.ndarray]] = attention,
) -> Any:
    """Return attention of each sequence's last tokens; the arguments are those of `cupaged.paged_prefill`.

    Parameters
    ----------
    query : array, [total_tokens, H, D]
        New tokens, one sequence behind the other.
    cache : KVCache
    block_tables, seq_lens : array, int [num_seqs, max_blocks], [num_seqs]
        As `paged_attention` takes them.
    query_start : array, int [num_seqs + 1]
        Where each sequence's new tokens begin; the last of them stands at position ``seq_len - 1``.
    scale, window, softcap, alibi_slopes, sinks
        As `paged_attention` takes them.
    causal : bool
        Whether a token sees those up to its own only, or all of its sequence's.
    return_lse : bool
        Also return the log-sum-exp.
    dtype, weight_dtype
        See `attention`.
    attend : callable
        What takes the place of `attention`, called as it is, for each query token and what it sees.

    Returns
    -------
    out : ndarray, [total_tokens, H, D]
    lse : ndarray, [total_tokens, H]
        Only with `return_lse`; both of type `dtype`.
    """
    query, block_tables, seq_lens, starts = (
        as_numpy(array) for array in (query, block_tables, seq_lens, query_start)
    )  # fmt: skip
    logits = _logits(Logits(scale, softcap, alibi_slopes, sinks), query.shape[-1])
    mask, arithmetic = Mask(causal, checked_window(window)), Arithmetic(dtype, weight_dtype, attend)
    out = np.zeros(query.shape, dtype)
    lse = np.full(query.shape[:2], -np.inf, dtype)
    for seq, (first, end) in enumerate(pairwise(starts)):
        out[first:end], lse[first:end] = _attend(
            query[first:end], cache, block_tables[seq], seq_lens[seq], mask, logits, arithmetic
        )
    return (out, lse) if return_lse else out


def merge_states(outs: Any, lses: Any, dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """Return attention over a context from that over its disjoint parts; the arguments of `cupaged.merge_states`.

    Parameters
    ----------
    outs : array, [parts, ..., D]
        The parts' outputs; one whose log-sum-exp is -inf counts nothing, whatever it holds.
    lses : array, [parts, ...]
        Their log-sum-exps.
    dtype : type
        What to compute in.

    Returns
    -------
    out : ndarray, [..., D]
    lse : ndarray, [...]
        Both of type `dtype`.
    """
    outs, lses = as_numpy(outs).astype(dtype), as_numpy(lses).astype(dtype)
    empty = np.isneginf(lses)
    lses = saturated_sinks(lses)
    largest = lses.max(axis=0)
    weights = np.where(empty, dtype(0), np.exp(lses - np.where(np.isneginf(largest), dtype(0), largest)))
    total = weights.sum(axis=0)
    shares = weights / np.where(total == 0, dtype(1), total)
    out = (shares[..., np.newaxis] * np.where(empty[..., np.newaxis], dtype(0), outs)).sum(axis=0)
    with np.errstate(divide="ignore"):
        return out, np.log(total) + largest


def append_kv(dense_key: np.ndarray, dense_value: np.ndarray, key: Any, value: Any, slot_mapping: Any) -> None:
    """Write new tokens into dense caches, [num_blocks, block_size, Hkv, D], in place; a slot of -1 is skipped."""
    block_size = dense_key.shape[1]
    for token, slot in enumerate(as_numpy(slot_mapping)):
        if slot != -1:
            dense_key[slot // block_size, slot % block_size] = as_numpy(key)[token]
            dense_value[slot // block_size, slot % block_size] = as_numpy(value)[token]


def rotate(
    rows: Any,
    positions: Any,
    frequencies: np.ndarray,
    interleaved: bool = False,
) -> np.ndarray:
    """Return rows turned by their positions (RoPE), in float64.

    Parameters
    ----------
    rows : array, [num_tokens, heads, D]
    positions : array, int [num_tokens]
    frequencies : ndarray, [pairs]
        Radians a position of each pair of dimensions; those past the last pair stay.
    interleaved : bool
        Whether dimensions 2 i and 2 i + 1 turn together, or i and i + pairs.
    """
    rows = as_numpy(rows).astype(np.float64)
    angles = as_numpy(positions).astype(np.float64)[:, np.newaxis, np.newaxis] * frequencies
    pairs = len(frequencies)
    first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    turned = rows.copy()
    turned[..., first] = rows[..., first] * np.cos(angles) - rows[..., second] * np.sin(angles)
    turned[..., second] = rows[..., second] * np.cos(angles) + rows[..., first] * np.sin(angles)
    return turned


def rms_norm(x: Any, weight: Any, eps: float, dtype: type = np.float64) -> np.ndarray:
    """Return rows, [rows, width], divided by the root of their mean square (and eps), times a weight, [width]."""
    x, weight = as_numpy(x).astype(dtype, copy=False), as_numpy(weight).astype(dtype, copy=False)
    mean_square = np.square(x).mean(axis=-1, keepdims=True)
    normed: np.ndarray = x / np.sqrt(mean_square + dtype(eps)) * weight
    return normed


def swiglu(gate_up: Any, dtype: type = np.float64) -> np.ndarray:
    """Return ``gate * sigmoid(gate) * up`` of rows that hold gates first and ups behind them, [rows, 2 * width]."""
    wide: np.ndarray = as_numpy(gate_up).astype(dtype, copy=False)
    gate, up = wide[..., : wide.shape[-1] // 2], wide[..., wide.shape[-1] // 2 :]
    with np.errstate(over="ignore"):  # where the sigmoid is 0
        gated: np.ndarray = gate / (1 + np.exp(-gate)) * up
    return gated


def sampling_probabilities(logits: Any, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Return the probability with which `cupaged.sample` draws each token of a row, float64 [vocab_size].

    Parameters
    ----------
    logits : array, [vocab_size]
    temperature, top_k, top_p
        As `cupaged.sample` takes them, for this row.
    """
    logits = as_numpy(logits).astype(np.float64)
    if temperature == 0:
        return (np.arange(len(logits)) == logits.argmax()).astype(np.float64)
    descending = np.sort(logits)[::-1]
    last = descending[top_k - 1] if 0 < top_k < len(logits) else -np.inf
    with np.errstate(over="ignore"):  # where a weight is 0
        weights = np.where(logits >= last, np.exp((logits - descending[0]) / temperature), 0.0)
    if top_p < 1:
        order = np.argsort(-weights, kind="stable")
        enough = np.searchsorted(np.cumsum(weights[order]), top_p * weights.sum())
        weights = np.where(weights >= weights[order[min(enough, len(order) - 1)]], weights, 0.0)
    return weights / weights.sum()


def uniform(seed: int) -> float:
    """Return the number in [0, 1) that a seed stands for: SplitMix64's bits as a fraction."""
    z = (int(seed) + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return (z ^ z >> 31) / 2**64


def sample(logits: Any, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> np.ndarray:
    """Return the token drawn for each row: the first at which the probabilities, summed up, pass the row's number.

    A row whose largest logit is not finite, or that holds NaN, has no token: it gives -1.

    Parameters
    ----------
    logits : array, [num_seqs, vocab_size]
    temperature, top_k, top_p, seed
        Numbers for all rows; row i has the seed ``seed + i``.

    Returns
    -------
    ndarray, int32 [num_seqs]
    """
    tokens: list[Any] = []
    for i, row in enumerate(as_numpy(logits)):
        if not np.isfinite(row.astype(np.float64).max()):
            tokens.append(-1)
            continue
        cumulative = np.cumsum(sampling_probabilities(row, temperature, top_k, top_p))
        tokens.append(np.searchsorted(cumulative, uniform(seed + i) * cumulative[-1], side="right"))
    return np.array(tokens, np.int32)
