"""Every barrier of these kernels is needed, and a missing one is seen: without it, some test case fails."""

import re
import shutil

import numpy as np
import pytest

import cupaged as pg
from cupaged.attention.choose import KERNELS
from cupaged.attention.kernels import batched
from cupaged.runtime import host, kernels_folder, kernels_from
from tests.kit.cases import DecodeShape, decode_case, serves
from tests.kit.prefill import PrefillShape, prefill_case

# Not those that make plans: with a barrier gone, a list that one of them writes may never end.
KERNEL_OF_FILE = {
    **{kernel.info.file: kernel.info.name for kernel in KERNELS},
    **{info.file: kernel.info.name for kernel in reversed(KERNELS) for info in kernel.helpers if not kernel.takes_plan},
    "sampling/sample.cu": "sample",
    "include/reduce.cuh": "paged_attention_v1",
    "cache/rope_append_kv.cu": "rope_append_kv",
    "include/column_tile.cuh": "rope_append_kv",
}
# Not the one that blocks rely on which run at the same time: here they run one behind the other for the most part. Nor
# the one before a flag is asked which says how much to fetch: no result depends on that.
BARRIER = r"__syncthreads\(\);(?!   // (this part is there|nobody asks before))"
BARRIERS_OF_WARPS = {"include/column_tile.cuh": r"__syncwarp\(\);"}
BARRIERS = [
    (file, match.start())
    for file in KERNEL_OF_FILE
    for match in re.finditer(
        BARRIERS_OF_WARPS.get(file, BARRIER), (kernels_folder() / file).read_text(encoding="utf-8")
    )
]
SHAPES = [
    DecodeShape((300,), num_heads=2, num_kv_heads=1),
    DecodeShape((300,), num_heads=2, num_kv_heads=1, layout="BHDSX"),
    DecodeShape((9000,), num_heads=1, num_kv_heads=1),  # three stretches: logits are written over
]
SHAPES_OF_PERSISTENT = [  # pieces from the queue, pieces in turns, parts of a sequence
    DecodeShape((1700, 1600, 1600, 1650), num_heads=2, num_kv_heads=2, head_dim=32),
    DecodeShape((300, 290, 310) * 12, num_heads=2, num_kv_heads=2, head_dim=32),
    DecodeShape((4000,), num_heads=9, num_kv_heads=1, head_dim=32),
]
SHAPES_OF_PREFILL = [  # many pieces with rows of a warp's own, parts of a context, tokens shared out over warps
    PrefillShape(DecodeShape((200, 130, 150), num_heads=4, num_kv_heads=2, head_dim=32), (190, 130, 100)),
    PrefillShape(DecodeShape((900, 400, 700), num_heads=9, num_kv_heads=1, head_dim=32), (6, 4, 5)),
    PrefillShape(DecodeShape((900, 300, 600), num_heads=2, num_kv_heads=1, head_dim=32), (3, 2, 2)),
]
SHAPES_OF_SAMPLING = [(5, 4000)]  # rows, and a vocabulary for several warps
SHAPES_OF_APPENDS = [("float16", 16), ("float32", 16)]  # dtypes and block sizes
SHAPES_OF_KERNEL = {
    "rope_append_kv": SHAPES_OF_APPENDS,
    "paged_attention_persistent": SHAPES_OF_PERSISTENT,
    "paged_prefill": SHAPES_OF_PREFILL,
    "sample": SHAPES_OF_SAMPLING,
}


def copy_without(tmp_path, file, position):
    copy = tmp_path / "kernels_cu"
    shutil.copytree(kernels_folder(), copy)
    text = (copy / file).read_text(encoding="utf-8")
    changed = text[:position] + re.sub(r"__sync(threads|warp)\(\);", "", text[position:], count=1)
    assert changed != text
    (copy / file).write_text(changed, encoding="utf-8")
    return copy


def outcomes(kernel, shape):
    """Return the results over three schedules."""
    if kernel == "sample":
        return drawn_tokens(shape)
    if kernel == "rope_append_kv":
        return appended_tokens(*shape)
    prefill = kernel == "paged_prefill"
    case = prefill_case(shape, "host") if prefill else decode_case(shape, "host")
    results = []
    for seed in range(3):
        with host.schedule(seed):
            if prefill:
                nowhere = np.full_like(case.query, np.nan)  # a row that is not written shows
                results.append(pg.paged_prefill(*case.arguments, out=nowhere))
            else:
                results.append(pg.paged_attention(*case.arguments, kernel=kernel))
    return results


def drawn_tokens(shape):
    """Return the tokens that are drawn over three schedules."""
    logits = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    results = []
    for seed in range(3):
        with host.schedule(seed):
            results += [pg.sample(logits, 1.0, 50, 0.9, 1), pg.sample(logits, 0.0)]
    return results


def appended_tokens(dtype, block_size):
    """Return what a cache holds after appends over three schedules."""
    config = pg.CacheConfig(4, block_size, 3, 64, dtype, "BHDSX")
    rng = np.random.default_rng(0)
    shape = (config.num_slots, config.num_kv_heads, config.head_dim)
    key, value = (rng.standard_normal(shape).astype(config.numpy_dtype) for _ in "kv")
    results = []
    for seed in range(3):
        cache = pg.KVCache(config, "host")
        slots, positions = np.arange(config.num_slots), np.arange(config.num_slots, dtype=np.int32)
        with host.schedule(seed):
            pg.rope_append_kv(cache, key, value, slots, positions)
        results += [cache.key, cache.value]
    return results


def differs(kernel, shape, expected):
    """Whether a result is another, or the host backend saw threads part ways."""
    try:
        actual = outcomes(kernel, shape)
    except pg.KernelLaunchError:
        return True
    return any(not np.array_equal(*pair, equal_nan=True) for pair in zip(actual, expected, strict=True))


def test_there_are_barriers_to_remove():
    assert len(BARRIERS) == 26


@pytest.mark.parametrize(("file", "position"), BARRIERS, ids=lambda value: str(value).split("/")[-1])
def test_without_it_a_result_is_wrong(tmp_path, monkeypatch, file, position):
    monkeypatch.setattr(batched, "batched_blocks", lambda *_: 1)  # a block takes several pairs
    monkeypatch.setattr("cupaged.ops.cache.ROPE_BLOCKS", 1)  # and several heads
    kernel = KERNEL_OF_FILE[file]
    shapes = SHAPES_OF_KERNEL.get(kernel, SHAPES)
    shapes = [shape for shape in shapes if not isinstance(shape, DecodeShape) or serves(kernel, shape)]
    expected = {shape: outcomes(kernel, shape) for shape in shapes}
    with kernels_from(copy_without(tmp_path, file, position)):
        wrong = sum(differs(kernel, shape, expected[shape]) for shape in shapes)
    assert wrong > 0
