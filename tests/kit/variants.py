"""Covering sets of defines: every kernel, every branch that a define selects."""

from __future__ import annotations

import numpy as np

import cupaged as pg
from cupaged import layouts
from cupaged.attention.call import Pages, checked_call, with_results
from cupaged.attention.choose import DECODING
from cupaged.attention.kernel import row_defines
from cupaged.attention.kernels.partitions import MERGE
from cupaged.attention.kernels.v1 import v1_defines
from cupaged.attention.logits import Logits
from cupaged.attention.mask import Mask
from cupaged.ops.textures import LOAD_PATHS
from cupaged.runtime.source import KernelSource

CONFIGS = [
    pg.CacheConfig(4, block_size, 2, head_dim, dtype, layout)
    for dtype, head_dim, block_size, layout in (
        ("float16", 128, 16, "BSHD"),
        ("float16", 256, 32, "BHDSX"),
        ("float16", 72, 7, "BHDSX"),
        ("float16", 40, 1, "HBSD"),
        ("bfloat16", 128, 16, "BHDSX"),
        ("bfloat16", 80, 24, "BS2HD"),
        ("bfloat16", 192, 256, "BHSD"),
        ("float32", 32, 16, "BSHD"),
        ("float32", 256, 2, "BHDSX"),
        ("float32", 120, 100, "BSHD"),
    )
]


TABLE_BLOCKS = 2048  # so many that contexts are cut into partitions, which are merged


def launched(kernel, config, i=0, **asked):
    """Yield file, entry and defines of all that an attention kernel launches for a call over a cache.

    `i` varies what follows from the call's shape; `asked` are options of the mask and the logits.
    """
    heads = config.num_kv_heads * (4 - i % 4)
    tokens = (asked.pop("query_tokens"),) if "query_tokens" in asked else ()
    query = np.zeros((1, *tokens, heads, config.head_dim), config.numpy_dtype)
    pages = Pages(np.zeros((1, TABLE_BLOCKS), np.int32), np.zeros(1, np.int32))
    mask, logits = Mask(window=asked.pop("window", None)), Logits(**asked)
    call = with_results(checked_call(query, pg.KVCache(config, "host"), pages, mask, logits), query, None, False)
    if kernel.why_not(call) is None:
        for launch in kernel.prepare(call, None):
            source = launch.kernel.source
            yield source.file, source.entry, dict(source.defines)


def asked_for(kernel, i):
    """Return what calls ask a kernel for: nothing, and all that it takes or one of it, as `i` says."""
    heads = np.zeros(CONFIGS[0].num_kv_heads * (4 - i % 4), np.float32)
    values = {"query_tokens": 2, "window": 20, "softcap": 1.0, "alibi_slopes": heads, "sinks": heads}
    taken = [name for name in values if name in kernel.info.variants]
    chosen = taken if i == 0 else taken[i : i + 1]
    return [{}, {name: values[name] for name in chosen}] if chosen else [{}]


CONFIGS_OF_RUNGS = CONFIGS[::3]  # halves, bfloat16 and float32, rows of every alignment, BHDSX


def rung_variants():
    """Return file, entry and defines of every attention kernel without a plan, and of what merges after it."""
    for i, config in enumerate(CONFIGS_OF_RUNGS):
        for kernel in DECODING:
            if not kernel.takes_plan:
                for asked in asked_for(kernel, i):
                    yield from launched(kernel, config, i, **asked)
        asked = dict.fromkeys(("QUERY_TOKENS", "WINDOW", "SINKS")[: i % 3 + 1], 1)  # which v2 is not asked for alone
        yield MERGE.file, MERGE.name, {**{name: row_defines(config)[name] for name in ("STORAGE", "HEAD_DIM")}, **asked}


def texture_variants():
    """Return file, entry and defines of attention by every path of loads, and of what fills arrays."""
    for i, path in enumerate(LOAD_PATHS):
        config, tiles = CONFIGS[(0, 3, 5, 7, 0, 3, 7)[i]], 1 + i % 2
        defines = row_defines(config)
        floats = int(LOAD_PATHS[path] is not None)
        defines |= {"LOAD_PATH": path, "TEXEL_FLOATS": floats, "TEXTURE_TILES": tiles if floats else 1}
        yield "attention/paged_attention_texture.cu", "paged_attention_texture", defines
        if floats:
            asked = {"TEXEL_FLOATS": 0, "TEXTURE_TILES": 3 - tiles}
            yield "attention/paged_attention_texture.cu", "paged_attention_texture", {**defines, **asked}
        chase = {"HEAD_DIM": 32, "BLOCK_SIZE": 16, "LOAD_PATH": path, "TEXTURE_TILES": defines["TEXTURE_TILES"]}
        yield "bench/pointer_chase.cu", "pointer_chase", chase
        yield "bench/gather_paths.cu", "gather_paths", {**chase, "STORAGE": "__half", "HEADS": 3}
    for config, slot, texel in ((CONFIGS[0], "int", 8), (CONFIGS[5], "long long", 16), (CONFIGS[7], "int", 16)):
        defines = row_defines(config)
        yield "cache/write_texture.cu", "write_texture", {**defines, "SLOT": slot, "TEXEL_BYTES": texel}


