"""What every kernel means, in float64 NumPy, written for reading; slow on purpose."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupaged.kv_cache import KVCache

__all__ = ["append_kv", "as_numpy", "attention", "paged_attention"]


def attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    scale: float,
    dtype: type = np.float64,
    weight_dtype: np.dtype | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return attention of one query token over a dense context, and the log-sum-exp of its logits.

    Parameters
    ----------
    query : ndarray, [H, D]
        Queries of all heads; head h reads KV head ``h // (H // Hkv)``.
    key, value : ndarray, [tokens, Hkv, D]
        The context; with no tokens the output is 0 and the log-sum-exp -inf.
    scale : float
        Factor of the logits.
    dtype : type
        What to compute in: float64, or float32 to see what that loses.
    weight_dtype : dtype, optional
        What the weights are rounded to before they meet the values, as tensor cores want them.

    Returns
    -------
    out : ndarray, [H, D]
    lse : ndarray, [H]
        Both of type `dtype`.
    """
    num_heads, head_dim = query.shape
    tokens, num_kv_heads, _ = key.shape
    if tokens == 0:
        return np.zeros((num_heads, head_dim), dtype), np.full(num_heads, -np.inf, dtype)
    grouped: np.ndarray = query.astype(dtype).reshape(num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits = dtype(scale) * np.einsum("kgd,tkd->kgt", grouped, key.astype(dtype))
    largest = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - largest)
    total = weights.sum(axis=-1, keepdims=True)
    if weight_dtype is not None:
        weights = weights.astype(weight_dtype).astype(dtype)
    out = np.einsum("kgt,tkd->kgd", weights / total, value.astype(dtype))
    lse = np.log(total) + largest
    return out.reshape(num_heads, head_dim), lse.reshape(num_heads)


def paged_attention(
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    scale: float | None = None,
    *,
    return_lse: bool = False,
    query_to_seq: Any = None,
    dtype: type = np.float64,
    weight_dtype: np.dtype | None = None,
) -> Any:
    """Return decode attention over a paged cache; the arguments are those of `cupaged.paged_attention`.

    Parameters
    ----------
    query : array, [num_seqs, H, D]
    cache : KVCache
    block_tables : array, int [num_seqs, max_blocks]
        -1 marks an unmapped block: its tokens take no part.
    seq_lens : array, int [num_seqs]
    scale : float, optional
        ``1 / sqrt(D)`` if not given.
    return_lse : bool
        Also return the log-sum-exp.
    query_to_seq : array, int [num_queries], optional
        The row of `block_tables` and `seq_lens` that each query belongs to.
    dtype, weight_dtype
        See `attention`.

    Returns
    -------
    out : ndarray, [num_seqs, H, D]
    lse : ndarray, [num_seqs, H]
        Only with `return_lse`; both of type `dtype`.
    """
    query, block_tables, seq_lens = (as_numpy(array) for array in (query, block_tables, seq_lens))
    if query_to_seq is not None:
        block_tables, seq_lens = block_tables[as_numpy(query_to_seq)], seq_lens[as_numpy(query_to_seq)]
    block_size = cache.config.block_size
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = np.zeros(query.shape, dtype)
    lse = np.full(query.shape[:2], -np.inf, dtype)
    for seq, seq_len in enumerate(seq_lens):
        tokens = np.arange(seq_len)
        blocks = block_tables[seq, tokens // block_size]
        mapped = blocks != -1
        used, which = np.unique(blocks[mapped], return_inverse=True)
        key, value = cache.blocks(used)
        slots = (tokens % block_size)[mapped]
        out[seq], lse[seq] = attention(query[seq], key[which, slots], value[which, slots], scale, dtype, weight_dtype)
    return (out, lse) if return_lse else out


def append_kv(dense_key: np.ndarray, dense_value: np.ndarray, key: Any, value: Any, slot_mapping: Any) -> None:
    """Write new tokens into dense caches, [num_blocks, block_size, Hkv, D], in place; a slot of -1 is skipped."""
    block_size = dense_key.shape[1]
    for token, slot in enumerate(as_numpy(slot_mapping)):
        if slot != -1:
            dense_key[slot // block_size, slot % block_size] = as_numpy(key)[token]
            dense_value[slot // block_size, slot % block_size] = as_numpy(value)[token]


def as_numpy(array: Any) -> np.ndarray:
    """Return a NumPy or CuPy array as NumPy."""
    return array.get() if hasattr(array, "get") else np.asarray(array)
