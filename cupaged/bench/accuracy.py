"""How wrong a right kernel may be: an error budget from the arithmetic, not a number picked until it passes.

The same mathematics is done once more in float32, on the same inputs (and with weights rounded to the storage type, for
kernels that do so), and its largest error against float64 is measured. A kernel may err by a small multiple of that, as
it sums in another order and has another exp, and by the rounding of its result to the storage type. Where few numbers
are summed that error can happen to be zero; a unit in the last place of the logits, which the exponential turns into a
relative error of the weights, is always allowed.

Why that also covers what a call can ask for besides plain decode:

- A logit l matters as far as its weight exp(l - lse), so the logits that matter are about as large as |lse|.
- Soft cap: cap * tanh(x / cap) is at most |x| and at most cap, its slope is at most 1, and kernels have it right to
  four units in the last place, less than one on average: an error of the logit's own size, no larger one.
- ALiBi: logit = x + bias, and the two may cancel, so that each errs by units in a last place larger than the sum's.
  |bias| is at most |logit| + |x|: the size of the logits without bias, seen in their log-sum-exp, is added.
- A sink is one more logit of the log-sum-exp; a window and several query tokens only choose which tokens take part.
"""

from __future__ import annotations

from dataclasses import dataclass
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
SAFETY = 4  # times what float32 loses


@dataclass(frozen=True)
class DecodeBudget:
    """The reference's result, and the largest error allowed of each output element and of a log-sum-exp.

    Attributes
    ----------
    expected, out : ndarray, float64, of the query's shape
        The result and its budget.
    expected_lse : ndarray, float64, without the last axis
        The log-sum-exp; -inf for an empty context.
    lse : float
        Its budget.
    """

    expected: np.ndarray
    out: np.ndarray
    expected_lse: np.ndarray
    lse: float

    def error_of(self, out: Any) -> float:
        """Return the largest error of a result as a fraction of its budget: at most 1 is right, NaN is infinite."""
        error = np.abs(reference.as_numpy(out).astype(np.float64) - self.expected) / self.out
        return float(np.where(np.isnan(error), np.inf, error).max(initial=0.0))


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
    weight_dtype = cache.config.numpy_dtype if rounds else None
    exact = reference.paged_attention(*arguments, return_lse=True, **variants)
    single = reference.paged_attention(
        *arguments, return_lse=True, dtype=np.float32, weight_dtype=weight_dtype, **variants
    )
    logits = 1 + _largest(exact[1])
    if variants.get("alibi_slopes") is not None:
        _, unbiased_lse = reference.paged_attention(*arguments, return_lse=True, **{**variants, "alibi_slopes": None})
        logits += _largest(unbiased_lse)
    return _budget(exact, single, cache.config.numpy_dtype, logits)


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
    exact = reference.paged_prefill(*arguments, return_lse=True, **options)
    storage = cache.config.numpy_dtype
    single = reference.paged_prefill(*arguments, return_lse=True, dtype=np.float32, weight_dtype=storage, **options)
    logits = 1 + _largest(exact[1])
    if options.get("alibi_slopes") is not None:
        logits += _largest(reference.paged_prefill(*arguments, return_lse=True, **{**options, "alibi_slopes": None})[1])
    return _budget(exact, single, storage, logits)


def merge_budget(outs: Any, lses: Any) -> DecodeBudget:
    """Return what `cupaged.merge_states` should give, and how far from it a right kernel may be."""
    merged = reference.merge_states(outs, lses)
    storage = reference.as_numpy(outs).dtype
    return _budget(merged, reference.merge_states(outs, lses, np.float32), storage, 1 + _largest(lses))


def _budget(
    exact: tuple[np.ndarray, np.ndarray], single: tuple[np.ndarray, np.ndarray], dtype: np.dtype, logits: float
) -> DecodeBudget:
    """Return the budget of a result in float64, from the same in float32 and the size of its logits."""
    (expected, expected_lse), (single_out, single_lse) = exact, single
    storage = ml_dtypes.finfo(dtype)
    finite = np.isfinite(expected_lse)
    least = FLOAT32_EPS * logits
    arithmetic = np.abs(single_out - expected).max(initial=0.0) + least * np.abs(expected).max(initial=0.0)
    rounding = np.abs(expected) * float(storage.eps) + float(storage.smallest_subnormal)
    arithmetic_lse = np.abs(single_lse[finite] - expected_lse[finite]).max(initial=0.0) + least
    return DecodeBudget(expected, SAFETY * arithmetic + rounding, expected_lse, SAFETY * float(arithmetic_lse))


def _largest(lse: Any) -> float:
    lse = reference.as_numpy(lse)
    return float(np.abs(lse[np.isfinite(lse)]).max(initial=0.0))


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
