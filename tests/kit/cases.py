"""Decode cases under hostile conditions: whatever a kernel must not read is NaN or an illegal id."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np

import cupaged as pg
from cupaged.attention.choose import ATTENTION_KERNELS, DECODING
from cupaged.attention.kernels.v1 import V1

RUNGS = tuple(kernel.info.name for kernel in DECODING if not kernel.takes_plan and kernel is not V1)  # of the ladder
ILLEGAL_IDS = np.array([-7, -(2**31), 2**31 - 1, 10**6], dtype=np.int64)


@dataclass(frozen=True)
class DecodeShape:
    """What a decode case looks like; its name is the test's."""

    seq_lens: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: str = "float16"
    layout: str = "BSHD"
    unmapped: float = 0.0
    spread: float = 1.0
    query_tokens: int | None = None  # None: a query of three axes
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    shared_prefix: int = 0

    def __str__(self):
        lens = "+".join(map(str, self.seq_lens[:4]))
        extra = "-unmapped" if self.unmapped else ""
        extra += f"-Q{self.query_tokens}" if self.query_tokens else ""
        extra += f"-window{self.window}" if self.window else ""
        extra += f"-softcap{self.softcap:g}" if self.softcap else ""
        extra += "-alibi" * self.alibi + "-sinks" * self.sinks
        extra += f"-prefix{self.shared_prefix}" if self.shared_prefix else ""
        return (
            f"{self.layout}-{self.dtype}-D{self.head_dim}-bs{self.block_size}-"
            f"H{self.num_heads}/{self.num_kv_heads}-len{lens}{extra}"
        )


@dataclass
class DecodeCase:
    """Arguments of a decode call, on the backend: `arguments` by position, `variants` by name."""

    shape: DecodeShape
    cache: pg.KVCache
    query: object
    block_tables: object
    seq_lens: object
    variants: dict

    @property
    def arguments(self):
        return self.query, self.cache, self.block_tables, self.seq_lens


