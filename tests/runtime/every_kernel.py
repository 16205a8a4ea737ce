"""Run every kernel on small cases: what the sanitizers of the host and of the GPU watch.

``python -m tests.runtime.every_kernel host`` or ``cuda``, with names of `PARTS` to run these only; ``broken FOLDER``
reads past an array, on the host.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np

import cupaged as pg
from cupaged.engine.elementwise import rms_norm, swiglu
from cupaged.ops.arrays import array_module
from cupaged.ops.textures import LOAD_PATHS
from cupaged.runtime import host, kernels_defining, load_kernel
from tests.kit.cases import RUNGS, DecodeShape, decode_case, serving_kernels
from tests.kit.compare import (
    assert_decode_matches_reference,
    assert_merge_matches_reference,
    assert_prefill_matches_reference,
)
from tests.kit.experiments import functions
from tests.kit.prefill import PrefillShape, prefill_case
from tests.kit.programs import kernel_from_text

SHAPES = [
    DecodeShape((0, 1, 17, 100), layout="BSHD", dtype="float16"),
    DecodeShape((33, 100), layout="BHSD", dtype="bfloat16", head_dim=72, block_size=7),
    DecodeShape((16, 65), layout="HBSD", dtype="float32", head_dim=256, block_size=1),
    DecodeShape((47, 5), layout="BS2HD", dtype="float16", head_dim=40, block_size=3),
    DecodeShape((90, 40), layout="BHDSX", dtype="float16", head_dim=128),
    DecodeShape((50,), layout="BHDSX", dtype="float32", head_dim=120, block_size=5, unmapped=0.5),
    DecodeShape((4200,), num_heads=1, num_kv_heads=1),
    DecodeShape((0, 2, 100), query_tokens=3, window=5, softcap=3.0, alibi=True, sinks=True),
    DecodeShape((33, 90), query_tokens=2, window=20, softcap=3.0, alibi=True, sinks=True, layout="BHDSX"),
    DecodeShape((40,), window=16, dtype="bfloat16", head_dim=72, block_size=7, layout="BHDSX"),
    DecodeShape((300, 0, 40), layout="BHSD", dtype="bfloat16", head_dim=80, num_heads=24, block_size=5),
    DecodeShape((340, 0, 60, 45), num_heads=8, block_size=7, shared_prefix=42, query_tokens=3, alibi=True, sinks=True),
]


SHAPES_OF_RUNGS = SHAPES[1:2] + SHAPES[5:]  # each build with sanitizers takes seconds


SHAPES_OF_PREFILL = [
    PrefillShape(DecodeShape((150, 0, 90, 65), num_heads=8), (70, 0, 90, 1)),
    PrefillShape(DecodeShape((700, 33), num_heads=4, head_dim=128, dtype="bfloat16", block_size=7), (3, 1)),
    PrefillShape(DecodeShape((90,), window=20, query_tokens=60, alibi=True, sinks=True, layout="BHSD"), (60,)),
    PrefillShape(DecodeShape((90, 20), head_dim=192, softcap=3.0, layout="HBSD"), (40, 20), causal=False),
]


def decode(backend, shapes):
    """Attend and merge under two schedules, append, and move blocks."""
    for shape in shapes:
        case = decode_case(shape, backend)
        for seed in range(2):
            with host.schedule(seed) if backend == "host" else nullcontext():
                for kernel in serving_kernels(case):
                    if kernel in RUNGS and shape not in SHAPES_OF_RUNGS:
                        continue
                    result = pg.paged_attention(*case.arguments, kernel=kernel, return_lse=True, **case.variants)
                    assert_decode_matches_reference(case, *result, kernel)
                    outs, lses = (case.cache.xp.stack([array] * 3) for array in result)
                    lses[1] = -np.inf
                    outs[1] = np.nan
                    assert_merge_matches_reference(outs, lses, *pg.merge_states(outs, lses))
        config, xp = case.cache.config, case.cache.xp
        rows = xp.ones((5, config.num_kv_heads, config.head_dim), config.numpy_dtype)
        slots = np.array([0, config.num_slots - 1, -1, 2, 1])
        pg.append_kv(case.cache, rows, rows, xp.asarray(slots.astype(np.int32 if config.head_dim == 72 else np.int64)))
        assert (case.cache.blocks([config.num_blocks - 1])[0][0, -1] == 1).all()
        prompt = xp.ones((min(37, config.num_slots), *rows.shape[1:]), config.numpy_dtype)  # slots that are neighbours
        pg.append_kv(case.cache, prompt, prompt, xp.arange(len(prompt)))
        if config.head_dim % 16 == 0:
            positions = xp.arange(len(prompt), dtype=np.int32)
            pg.rope_append_kv(case.cache, prompt, prompt, xp.arange(len(prompt)), positions, query=prompt)
            positions = xp.asarray(np.arange(5, dtype=np.int32))
            pg.rope_append_kv(case.cache, rows, rows, xp.asarray(slots), positions, query=rows, interleaved=True)
        pg.copy_blocks(case.cache, [[0, config.num_blocks - 1]])
        pg.scatter_blocks(case.cache, [1], pg.gather_blocks(case.cache, [0]))


def prefill(backend):
    """Attend with many tokens under two schedules."""
    for shape in SHAPES_OF_PREFILL:
        case = prefill_case(shape, backend)
        for seed in range(2):
            with host.schedule(seed) if backend == "host" else nullcontext():
                result = pg.paged_prefill(*case.arguments, return_lse=True, **case.options)
                assert_prefill_matches_reference(case, *result)


def streams(backend):
    """Read and copy streams, and gather rows through a table."""
    xp = array_module(backend)
    data = xp.arange(4 * 1000, dtype=np.uint32)
    combined = xp.zeros(1, np.uint32)
    kernel = load_kernel("bench/read_stream.cu", "read_stream", backend=backend)
    kernel((2,), (64,), combined=combined, data=data, vectors=1000)
    assert int(combined[0]) == np.bitwise_xor.reduce(np.arange(4 * 1000, dtype=np.uint32))
    for streaming in (0, 1):
        copied, defines = xp.zeros_like(data), {"IN_FLIGHT": 4, "STREAMING": streaming}
        kernel = load_kernel("bench/copy_stream.cu", "copy_stream", defines, backend)
        kernel((2,), (64,), **{"to": copied, "from": data}, vectors=1000)
        assert (copied == data).all()
    table = xp.arange(13, dtype=np.int32)[::-1].copy()
    rows = np.random.default_rng(0).integers(2**16, size=(13, 3, 256), dtype=np.uint16)
    expected = np.bitwise_xor.reduce(rows[1:], axis=None) ^ np.bitwise_xor.reduce(rows[0, 0])
    for unit in (1, 8, 256):
        combined[...] = 0
        defines = {"ROW": 256, "BLOCK_SIZE": 3, "UNIT": unit}
        kernel = load_kernel("bench/gather_lookup.cu", "gather_lookup", defines, backend)
        kernel((3,), (64,), combined=combined, data=xp.asarray(rows), block_table=table, tokens=37)
        assert int(combined[0]) == expected


def norm_and_gate(backend):
    """Normalise rows, and gate them, under two schedules."""
    rows = np.random.default_rng(0).standard_normal((3, 1040)).astype(np.float32)
    xp = array_module(backend)
    for seed in range(2):
        with host.schedule(seed) if backend == "host" else nullcontext():
            normed = rms_norm(xp.asarray(rows), xp.ones(1040, np.float32), 1e-5, np.float16)
            assert np.allclose(pg.reference.as_numpy(normed), pg.reference.rms_norm(rows, np.ones(1040), 1e-5), 0, 1e-2)
            assert np.allclose(pg.reference.as_numpy(swiglu(normed)), pg.reference.swiglu(normed), 0, 1e-2)


def draw_tokens(backend):
    """Sample from vocabularies of one warp and of several, cut both ways."""
    for vocab_size, dtype in ((33, np.float32), (2100, np.float16)):
        logits = np.random.default_rng(0).standard_normal((3, vocab_size)).astype(dtype)
        logits[1, ::2] = -np.inf
        for seed in range(2):
            with host.schedule(seed) if backend == "host" else nullcontext():
                tokens = pg.sample(array_module(backend).asarray(logits), 0.7, 20, 0.8, seed)
            assert np.array_equal(pg.reference.as_numpy(tokens), pg.reference.sample(logits, 0.7, 20, 0.8, seed))


def every_path(backend):
    """Attend, chase and gather by every path, after an append that also writes the array that textures read."""
    case = decode_case(SHAPES[0], backend)
    config, xp = case.cache.config, case.cache.xp
    pg.bind_textures(case.cache, "array")
    rows = xp.ones((2, config.num_kv_heads, config.head_dim), config.numpy_dtype)
    slot = int(case.block_tables[1, 0]) * config.block_size
    pg.append_kv(case.cache, rows, rows, xp.asarray(np.array([slot, -1], np.int64)))
    script = functions("texture_vs_global")
    chased, gathered = script["chain_in_cache"](2, "random", backend), script["gather_cache"](16, 64, 1 << 15, backend)
    for path in LOAD_PATHS:
        with kernels_defining(LOAD_PATH=path):
            result = pg.paged_attention(*case.arguments, kernel="paged_attention_texture", return_lse=True)
            assert script["chase"](*chased, "L1", 20)["status"] == "ok"
            assert script["gather"](*gathered, None)["status"] == "ok"
        assert_decode_matches_reference(case, *result, "paged_attention_texture")


def guesses(backend):
    """Plan and attend again and again: what the host guesses before a plan is written depends on where it lies."""
    case = decode_case(DecodeShape((70,), num_heads=2, num_kv_heads=1, head_dim=128), backend)
    plans = [pg.plan_decode(case.cache, case.seq_lens, 2) for _ in range(60)]
    for plan in plans:
        assert_decode_matches_reference(case, pg.paged_attention(*case.arguments, plan=plan))


def run_broken(folder):
    """Read one element past an array: the sanitizer must end the process."""
    text = 'extern "C" __global__ void past(int* out, const int* data, const int n) { out[0] = data[n]; }'
    data = np.zeros(5000, np.int32)
    kernel_from_text(Path(folder), text, "past", "host")((1,), (1,), out=np.zeros(1, np.int32), data=data, n=5000)


PARTS = {
    "layouts": lambda backend: decode(backend, SHAPES[:5]),
    "variants": lambda backend: decode(backend, SHAPES[5:9]),
    "groups": lambda backend: decode(backend, SHAPES[9:]),
    "guesses": guesses,
    "prefill": prefill,
    "paths": every_path,
    "norm_and_gate": norm_and_gate,
    "draw_tokens": draw_tokens,
    "streams": streams,
}


if __name__ == "__main__":
    if sys.argv[1] == "broken":
        run_broken(sys.argv[2])
    else:
        for part in sys.argv[2:] or PARTS:
            PARTS[part](sys.argv[1])
    print("clean")
