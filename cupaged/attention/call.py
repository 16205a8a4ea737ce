"""One call of attention: its arguments, checked once, and where its results go. It knows no kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cupaged.attention.logits import LOGITS_OPTIONS, Logits, checked_logits
from cupaged.attention.mask import MASK_OPTIONS, Mask, checked_mask
from cupaged.config import CacheConfig
from cupaged.errors import UnsupportedError
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import as_backend_array, check_alignment, empty_for, like_caller
from cupaged.ops.checks import (
    as_numpy,
    check_block_tables,
    check_cache,
    check_contiguous,
    check_dtype,
    check_query_start,
    check_query_to_seq,
    check_shape,
    check_shared_prefix,
    checked_flag,
    checked_out,
)

__all__ = [
    "ALL_VARIANTS",
    "EVEN",
    "QUERY_START",
    "QUERY_TO_SEQ",
    "AttentionCall",
    "Pages",
    "check_contents",
    "checked_call",
    "results_for",
    "with_results",
]

INT32 = np.dtype(np.int32)
MAX_TOKENS = 2**31 - 2**16  # of a sequence: a kernel's int may run past the last token by what it reads at once
EVEN, QUERY_TO_SEQ, QUERY_START = "even", "query_to_seq", "query_start"  # how queries belong to sequences
ALL_VARIANTS = MASK_OPTIONS | LOGITS_OPTIONS


@dataclass(frozen=True)
class Pages:
    """Where the tokens of each sequence lie, and which queries are whose.

    Attributes
    ----------
    block_tables, seq_lens : array, int32 [num_seqs, max_blocks], [num_seqs]
        Block ids of each sequence in order, and its tokens.
    query_start : array, int32 [num_seqs + 1], optional
        Where each sequence's queries begin.
    query_to_seq : array, int32 [num_queries], optional
        The sequence of each query. Without either, every sequence has the same number of queries.
    """

    block_tables: Any
    seq_lens: Any
    query_start: Any = None
    query_to_seq: Any = None

    @property
    def queries(self) -> str:
        """How queries belong to sequences: `EVEN`, `QUERY_TO_SEQ` or `QUERY_START`."""
        if self.query_start is not None:
            return QUERY_START
        return EVEN if self.query_to_seq is None else QUERY_TO_SEQ

    @property
    def arrays(self) -> dict[str, Any]:
        """Those that a call has, by the names of the arguments."""
        needed = ("block_tables", "seq_lens")
        return {name: array for name, array in vars(self).items() if array is not None or name in needed}


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one call, all checked; arrays are the backend's own.

    Attributes
    ----------
    query : array
        [num_seqs, H, D] or [num_seqs, Q, H, D], [num_queries, H, D] with `query_to_seq`, or [total_tokens, H, D] with
        `query_start`.
    cache : KVCache
        Keys and values.
    pages, mask, logits
        Where tokens lie, who sees whom, and what a logit is.
    out, lse : array, optional
        Where results go; `lse` is None where no log-sum-exp is asked for. Both are None in a call that is only asked
        about.
    """

    query: Any
    cache: KVCache
    pages: Pages
    mask: Mask
    logits: Logits
    out: Any = None
    lse: Any = None

    @property
    def config(self) -> CacheConfig:
        """The cache's."""
        return self.cache.config

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return int(self.query.shape[-2])

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.config.num_kv_heads

    @property
    def num_seqs(self) -> int:
        """Sequences."""
        return int(self.pages.seq_lens.shape[0])

    @property
    def max_blocks(self) -> int:
        """Blocks that the table has room for in each sequence."""
        return int(self.pages.block_tables.shape[1])

    @property
    def options(self) -> frozenset[str]:
        """Those of `ALL_VARIANTS` that are asked for; none for plain decode."""
        return self.mask.options | self.logits.options

    @property
    def defines(self) -> dict[str, int]:
        """Defines of a kernel that switch on what is asked for."""
        return {"ALIBI" if name == "alibi_slopes" else name.upper(): 1 for name in sorted(self.options)}

    @property
    def on_three_axes(self) -> AttentionCall:
        """The call with its query as [rows, H, D], the query tokens of a sequence in order, and its results alike."""
        if self.query.ndim == 3:
            return self
        shape = (-1, *self.query.shape[-2:])
        lse = None if self.lse is None else self.lse.reshape(shape[:2])
        return replace(self, query=self.query.reshape(shape), out=self.out.reshape(shape), lse=lse)

    def as_decode(self, query_tokens: int) -> AttentionCall:
        """Return a call with `query_start` as one whose sequences all have so many query tokens."""
        rows = (self.num_seqs, query_tokens, self.num_heads)
        return replace(
            self,
            query=self.query.reshape(*rows, -1),
            pages=Pages(self.pages.block_tables, self.pages.seq_lens),
            mask=replace(self.mask, query_tokens=query_tokens),
            out=self.out.reshape(*rows, -1),
            lse=None if self.lse is None else self.lse.reshape(rows),
        )


