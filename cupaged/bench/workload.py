"""A decode call to measure: a filled cache, block tables placed in order or at random, queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupaged.attention.api import (
    DecodePlan,
    PrefillPlan,
    paged_attention,
    paged_prefill,
    plan_decode,
    plan_prefill,
)
from cupaged.attention.choose import explain
from cupaged.bench.accuracy import DecodeBudget, decode_budget, kernel_rounds_weights
from cupaged.config import CacheConfig
from cupaged.kv_cache import KVCache, aligned_zeros
from cupaged.reference import as_numpy

__all__ = [
    "PLACEMENTS",
    "PREFILL_WORKLOADS",
    "WORKLOADS",
    "DecodeStep",
    "DecodeWorkload",
    "PrefillStep",
    "PrefillWorkload",
    "decode_call",
    "decode_workload",
    "lognormal",
    "prefill_call",
]

PLACEMENTS = ("sequential", "random")


@dataclass(frozen=True)
class DecodeWorkload:
    """The arguments of `cupaged.paged_attention`, and the bytes of keys and values that it must read."""

    query: Any
    cache: KVCache
    block_tables: Any
    seq_lens: Any
    kv_bytes: int
    _budgets: dict[tuple[bool, bool], DecodeBudget] = field(init=False, default_factory=dict, repr=False, compare=False)

    @property
    def arguments(self) -> tuple[Any, KVCache, Any, Any]:
        """Query, cache, block tables, lengths."""
        return self.query, self.cache, self.block_tables, self.seq_lens

    def some(self, seqs: slice) -> tuple[Any, KVCache, Any, Any]:
        """Return the arguments of some sequences."""
        return self.query[seqs], self.cache, self.block_tables[seqs], self.seq_lens[seqs]

    def error_of(
        self, out: Any, kernel: str = "auto", *, rounds_weights: bool | None = None, only_longest: bool = False
    ) -> float:
        """Return the largest error of a result of these arguments as a fraction of its budget: at most 1 is right.

        All of the result must be finite; the longest sequence and, unless `only_longest`, the last are held to the
        reference. What they should be is worked out once, for all kernels that round alike; `kernel` and
        `rounds_weights` are those of `decode_budget`.
        """
        found = as_numpy(out)
        if not np.isfinite(found.astype(np.float32)).all():
            return float("inf")
        rounds = kernel_rounds_weights(*self.arguments, kernel=kernel) if rounds_weights is None else rounds_weights
        longest, last = int(self.seq_lens.argmax()), len(self.seq_lens) - 1
        seqs = [longest] if only_longest else sorted({longest, last})
        key = rounds, only_longest
        if key not in self._budgets:
            chosen = self.cache.xp.asarray(seqs)
            query, tables, lens = (array[chosen] for array in (self.query, self.block_tables, self.seq_lens))
            self._budgets[key] = decode_budget(query, self.cache, tables, lens, rounds_weights=rounds)
        return self._budgets[key].error_of(found[seqs])

    @property
    def flop(self) -> int:
        """Multiplications and additions of the two products that attention is made of."""
        _, num_heads, head_dim = self.query.shape
        return 4 * num_heads * head_dim * int(self.seq_lens.sum())


@dataclass(frozen=True)
class DecodeStep:
    """One decode step to build workloads from: query heads, KV heads, and the context of each sequence in tokens."""

    name: str
    num_heads: int
    num_kv_heads: int
    seq_lens: tuple[int, ...]
    head_dim: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"

    def build(self, backend: str, seed: int = 0, **changes: Any) -> DecodeWorkload:
        """Return the arguments of a call; `changes` are arguments of `decode_workload`."""
        arguments = {"dtype": self.dtype, "backend": backend, "seed": seed, **changes}
        return decode_workload(
            self.seq_lens, self.num_heads, self.num_kv_heads, self.head_dim, self.block_size, **arguments
        )


def lognormal(count: int, longest: int) -> tuple[int, ...]:
    """Return context lengths as they are met in serving: most short, few long."""
    lens = np.random.default_rng(0).lognormal(6.6, 0.9, count)
    return tuple(int(n) for n in np.clip(lens, 1, longest))


WORKLOADS = (
    DecodeStep("mha 32/32 b32 1k", 32, 32, (1024,) * 32),
    DecodeStep("gqa 32/8 b64 4k", 32, 8, (4096,) * 64),
    DecodeStep("gqa 32/8 b1 128k", 32, 8, (131072,)),
    DecodeStep("gqa 32/8 b8 1k", 32, 8, (1024,) * 8),
    DecodeStep("gqa 64/8 b16 8k", 64, 8, (8192,) * 16),
    DecodeStep("mqa 8/1 b128 2k", 8, 1, (2048,) * 128),
    DecodeStep("gqa 32/8 b64 lognormal", 32, 8, lognormal(64, 8192)),
    DecodeStep("gqa 32/8 b32 one long", 32, 8, (65536,) + (256,) * 31),
)


@dataclass(frozen=True)
class PrefillWorkload:
    """The arguments of `cupaged.paged_prefill`, and what it must read and compute."""

    query: Any
    cache: KVCache
    block_tables: Any
    seq_lens: Any
    query_start: Any
    kv_bytes: int
    flop: int

    @property
    def arguments(self) -> tuple[Any, KVCache, Any, Any, Any]:
        """Query, cache, block tables, lengths, starts."""
        return self.query, self.cache, self.block_tables, self.seq_lens, self.query_start

    def tokens(self, seq: int, positions: Sequence[int]) -> tuple[Any, tuple[Any, KVCache, Any, Any]]:
        """Return where some tokens of a sequence stand in the query, and what they ask for as decode calls."""
        xp, end, length = self.cache.xp, int(self.query_start[seq + 1]), int(self.seq_lens[seq])
        rows = xp.asarray([end - length + position for position in positions])
        tables = xp.repeat(self.block_tables[seq : seq + 1], len(positions), axis=0)
        lens = xp.asarray([position + 1 for position in positions], dtype=np.int32)
        return rows, (self.query[rows], self.cache, tables, lens)


@dataclass(frozen=True)
class PrefillStep:
    """One prefill to build workloads from: each of `num_seqs` sequences has `new` tokens, the last of its context."""

    name: str
    num_heads: int
    num_kv_heads: int
    new: int
    num_seqs: int
    context: int
    head_dim: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"

    def build(self, backend: str, seed: int = 0) -> PrefillWorkload:
        """Return the arguments of a call, blocks at random."""
        decode = decode_workload(
            (self.context,) * self.num_seqs, self.num_heads, self.num_kv_heads, self.head_dim, self.block_size,
            dtype=self.dtype, backend=backend, seed=seed,
        )  # fmt: skip
        rng = np.random.default_rng([1, seed])
        shape = (self.new * self.num_seqs, self.num_heads, self.head_dim)
        query = rng.standard_normal(shape, dtype=np.float32).astype(decode.cache.config.numpy_dtype)
        starts = np.arange(self.num_seqs + 1, dtype=np.int32) * self.new
        seen = self.num_seqs * (self.new * (self.context - self.new) + self.new * (self.new + 1) // 2)
        return PrefillWorkload(
            _place(query, decode.cache), decode.cache, decode.block_tables, decode.seq_lens,
            _place(starts.astype(np.int32), decode.cache), decode.kv_bytes, 4 * self.num_heads * self.head_dim * seen,
        )  # fmt: skip


PREFILL_WORKLOADS = (
    PrefillStep("prefill 4x4096", 32, 8, 4096, 4, 4096),
    PrefillStep("prefill 1x16384", 32, 8, 16384, 1, 16384),
    PrefillStep("chunk 8x512 over 8k", 32, 8, 512, 8, 8192),
    PrefillStep("spec 64x4 over 4k", 32, 8, 4, 64, 4096),
    PrefillStep("prefill 16x512 mha", 32, 32, 512, 16, 512),
)


def prefill_call(work: PrefillWorkload, out: Any = None, few: bool = False) -> Callable[[], Any]:
    """Return a call of paged_prefill on a workload: nothing is checked or read back; the plan is made here, once.

    With `few`, all sequences have as many new tokens, and are planned as decode with that many query tokens.
    """
    plan: DecodePlan | PrefillPlan
    (total_tokens, num_heads), num_seqs = work.query.shape[:2], len(work.seq_lens)
    if few:
        plan = plan_decode(work.cache, work.seq_lens, num_heads, query_tokens=total_tokens // num_seqs)
    else:
        plan = plan_prefill(work.cache, work.seq_lens, work.query_start, total_tokens, num_heads)
    return lambda: paged_prefill(*work.arguments, out=out, plan=plan, validate=False)


def decode_call(work: DecodeWorkload, kernel: str = "auto", out: Any = None, **options: Any) -> Callable[[], Any]:
    """Return a call that launches a kernel on a workload: nothing is checked or read back.

    Where the kernel takes a plan it is made here, once, as one plan serves all layers of a step. `options` are further
    ones of `paged_attention`.
    """
    chosen = explain(*work.arguments, kernel=kernel)
    plan = None
    if chosen.served_by.takes_plan:
        plan = plan_decode(work.cache, work.seq_lens, work.query.shape[1], window=options.get("window"))
    return lambda: paged_attention(*work.arguments, kernel=chosen.kernel, out=out, plan=plan, validate=False, **options)


def decode_workload(
    seq_lens: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    *,
    dtype: str = "float16",
    layout: str = "BSHD",
    placement: str = "random",
    backend: str,
    seed: int = 0,
) -> DecodeWorkload:
    """Return a workload whose cache holds standard normal values in every slot.

    Parameters
    ----------
    seq_lens : sequence of int
        Context of each sequence in tokens.
    num_heads, num_kv_heads, head_dim, block_size, dtype, layout
        See `cupaged.CacheConfig`.
    placement : {"sequential", "random"}
        Whether the blocks of a sequence are neighbours in the pool, or anywhere.
    backend : {"cuda", "host"}
        Where the arrays lie.
    seed : int
        Of the values and the placement.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}; got {placement!r}")
    rng = np.random.default_rng(seed)
    lens = np.asarray(seq_lens, dtype=np.int32)
    blocks_of = -(-lens // block_size)
    num_blocks = max(1, int(blocks_of.sum()))
    cache = KVCache(CacheConfig(num_blocks, block_size, num_kv_heads, head_dim, dtype, layout), backend)
    ids = np.arange(num_blocks) if placement == "sequential" else rng.permutation(num_blocks)
    tables = np.full((len(lens), max(1, int(blocks_of.max(initial=0)))), -1, dtype=np.int32)
    for row, first, count in zip(tables, np.cumsum(blocks_of) - blocks_of, blocks_of, strict=True):
        row[:count] = ids[first : first + count]
    for array in cache.storage:
        _fill(array, cache, rng)
    query = rng.standard_normal((len(lens), num_heads, head_dim)).astype(cache.config.numpy_dtype)
    kv_bytes = int(lens.sum()) * cache.config.bytes_per_token
    return DecodeWorkload(_place(query, cache), cache, _place(tables, cache), _place(lens, cache), kv_bytes)


def _fill(array: Any, cache: KVCache, rng: np.random.Generator) -> None:
    """Fill with normal values, a piece at a time: the float32 values take more room than the cache's own."""
    flat = array.reshape(-1)
    generator = rng if cache.backend == "host" else cache.xp.random.default_rng(int(rng.integers(2**31)))
    for first in range(0, flat.size, 1 << 26):
        piece = flat[first : first + (1 << 26)]
        piece[...] = generator.standard_normal(piece.size, dtype=np.float32).astype(piece.dtype)


def _place(array: np.ndarray, cache: KVCache) -> Any:
    """Move an array to the backend; on the host, to where a GPU's allocator would let it start."""
    if cache.backend != "host":
        return cache.xp.asarray(array)
    placed = aligned_zeros(array.shape, array.dtype)
    placed[...] = array
    return placed