def append_defines(config, slot):
    """Return the defines of append_kv for a cache."""
    defines = v1_defines(config)
    del defines["VALUE_COLUMNS"]
    return {**defines, "VALUE_PACK": layouts.kv_strides(config, "value").pack_size, "SLOT": slot}


def all_variants():
    """Return the source of every kernel over its covering set of defines, each once."""
    v1 = [
        ("attention/paged_attention_v1.cu", "paged_attention_v1", {**v1_defines(config), **asked})
        for i, config in enumerate(CONFIGS)
        for asked in ({}, dict.fromkeys(VARIANTS[i % len(VARIANTS)], 1))
    ]
    append = [
        ("cache/append_kv.cu", "append_kv", append_defines(config, ("int", "long long")[i % 2]))
        for i, config in enumerate(CONFIGS)
    ]
    rope = [
        ("cache/rope_append_kv.cu", "rope_append_kv",
         {**append_defines(config, ("int", "long long")[i % 2]), "ROTARY_DIM": config.head_dim // 32 * 16 or 16,
          "INTERLEAVED": i % 2})
        for i, config in enumerate(CONFIGS)
    ]  # fmt: skip
    computed = [(*v1[i][:2], {**v1[i][2], "TABLE_LOOKUP": 0}) for i in (0, 8)]
    gather = [
        ("bench/gather_lookup.cu", "gather_lookup", {"ROW": 512, "BLOCK_SIZE": 7, "UNIT": unit, "TABLE_LOOKUP": lookup})
        for unit, lookup in ((1, 1), (8, 0), (512, 1))
    ]
    persistent = [
        ("attention/paged_attention_persistent.cu", "paged_attention_persistent", defines)
        for defines in PERSISTENT_DEFINES
    ]
    prefill = [("attention/paged_prefill.cu", "paged_prefill", defines) for defines in PREFILL_DEFINES]
    mma = [("attention/paged_attention_mma.cu", "paged_attention_mma", defines) for defines in MMA_DEFINES]
    merge = [
        ("attention/merge_states.cu", "merge_states", {"STORAGE": storage})
        for storage in ("__half", "__nv_bfloat16", "float")
    ]
    sampling = [
        ("sampling/sample.cu", "sample", {"STORAGE": logit, "WARPS": warps})
        for logit, warps in (("__half", 1), ("__nv_bfloat16", 8), ("float", 32))
    ]
    engine = [
        (f"engine/{entry}.cu", entry, {"STORAGE": storage})
        for entry in ("rms_norm", "swiglu")
        for storage in ("__half", "__nv_bfloat16", "float")
    ]
    rest = [
        ("bench/read_stream.cu", "read_stream", {}),
        ("bench/copy_stream.cu", "copy_stream", {"IN_FLIGHT": 2, "STREAMING": 1}),
        ("bench/copy_stream.cu", "copy_stream", {"IN_FLIGHT": 8, "STREAMING": 0}),
        ("attention/plan_decode.cu", "plan_decode", {}),
        ("attention/plan_prefill.cu", "plan_prefill", {}),
        ("cache/copy_blocks.cu", "copy_blocks", {}),
    ]
    groups = (
        v1,
        computed,
        rung_variants(),
        texture_variants(),
        mma,
        persistent,
        prefill,
        merge,
        append,
        rope,
        gather,
        engine,
        sampling,
        rest,
    )
    found = {}
    for group in groups:
        for file, entry, defines in group:
            found.setdefault((file, entry, *sorted((name, str(value)) for name, value in defines.items())), defines)
    return [KernelSource.read(*known[:2], defines) for known, defines in found.items()]


