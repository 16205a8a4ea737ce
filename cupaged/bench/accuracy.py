"""How wrong a right kernel may be: an error budget for each row, from the arithmetic, not picked until it passes.

A row is a query head of a query token. Its budget follows from its own logits, weights and values alone, so that a
long context has a narrow one, whatever stands beside it. u is the unit roundoff, half of a type's eps: 2^-24 in
float32, 2^-11 in float16, 2^-8 in bfloat16. Rounding errors are taken to be independent, of mean 0, and uniform. A
sum of them has a variance, and is allowed `PROBABLE` standard deviations, which is the multiple of the error that the
same mathematics makes (Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci.
Comput. 41(5), 2019). By Hoeffding's inequality, fewer than 1 of 10^7 elements exceed that.

- Logits, in float32. A sum of D products is on its way no larger than m, the mean of its own size and that of
  ``sum(|q_i k_i|)``, and its error has the standard deviation ``u * sqrt(D / 3) * m``. A tensor core adds 16 products
  at once and cuts off what does not fit, always towards 0: up to 2 u each time, and all logits of a row alike. Scale,
  soft cap, bias and exponential add some u. An error e of a logit multiplies its weight by exp(e).
- Weights, where a kernel rounds them to the storage type before they meet the values: each errs by a part u of
  itself. What all errors of a row have in common is at most u of the row; what is left is a sum of independent ones,
  and of few tokens at most u of the sum of their sizes. Equal weights err alike. Weights too small for the type lose
  digits, or become 0.
- Sums over n tokens, in float32: as sums of n products, or 2 u for each 16 tokens, if that is more.
- Weights, beside the largest of them, and their products with values, where they are below float32's normal numbers:
  each errs by up to 2^-149. It shows only where a sink takes almost all.
- The result, rounded to the storage type: u of itself.

What stays unseen, of n tokens that weigh alike and have values of about the size a: without the value of one of them
the row moves by a / n, and rounded weights may move it by 3.5 u a / sqrt(n). So one value is missed only beyond some
1 / (3.5 u)^2 tokens: 5,000 in bfloat16, 300,000 in float16. In a shorter row a token is missed only if it weighs next
to nothing, less than 3.5 u sqrt(sum of the squared weights). A factor of a whole row is missed below about 3.5 u: 1.4 %
in bfloat16, 0.2 % in float16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from cupaged import reference
from cupaged.attention.choose import explain, kernels
from cupaged.kv_cache import KVCache

__all__ = [
    "DecodeBudget",
    "decode_budget",
    "decode_check",
    "kernel_rounds_weights",
    "merge_budget",
    "prefill_budget",
    "verdict_on",
]

FLOAT32_EPS = float(np.finfo(np.float32).eps)
UNIT = FLOAT32_EPS / 2  # the largest relative error of a rounding to float32
PROBABLE = 6  # standard deviations of a sum of rounding errors
TOGETHER = 16  # tokens whose weighted values a tensor core adds at once
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
SAFETY = 4  # times what float32 loses, for what has no budget of its own here


@dataclass(frozen=True)
class DecodeBudget:
    """The reference's result, and the largest error allowed of each output element and of each log-sum-exp.

    Attributes
    ----------
    expected, out : ndarray, float64, of the query's shape
        The result and its budget.
    expected_lse, lse : ndarray, float64, without the last axis
        The log-sum-exp, -inf for an empty context, and its budget.
    """

    expected: np.ndarray
    out: np.ndarray
    expected_lse: np.ndarray
    lse: np.ndarray

    def error_of(self, out: Any) -> float:
        """Return the largest error of a result as a fraction of its budget: at most 1 is right, NaN is infinite."""
        error = np.abs(reference.as_numpy(out).astype(np.float64) - self.expected) / self.out
        return float(np.where(np.isnan(error), np.inf, error).max(initial=0.0))

    def error_of_lse(self, lse: Any) -> float:
        """Return the same of log-sum-exps; those of empty contexts must be -inf."""
        found = reference.as_numpy(lse).astype(np.float64)
        empty = np.isneginf(self.expected_lse)
        error = np.where(empty, 0.0, np.abs(found - np.where(empty, 0.0, self.expected_lse)) / self.lse)
        wrong = np.isnan(error) | (empty != np.isneginf(found))
        return float(np.where(wrong, np.inf, error).max(initial=0.0))


def decode_budget(
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    kernel: str = "auto",
    *,
    rounds_weights: bool | None = None,
    **variants: Any,
) -> DecodeBudget:
    """Return what a decode call should give, and how far from it a right kernel may be.

    Parameters
    ----------
    query, cache, block_tables, seq_lens
        The arguments of `cupaged.paged_attention`.
    kernel : str
        Which kernel it is: those on tensor cores round the softmax's weights to the storage type.
    rounds_weights : bool, optional
        Whether it does, for kernels that are not the toolkit's own.
    **variants
        `window`, `softcap`, `alibi_slopes` and `sinks`, where the call has them.
    """
    arguments = (query, cache, block_tables, seq_lens)
    rounds = rounds_weights
    if rounds is None:
        rounds = kernel_rounds_weights(*arguments, kernel=kernel, **variants)
    return _budget(reference.paged_attention, arguments, cache.config.numpy_dtype, rounds, variants)


def prefill_budget(
    query: Any, cache: KVCache, block_tables: Any, seq_lens: Any, query_start: Any, **options: Any
) -> DecodeBudget:
    """Return what `cupaged.paged_prefill` should give, and how far from it a right kernel may be.

    Parameters
    ----------
    query, cache, block_tables, seq_lens, query_start
        The arguments of the call.
    **options
        `scale`, `causal`, `window`, `softcap`, `alibi_slopes` and `sinks`, where the call has them.
    """
    arguments = (query, cache, block_tables, seq_lens, query_start)
    return _budget(reference.paged_prefill, arguments, cache.config.numpy_dtype, True, options)


def merge_budget(outs: Any, lses: Any) -> DecodeBudget:
    """Return what `cupaged.merge_states` should give, and how far from it a right kernel may be."""
    merged, lse = reference.merge_states(outs, lses)
    given, logits = (np.moveaxis(reference.as_numpy(array), 0, -1) for array in (outs, lses))
    there = ~np.isneginf(logits)
    parts, storage = logits.shape[-1], ml_dtypes.finfo(given.dtype)
    size = np.where(there, np.abs(logits.astype(np.float64)), 0.0)
    shares = np.where(there, logits.astype(np.float64) - np.where(there.any(-1), lse, 0.0)[..., np.newaxis], -np.inf)
    changes, common = _changes(shares, UNIT * (4 * size + 8))
    sums = UNIT * (parts + 4)
    size_of_parts = np.where(there[..., np.newaxis, :], np.abs(given.astype(np.float64)), 0.0)
    out = ((changes + sums * np.exp(shares))[..., np.newaxis, :] * size_of_parts).sum(axis=-1)
    out += (changes.sum(axis=-1) + sums + float(storage.eps) / 2)[..., np.newaxis] * np.abs(merged)
    out += float(storage.smallest_subnormal)
    return DecodeBudget(merged, out, lse, common + sums + UNIT * (4 * size.max(axis=-1, initial=0.0) + 8))


def _budget(
    compute: Callable[..., Any], arguments: tuple[Any, ...], storage: np.dtype, rounds_weights: bool, options: Any
) -> DecodeBudget:
    """Return the budget of a function of the reference, called with these arguments."""
    expected, expected_lse = compute(*arguments, return_lse=True, **options)
    allowed = partial(_allowed, storage=ml_dtypes.finfo(storage))
    weight_dtype = storage if rounds_weights else None
    out, lse = compute(*arguments, return_lse=True, attend=allowed, weight_dtype=weight_dtype, **options)
    return DecodeBudget(expected, out, expected_lse, lse)


def _allowed(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    scale: float,
    dtype: type,
    weight_dtype: np.dtype | None,
    *,
    softcap: float | None,
    bias: np.ndarray | None,
    sinks: np.ndarray | None,
    storage: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Return how far output and log-sum-exp of one query token may be off; called as `reference.attention` is."""
    num_heads, head_dim = query.shape
    tokens, num_kv_heads = len(key), key.shape[1]
    sink = np.full(num_heads, -np.inf) if sinks is None else reference.saturated_sinks(sinks.astype(np.float64))
    sink = sink.reshape(num_kv_heads, -1, 1)
    sink_error = UNIT * (4 * np.abs(np.where(np.isneginf(sink), 0.0, sink)) + 8)
    if tokens == 0:
        return np.full(query.shape, float(storage.smallest_subnormal)), sink_error.reshape(num_heads)
    query, key, value = (array.astype(np.float64) for array in (query, key, value))
    cut_off = 2 * UNIT / TOGETHER if weight_dtype is not None else 0.0  # by tensor cores, of each term of a sum
    logits, spread, error = _logits(query, key, scale, softcap, bias, cut_off * head_dim)
    every = np.concatenate([logits, sink], axis=-1)
    largest = every.max(axis=-1, keepdims=True)
    lse = np.log(np.exp(every - largest).sum(axis=-1, keepdims=True)) + largest
    weights = np.exp(logits - lse)

    def summed(of_tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.einsum("kgt,tkd->kgd", of_tokens, values)
        return found

    changes, common = _changes(every - lse, np.concatenate([error, sink_error], axis=-1))
    scattered, chance = _changes(every - lse, PROBABLE * np.concatenate([spread, np.zeros_like(sink)], axis=-1))
    sums = max(PROBABLE * UNIT * np.sqrt(tokens / 3), cut_off * tokens) + 4 * UNIT
    out, size = np.abs(summed(weights, value)), np.abs(value)
    allowed = summed(changes[..., :-1] + sums * weights / 2, size)
    allowed += (changes.sum(axis=-1) + 1.5 * sums + float(storage.eps) / 2)[..., np.newaxis] * out
    allowed += (
        np.sqrt(summed(scattered[..., :-1] ** 2, size**2)) + np.sqrt((scattered**2).sum(-1))[..., np.newaxis] * out
    )
    if weight_dtype is not None:
        allowed += _of_rounded_weights(weights, value, out, storage)
    allowed += SMALLEST * (size.sum(axis=0)[:, np.newaxis] + tokens) + float(storage.smallest_subnormal)
    allowed_lse = common + chance + sums
    allowed_lse += UNIT * (4 * np.abs(logits).max(axis=-1) + 4 * np.abs(lse[..., 0]) + 8)
    return allowed.reshape(num_heads, head_dim), allowed_lse.reshape(num_heads)


def _logits(
    query: np.ndarray, key: np.ndarray, scale: float, softcap: float | None, bias: np.ndarray | None, cut_off: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return logits by KV head, the standard deviation of each one's error, and what of its error is not by chance."""
    logits = scale * reference.by_kv_head(query, key)
    on_the_way = (abs(scale) * reference.by_kv_head(np.abs(query), np.abs(key)) + np.abs(logits)) / 2
    spread = UNIT * np.sqrt(query.shape[-1] / 3) * on_the_way
    error = cut_off * on_the_way + 2 * UNIT * np.abs(logits)
    if softcap is not None:
        spread, error = (_through_cap(logits, e, softcap) for e in (spread, error))
        logits = softcap * np.tanh(logits / softcap)
        error += 8 * UNIT * np.abs(logits)
    if bias is not None:
        bias = bias.astype(np.float64).reshape(logits.shape)
        logits, error = logits + bias, error + 4 * UNIT * np.abs(bias)
    logits = reference.saturated(logits)
    return logits, spread, error + UNIT * (logits.max(axis=-1, keepdims=True) - logits + 6)


def _through_cap(logits: np.ndarray, error: np.ndarray, softcap: float) -> np.ndarray:
    """Return the error of logits behind a soft cap, of which they have `error` before it."""
    low, mid, high = (np.tanh(x / softcap) for x in (logits - error, logits, logits + error))
    return softcap * np.maximum(high - mid, mid - low)


def _changes(log_weights: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how far errors of logits may move each weight of softmaxes, along the last axis, and their log-sum-exps.

    With errors e and new total Z, a row moves by the sum of ``weight * (exp(e) - 1) / Z * (value - row)``. An error
    that all logits have in common moves nothing: so errors count as they are, or relative to that of the largest
    weight, which then stays as it is. The smaller of the two is what a row is allowed.
    """
    upper = log_weights + error
    largest = upper.max(axis=-1, keepdims=True)
    empty = np.isneginf(largest)
    largest = np.where(empty, 0.0, largest)
    total = np.exp(upper - largest).sum(axis=-1, keepdims=True)
    common = np.log(np.where(empty, 1.0, total)) + largest
    changes = _moved(log_weights + common, error)
    top = log_weights.argmax(axis=-1, keepdims=True)
    top_weight, top_error = (np.take_along_axis(array, top, axis=-1) for array in (log_weights, error))
    beside_top = _moved(log_weights - np.where(empty, 0.0, top_weight), error + top_error)
    np.put_along_axis(beside_top, top, 0.0, axis=-1)
    fewer = beside_top.sum(axis=-1, keepdims=True) < changes.sum(axis=-1, keepdims=True)
    return np.where(fewer, beside_top, changes), common[..., 0]


def _moved(log_weights: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return ``weights * (exp(error) - 1)``, at most 1, where either of them may be too large or small for a float."""
    small = np.exp(np.minimum(log_weights, 0.0)) * np.expm1(np.minimum(error, 1.0))
    return np.minimum(np.where(error < 1, small, np.exp(np.minimum(log_weights + error, 0.0))), 1.0)


def _of_rounded_weights(weights: np.ndarray, value: np.ndarray, out: np.ndarray, storage: Any) -> np.ndarray:
    """Return how far rows may be off, [Hkv, group, D], where weights are rounded to the storage type."""
    unit = float(storage.eps) / 2
    variance = np.einsum("kgt,tkd->kgd", weights**2, value**2)
    for kv_head, head in np.ndindex(*weights.shape[:2]):
        row = weights[kv_head, head].astype(np.float32)
        distinct, which = np.unique(row, return_inverse=True)
        if len(distinct) < len(row):  # equal weights err alike
            together = np.zeros((len(distinct), value.shape[-1]))
            np.add.at(together, which, weights[kv_head, head][:, np.newaxis] * value[:, kv_head])
            variance[kv_head, head] = np.square(together).sum(axis=0)
    smallest = np.minimum(weights, float(storage.smallest_subnormal) / 2 * weights.max(axis=-1, keepdims=True))
    at_most, lost = (np.einsum("kgt,tkd->kgd", of_tokens, np.abs(value)) for of_tokens in (weights, smallest))
    return unit * out + unit * np.minimum(PROBABLE * np.sqrt(variance / 3), at_most) + lost


def decode_check(
    out: Any,
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    kernel: str = "auto",
    *,
    rounds_weights: bool | None = None,
    **variants: Any,
) -> float:
    """Return the largest error of a decode result as a fraction of its budget: at most 1 is right, NaN is infinite.

    Parameters
    ----------
    out, query, block_tables, seq_lens : array
        The result and the arguments of `cupaged.paged_attention`, or some of their sequences.
    cache : KVCache
        The cache; only blocks of these sequences are read.
    kernel, rounds_weights, **variants
        Which kernel made the result of what call, see `decode_budget`.
    """
    budget = decode_budget(query, cache, block_tables, seq_lens, kernel, rounds_weights=rounds_weights, **variants)
    return budget.error_of(out)


def kernel_rounds_weights(query: Any, cache: KVCache, block_tables: Any, seq_lens: Any, **options: Any) -> bool:
    """Return whether the kernel that serves a call rounds the softmax's weights; `options` are those of the call."""
    return kernels()[explain(query, cache, block_tables, seq_lens, **options).kernel].rounds_weights


def verdict_on(error: float) -> dict[str, Any]:
    """Return the part of a result row that says whether it was right, of what `decode_check` returned."""
    status = "ok" if error <= 1 else f"wrong: error is {error:.3g} times the budget"
    return {"status": status, "error_of_budget": round(error, 4) if np.isfinite(error) else None}
