"""How wrong a right kernel may be: an error budget from the arithmetic, not a number picked until it passes.

A weight of the softmax is the exponential of a logit, so its relative error is the logit's absolute one: a float32
dot product errs by a few units in the last place of the largest logit. The output is a weighted mean of values, so it
errs by that fraction of the largest value, and once more when it is rounded to the storage type. The budget is twice
what the same mathematics loses that way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cupaged import reference
from cupaged.kv_cache import KVCache

__all__ = ["DecodeBudget", "decode_budget", "decode_check"]

FLOAT32_EPS = float(np.finfo(np.float32).eps)
ROUNDINGS = 8  # at the logits' scale: a dot product, a scaling, exp2f, two sums
SAFETY = 2


@dataclass(frozen=True)
class DecodeBudget:
    """The largest error allowed: of each output element, and of a log-sum-exp."""

    out: np.ndarray
    lse: float


def decode_budget(
    expected: np.ndarray, expected_lse: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float
) -> DecodeBudget:
    """Return the budget of a decode result.

    Parameters
    ----------
    expected, expected_lse : ndarray, float64 [num_seqs, H, D] and [num_seqs, H]
        The reference's result.
    query : ndarray, [num_seqs, H, D]
        In the storage type.
    key, value : ndarray, [..., D]
        All rows that may take part; NaN in slots that hold no token is left out.
    scale : float
        Factor of the logits.
    """
    dtype = ml_dtypes.finfo(query.dtype)
    key_norm = np.sqrt(np.nansum(key.astype(np.float64) ** 2, axis=-1).max(initial=0.0))
    query_norm = np.sqrt((query.astype(np.float64) ** 2).sum(axis=-1)).max(initial=0.0)
    finite = np.abs(expected_lse[np.isfinite(expected_lse)]).max(initial=0.0)
    logits = 1 + max(query_norm * key_norm * abs(scale), finite)
    values = np.nanmax(np.abs(value.astype(np.float64)), initial=0.0)
    rounding = np.abs(expected) * float(dtype.eps) + float(dtype.smallest_subnormal)
    arithmetic = ROUNDINGS * FLOAT32_EPS * logits
    return DecodeBudget(SAFETY * (arithmetic * values + rounding), SAFETY * arithmetic)


def decode_check(out: Any, query: Any, cache: KVCache, block_tables: Any, seq_lens: Any) -> float:
    """Return the largest error of a decode result as a fraction of its budget: at most 1 is right.

    Parameters
    ----------
    out, query, block_tables, seq_lens : array
        The result and the arguments of `cupaged.paged_attention`, or some of their sequences.
    cache : KVCache
        The cache; only blocks of these sequences are read.
    """
    out, query, block_tables, seq_lens = (reference.as_numpy(a) for a in (out, query, block_tables, seq_lens))
    expected, lse = reference.paged_attention(query, cache, block_tables, seq_lens, return_lse=True)
    mapped = np.arange(block_tables.shape[1]) < -(-seq_lens // cache.config.block_size)[:, None]
    key, value = cache.blocks(np.unique(block_tables[mapped & (block_tables >= 0)]))
    budget = decode_budget(expected, lse, query, key, value, query.shape[-1] ** -0.5)
    error = np.abs(out.astype(np.float64) - expected) / budget.out
    return float(np.where(np.isnan(error), np.inf, error).max(initial=0.0))
