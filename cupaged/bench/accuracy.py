"""How wrong a right kernel may be: an error budget from the arithmetic, not a number picked until it passes.

The same mathematics is done once more in float32, on the same inputs (and with weights rounded to the storage type, for
kernels that do so), and its largest error against float64 is measured. A kernel may err by a small multiple of that, as
it sums in another order and has another exp, and by the rounding of its result to the storage type. Where few numbers
are summed that error can happen to be zero; a unit in the last place of the logits, which the exponential turns into a
relative error of the weights, is always allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cupaged import reference
from cupaged.kv_cache import KVCache
from cupaged.ops.attention import choose_kernel
from cupaged.ops.registry import kernels

__all__ = ["DecodeBudget", "decode_budget", "decode_check", "verdict_on"]

FLOAT32_EPS = float(np.finfo(np.float32).eps)
SAFETY = 4  # times what float32 loses


@dataclass(frozen=True)
class DecodeBudget:
    """The reference's result, and the largest error allowed of each output element and of a log-sum-exp.

    Attributes
    ----------
    expected, out : ndarray, float64 [num_seqs, H, D]
        The result and its budget.
    expected_lse : ndarray, float64 [num_seqs, H]
        The log-sum-exp; -inf for an empty context.
    lse : float
        Its budget.
    """

    expected: np.ndarray
    out: np.ndarray
    expected_lse: np.ndarray
    lse: float


def decode_budget(
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    kernel: str = "auto",
    *,
    rounds_weights: bool | None = None,
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
    """
    rounds = rounds_weights
    if rounds is None:
        rounds = kernels()[choose_kernel(query, cache, kernel).kernel].rounds_weights
    arguments = (query, cache, block_tables, seq_lens)
    expected, expected_lse = reference.paged_attention(*arguments, return_lse=True)
    single, single_lse = reference.paged_attention(
        *arguments, return_lse=True, dtype=np.float32, weight_dtype=cache.config.numpy_dtype if rounds else None
    )
    storage = ml_dtypes.finfo(cache.config.numpy_dtype)
    finite = np.isfinite(expected_lse)
    logits = 1 + np.abs(expected_lse[finite]).max(initial=0.0)
    least = FLOAT32_EPS * logits
    arithmetic = np.abs(single - expected).max(initial=0.0) + least * np.abs(expected).max(initial=0.0)
    rounding = np.abs(expected) * float(storage.eps) + float(storage.smallest_subnormal)
    arithmetic_lse = np.abs(single_lse[finite] - expected_lse[finite]).max(initial=0.0) + least
    return DecodeBudget(expected, SAFETY * arithmetic + rounding, expected_lse, SAFETY * float(arithmetic_lse))


def decode_check(
    out: Any,
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    kernel: str = "auto",
    *,
    rounds_weights: bool | None = None,
) -> float:
    """Return the largest error of a decode result as a fraction of its budget: at most 1 is right, NaN is infinite.

    Parameters
    ----------
    out, query, block_tables, seq_lens : array
        The result and the arguments of `cupaged.paged_attention`, or some of their sequences.
    cache : KVCache
        The cache; only blocks of these sequences are read.
    kernel, rounds_weights
        Which kernel made the result, see `decode_budget`.
    """
    budget = decode_budget(query, cache, block_tables, seq_lens, kernel, rounds_weights=rounds_weights)
    error = np.abs(reference.as_numpy(out).astype(np.float64) - budget.expected) / budget.out
    return float(np.where(np.isnan(error), np.inf, error).max(initial=0.0))


def verdict_on(error: float) -> dict[str, Any]:
    """Return the part of a result row that says whether it was right, of what `decode_check` returned."""
    status = "ok" if error <= 1 else f"wrong: error is {error:.3g} times the budget"
    return {"status": status, "error_of_budget": round(error, 4) if np.isfinite(error) else None}