def checked_call(query: Any, cache: KVCache, pages: Pages, mask: Mask, logits: Logits) -> AttentionCall:
    """Return a call without results whose arguments are checked, all but what arrays hold, or raise by name."""
    check_cache(cache)
    query = as_backend_array(query, "query", cache.backend)
    pages = Pages(**{name: as_backend_array(array, name, cache.backend) for name, array in pages.arrays.items()})
    queries, config = pages.queries, cache.config
    _check_query(query, config, queries)
    _check_pages(pages, query.shape[0], config.block_size)
    query_tokens = None if queries == QUERY_START else query.shape[1] if query.ndim == 4 else 1
    logits = checked_logits(logits, query.shape[-2], config.head_dim, cache.backend)
    mask = checked_mask(replace(mask, query_tokens=query_tokens), config.block_size, pages.block_tables.shape[1])
    return AttentionCall(query, cache, pages, mask, logits)


def with_results(call: AttentionCall, caller: Any, out: Any, return_lse: Any) -> AttentionCall:
    """Return a call with room for its results: in `out` if it is given, else in arrays that suit `caller`, its query.

    Raises
    ------
    TypeError, ValueError
        If `out` does not suit the call, or `return_lse` is no flag.
    """
    query, backend = call.query, call.cache.backend
    wants_lse = checked_flag(return_lse, "return_lse")
    if out is None:
        result = empty_for(caller, query.shape, query.dtype, backend)
    else:
        of_heads = {"alibi_slopes": call.logits.alibi_slopes, "sinks": call.logits.sinks}
        result = checked_out(out, query, call.cache, **call.pages.arrays, **of_heads)
    lse = empty_for(caller, query.shape[:-1], np.float32, backend) if wants_lse else None
    return replace(call, out=result, lse=lse)


def results_for(caller: Any, call: AttentionCall, out: Any) -> Any:
    """Return what a call returns: arrays of the kind that `caller`, its query, is, or the caller's own `out`."""
    result = like_caller(call.out, caller) if out is None else out
    return result if call.lse is None else (result, like_caller(call.lse, caller))


def check_contents(call: AttentionCall) -> None:
    """Read tables, lengths and where queries belong, and raise ValueError for what no kernel may be given."""
    pages, mask = call.pages, call.mask
    new_tokens: Any = mask.query_tokens
    if pages.query_start is not None:
        check_query_start(pages.query_start, call.query.shape[0])
        new_tokens = np.diff(as_numpy(pages.query_start).astype(np.int64))
    check_block_tables(call.cache, pages.block_tables, pages.seq_lens, new_tokens, mask.window)
    check_query_to_seq(pages.query_to_seq, call.num_seqs)
    if mask.shared_prefix:
        block_size = call.config.block_size
        check_shared_prefix(mask.shared_prefix, block_size, pages.block_tables, pages.seq_lens, new_tokens)


def _check_query(query: Any, config: CacheConfig, queries: str) -> None:
    check_dtype(query, "query", config.numpy_dtype)
    several = ("Q",) if query.ndim == 4 and queries != QUERY_START else ()
    rows = "total_tokens" if queries == QUERY_START else "num_seqs"
    check_shape(query, "query", (rows, *several, "H", config.head_dim))
    num_heads = query.shape[-2]
    if num_heads == 0 or num_heads % config.num_kv_heads:
        raise ValueError(
            f"query must have a number of heads that is a multiple of the cache's {config.num_kv_heads} KV heads; "
            f"got {num_heads}"
        )
    check_contiguous(query, "query")
    if query.size:
        check_alignment(query, "query")
    rows_of_heads = query.size // config.head_dim
    if rows_of_heads > 2**31 - 1:
        raise UnsupportedError(f"query must have at most 2**31 - 1 (query token, head) pairs; got {rows_of_heads}")


def _check_pages(pages: Pages, num_queries: int, block_size: int) -> None:
    for name, array in pages.arrays.items():
        check_dtype(array, name, INT32)
    num_rows = num_queries if pages.queries == EVEN else "num_seqs"
    check_shape(pages.block_tables, "block_tables", (num_rows, "max_blocks"))
    num_seqs, max_blocks = pages.block_tables.shape
    check_shape(pages.seq_lens, "seq_lens", (num_seqs,))
    if pages.query_start is not None:
        check_shape(pages.query_start, "query_start", (num_seqs + 1,))
    if pages.query_to_seq is not None:
        check_shape(pages.query_to_seq, "query_to_seq", (num_queries,))
    for name, array in pages.arrays.items():
        check_contiguous(array, name)
    if max_blocks * block_size > MAX_TOKENS:
        raise UnsupportedError(
            f"block_tables must map at most {MAX_TOKENS} tokens a sequence; got {max_blocks} blocks of {block_size}"
        )