VARIANTS = [
    ("QUERY_TOKENS",),
    ("WINDOW",),
    ("SOFTCAP",),
    ("ALIBI",),
    ("SINKS",),
    ("QUERY_TOKENS", "WINDOW", "SOFTCAP", "ALIBI", "SINKS"),
]
MMA_DEFINES = [
    {"STORAGE": storage, "HEAD_DIM": head_dim, "BLOCK_SIZE": block_size, "ROWS": rows}
    for storage, head_dim, block_size, rows in (
        ("__half", 128, 16, 8),
        ("__half", 80, 7, 16),
        ("__nv_bfloat16", 32, 1, 8),
        ("__nv_bfloat16", 256, 256, 16),
    )
]
PERSISTENT_DEFINES = [
    {
        "STORAGE": storage, "HEAD_DIM": head_dim, "BLOCK_SIZE": block_size,
        "ROWS": rows, "WARPS": warps, "STAGES": stages, "CHUNK_TOKENS": chunk,
        **(asked if isinstance(asked, dict) else dict.fromkeys(asked, 1)),
    }
    for storage, head_dim, block_size, rows, warps, stages, chunk, asked in (
        ("__half", 128, 16, 8, 8, 2, 16, ()),
        ("__half", 64, 7, 16, 8, 2, 32, ("WINDOW",)),
        ("__nv_bfloat16", 32, 1, 8, 8, 3, 32, ("ALIBI", "SINKS")),
        ("__nv_bfloat16", 80, 24, 16, 4, 2, 32, ("QUERY_TOKENS",)),
        ("__nv_bfloat16", 256, 256, 8, 2, 2, 16, ("SOFTCAP",)),
        ("__nv_bfloat16", 192, 64, 16, 4, 2, 16, VARIANTS[-1]),
        ("__half", 128, 16, 32, 8, 2, 16, {"QUERY_TOKENS": 1, "SHARED_PREFIX": 1}),
        ("__nv_bfloat16", 64, 7, 32, 8, 2, 32, {"QUERY_TOKENS": 1, "SHARED_PREFIX": 1, "SOFTCAP": 1, "ALIBI": 1}),
        ("__half", 256, 16, 8, 4, 2, 16, {"SHARED_PREFIX": 2}),
        ("__half", 64, 7, 16, 8, 2, 32, {"QUERY_TOKENS": 1, "SHARED_PREFIX": 2, "SOFTCAP": 1, "ALIBI": 1, "SINKS": 1}),
        ("__nv_bfloat16", 128, 16, 8, 4, 2, 16, ("LAUNCH_OVERLAP",)),
        ("__half", 80, 24, 16, 8, 2, 16, ("LAUNCH_OVERLAP", "WINDOW", "QUERY_TOKENS")),
        ("__half", 32, 1, 8, 8, 3, 32, {"LAUNCH_OVERLAP": 1, "SHARED_PREFIX": 2}),
        ("__nv_bfloat16", 256, 256, 16, 2, 2, 16, {"LAUNCH_OVERLAP": 1, "QUERY_TOKENS": 1, "SHARED_PREFIX": 1}),
    )
]  # fmt: skip
PREFILL_DEFINES = [
    {
        "STORAGE": storage, "HEAD_DIM": head_dim, "BLOCK_SIZE": block_size, "GROUP": group, "ROW_WARPS": row_warps,
        "TOKEN_WARPS": token_warps, "WARP_ROWS": warp_rows, "HELD_STEPS": held, "BLOCKS_PER_SM": blocks,
        **dict.fromkeys(asked, 1), "CAUSAL": causal,
    }
    for storage, head_dim, block_size, group, row_warps, token_warps, warp_rows, held, blocks, asked, causal in (
        ("__half", 64, 16, 3, 4, 1, 32, 4, 2, (), 1),
        ("__nv_bfloat16", 128, 16, 4, 4, 1, 32, 0, 2, (), 1),
        ("__nv_bfloat16", 96, 7, 7, 4, 1, 32, 0, 2, ("WINDOW", "SINKS"), 1),
        ("__half", 192, 64, 1, 8, 1, 16, 0, 1, ("SOFTCAP",), 0),
        ("__nv_bfloat16", 256, 256, 8, 8, 1, 16, 0, 1, ("WINDOW", "SOFTCAP", "ALIBI", "SINKS"), 1),
        ("__half", 80, 24, 5, 4, 1, 16, 0, 2, ("ALIBI",), 0),
        ("__nv_bfloat16", 128, 16, 4, 1, 4, 16, 0, 3, (), 1),
        ("__half", 256, 1, 2, 1, 4, 16, 0, 1, ("WINDOW", "SOFTCAP", "ALIBI", "SINKS"), 1),
        ("__half", 128, 16, 1, 4, 1, 32, 0, 2, ("LAUNCH_OVERLAP",), 1),
    )
]  # fmt: skip