def decode_case(shape: DecodeShape, backend: str, seed: int = 0, placement: int | None = None) -> DecodeCase:
    """Build a case; `placement` seeds where blocks lie, apart from what they hold.

    Slots that hold no token of any sequence, or one that no query sees through its window, are NaN; table entries past
    a sequence's blocks, or wholly before the windows, are illegal ids. All rows begin with a shared prefix's blocks.
    """
    content, place = np.random.default_rng(seed), np.random.default_rng(seed if placement is None else placement)
    bs, lens = shape.block_size, np.array(shape.seq_lens, dtype=np.int64)
    blocks_of = -(-lens // bs)
    shared = shape.shared_prefix // bs
    num_blocks = shared + int(blocks_of.sum()) + 3
    cache = pg.KVCache(
        pg.CacheConfig(num_blocks, bs, shape.num_kv_heads, shape.head_dim, shape.dtype, shape.layout), backend
    )
    dtype = cache.config.numpy_dtype
    dense = [np.full((num_blocks, bs, shape.num_kv_heads, shape.head_dim), np.nan, dtype=dtype) for _ in "kv"]
    max_blocks = int(blocks_of.max(initial=shared)) + 2
    tables = content.choice(ILLEGAL_IDS, size=(len(lens), max_blocks))
    prefix, ids = np.split(place.permutation(num_blocks), [shared])
    for array in dense:
        rows = shape.spread * content.standard_normal((shared, bs, shape.num_kv_heads, shape.head_dim))
        array[prefix] = rows.astype(dtype)
    tables[:, :shared] = np.where(content.random(shared) < shape.unmapped, -1, prefix)
    firsts = np.maximum(lens - (shape.query_tokens or 1) - shape.window + 1, 0) if shape.window else 0 * lens
    for seq, (length, first, count) in enumerate(zip(lens, firsts, blocks_of, strict=True)):
        mine, ids = ids[:count], ids[count:]
        first = max(first, shape.shared_prefix)
        tables[seq, first // bs : count] = mine[first // bs :]
        tokens = np.arange(first, length)
        for array in dense:
            rows = shape.spread * content.standard_normal((len(tokens), shape.num_kv_heads, shape.head_dim))
            array[mine[tokens // bs], tokens % bs] = rows.astype(dtype)
        tables[seq, first // bs : count][content.random(max(0, count - first // bs)) < shape.unmapped] = -1
    cache.fill_from_dense(*dense)
    rows = (len(lens), *([shape.query_tokens] if shape.query_tokens else []), shape.num_heads)
    query = shape.spread * content.standard_normal((*rows, shape.head_dim))
    xp = cache.xp
    variants = {"window": shape.window, "softcap": shape.softcap, "shared_prefix": shape.shared_prefix or None}
    if shape.alibi:
        slopes = 2.0 ** (-8 * (np.arange(shape.num_heads) + 1) / shape.num_heads)  # as published
        variants["alibi_slopes"] = xp.asarray(slopes.astype(np.float32))
    if shape.sinks:
        variants["sinks"] = xp.asarray(3 * content.standard_normal(shape.num_heads).astype(np.float32))
    return DecodeCase(
        shape,
        cache,
        xp.asarray(query.astype(dtype)),
        xp.asarray(tables.astype(np.int32)),
        xp.asarray(lens.astype(np.int32)),
        {name: value for name, value in variants.items() if value is not None},
    )


def serving_kernels(case: DecodeCase) -> list[str]:
    """Return the attention kernels that serve a case; the others refuse it."""

    def serves(kernel):
        try:
            pg.explain(*case.arguments, kernel=kernel, **case.variants)
        except pg.UnsupportedError:
            return False
        return True

    return [kernel for kernel in ATTENTION_KERNELS if serves(kernel)]


def serves(kernel: str, shape: DecodeShape) -> bool:
    """Return whether an attention kernel serves the cache of a shape, and what is asked for; needs no cache."""
    config = pg.CacheConfig(1, shape.block_size, shape.num_kv_heads, shape.head_dim, shape.dtype, shape.layout)
    asked = {"query_tokens": (shape.query_tokens or 1) > 1, "window": shape.window, "softcap": shape.softcap,
             "alibi_slopes": shape.alibi, "sinks": shape.sinks}  # fmt: skip
    served = pg.kernels()[kernel].serves
    host = SimpleNamespace(backend="host", config=config)
    return served.why_not_cache(kernel, host) is None and {name for name in asked if asked[name]} <= served.variants


def random_shape(seed: int, specialisations: int) -> DecodeShape:
    """Return a shape that paged_attention_v1 serves, small enough to check by hand.

    What a kernel is compiled for comes from a list of `specialisations` entries, as each costs a build; the rest is
    drawn freely.
    """
    compiled = np.random.default_rng([0, seed % specialisations])
    dtypes, dims = ["float16", "bfloat16", "float32"], [64, 80, 96, 112, 128, 192, 256, 8 * compiled.integers(4, 33)]
    asked = {name for name in ("window", "softcap", "alibi", "sinks", "query_tokens") if compiled.random() < 0.4}
    if compiled.random() < 0.2:
        asked = set()
    block_size = int(compiled.choice([1, 2, 3, 7, 8, 16, 24, 32, 64, 100, 128, 255, 256, compiled.integers(1, 257)]))
    packed = compiled.random() < 0.25

    rng = np.random.default_rng([1, seed])
    window = int(rng.choice([1, 2, block_size, block_size + 1, rng.integers(1, 300), rng.integers(1, 40)]))
    query_tokens = int(rng.choice([1, 2, 3, 4, 5, 8, 11]))
    kv_heads = int(rng.integers(1, 4))
    edges = [0, 1, block_size - 1, block_size, block_size + 1, window, window + 1, query_tokens - 1]
    lens = [int(rng.choice([rng.choice(edges), rng.integers(0, 400)])) for _ in range(rng.integers(1, 6))]
    if rng.random() < 0.03:
        lens[-1] = int(rng.integers(4000, 9000))
    shared_prefix = 0
    if "window" not in asked and rng.random() < 0.3:
        shared_prefix = block_size * int(rng.integers(1, 1 + max(1, 300 // block_size)))
        lens = [length and length + shared_prefix + query_tokens for length in lens]
    return DecodeShape(
        seq_lens=tuple(lens),
        num_heads=kv_heads * int(rng.integers(1, 17)),
        num_kv_heads=kv_heads,
        head_dim=int(dims[seed % specialisations % len(dims)]),
        block_size=block_size,
        dtype=dtypes[seed % specialisations % len(dtypes)],
        layout="BHDSX" if packed else str(rng.choice(["BSHD", "BHSD", "HBSD", "BS2HD"])),
        unmapped=float(rng.choice([0.0, 0.0, 0.3])),
        spread=float(rng.choice([0.3, 1.0, 2.0])),
        query_tokens=query_tokens if "query_tokens" in asked else None,
        window=window if "window" in asked else None,
        softcap=float(rng.choice([0.5, 5.0, 30.0, 50.0])) if "softcap" in asked else None,
        alibi="alibi" in asked,
        sinks="sinks" in asked,
        shared_prefix=shared_prefix,
    )


def with_lens(shape: DecodeShape, *lens: int) -> DecodeShape:
    """Return the shape with other sequence lengths."""
    return replace(shape, seq_lens=lens)
