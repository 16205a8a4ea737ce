"""Decode attention is held to the float64 reference, on both backends, under hostile conditions."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.attention.choose import ATTENTION_KERNELS
from cupaged.bench.accuracy import decode_check
from cupaged.runtime import host
from tests.kit.cases import RUNGS, DecodeShape, decode_case, serves
from tests.kit.compare import assert_decode_matches_reference, to_numpy

LAYOUTS = ["BSHD", "BHSD", "HBSD", "BS2HD", "BHDSX"]
CORNERS = [
    *(DecodeShape((0, 1, 15, 16, 17, 300), layout=layout, dtype=dtype)
      for layout in LAYOUTS for dtype in ("float16", "bfloat16", "float32")),
    *(DecodeShape((37, 0, 255, 256, 257), block_size=256, layout=layout, num_heads=2) for layout in LAYOUTS),
    *(DecodeShape((5, 130), block_size=1, layout=layout, head_dim=128) for layout in LAYOUTS),
    *(DecodeShape((5, 200), block_size=7, layout=layout, head_dim=72, dtype="bfloat16") for layout in LAYOUTS),
    *(DecodeShape((33, 90), head_dim=head_dim, dtype=dtype)
      for head_dim in (32, 40, 80, 96, 112, 120, 192, 248, 256) for dtype in ("float16", "float32")),
    *(DecodeShape((70, 3), num_heads=heads, num_kv_heads=kv_heads)
      for heads, kv_heads in ((1, 1), (3, 3), (7, 1), (10, 2), (36, 3))),
    *(DecodeShape((60, 100, 2), unmapped=0.5, layout=layout) for layout in LAYOUTS),
    DecodeShape((40, 20), unmapped=1.0),
    DecodeShape((64, 64), spread=6.0, dtype="bfloat16"),
    DecodeShape((0, 0, 0)),
    *(DecodeShape((length,), num_heads=1, num_kv_heads=1, head_dim=128) for length in (1, 16, 17, 33, 65, 100, 500)),
]  # fmt: skip


CORNERS_OF_RUNGS = [  # each costs a build for each rung
    *(DecodeShape((0, 1, 15, 16, 17, 300), layout=layout, dtype=dtype)
      for layout, dtype in zip(LAYOUTS, ("float16", "bfloat16", "float32", "bfloat16", "float16"), strict=True)),
    *(DecodeShape((37, 0, 255, 256, 257), block_size=256, layout=layout, num_heads=2) for layout in ("BSHD", "BHDSX")),
    *(DecodeShape((5, 130), block_size=1, layout=layout, head_dim=128) for layout in ("BHSD", "BHDSX")),
    *(DecodeShape((5, 200), block_size=7, layout=layout, head_dim=72, dtype="bfloat16")
      for layout in ("HBSD", "BHDSX")),
    *(DecodeShape((33, 90), head_dim=head_dim, dtype=dtype)
      for head_dim, dtype in ((32, "float16"), (40, "float32"), (120, "float32"), (248, "bfloat16"), (256, "float32"))),
    *(DecodeShape((70, 3), num_heads=heads, num_kv_heads=kv_heads)
      for heads, kv_heads in ((1, 1), (3, 1), (5, 1), (7, 1), (10, 2), (36, 3))),
    *(DecodeShape((60, 100, 2), unmapped=0.5, layout=layout) for layout in ("BSHD", "BHDSX")),
    DecodeShape((40, 20), unmapped=1.0),
    DecodeShape((64, 64), spread=6.0, dtype="bfloat16"),
    DecodeShape((0, 0, 0)),
    *(DecodeShape((length,), num_heads=1, num_kv_heads=1, head_dim=128) for length in (1, 33, 500)),
]  # fmt: skip
BY_KERNEL = [
    *(("paged_attention_v1", shape) for shape in CORNERS),
    *((kernel, shape) for kernel in RUNGS for shape in CORNERS_OF_RUNGS
      if serves(kernel, shape)),
]  # fmt: skip
KERNELS_OF_ROWS = [kernel for kernel in RUNGS if pg.kernels()[kernel].serves.whole_rows]


@pytest.mark.parametrize(("kernel", "shape"), BY_KERNEL, ids=str)
def test_corner_cases_match_the_reference(kernel, shape, backend):
    case = decode_case(shape, backend)
    out, lse = pg.paged_attention(*case.arguments, kernel=kernel, return_lse=True)
    assert_decode_matches_reference(case, out, lse, kernel)


@pytest.mark.parametrize("shape", CORNERS, ids=str)
def test_corner_cases_match_the_reference_by_the_kernel_that_auto_takes(shape, backend):
    case = decode_case(shape, backend)
    out, lse = pg.paged_attention(*case.arguments, return_lse=True)
    assert_decode_matches_reference(case, out, lse)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_contexts_longer_than_the_logits_in_shared_memory(layout, backend):
    """Longer than one stretch of 4096 tokens, and than two; vLLM's v1 refuses what outgrows shared memory."""
    case = decode_case(DecodeShape((4095, 4097, 9000), num_heads=1, num_kv_heads=1, layout=layout), backend)
    out, lse = pg.paged_attention(*case.arguments, return_lse=True)
    assert_decode_matches_reference(case, out, lse)


@pytest.mark.parametrize("kernel", RUNGS)
def test_long_contexts_by_every_rung(kernel, backend):
    case = decode_case(DecodeShape((4097, 9000), num_heads=1, num_kv_heads=1), backend)
    out, lse = pg.paged_attention(*case.arguments, kernel=kernel, return_lse=True)
    assert_decode_matches_reference(case, out, lse, kernel)


@pytest.mark.parametrize(
    ("layout", "kernel"),
    [
        *((layout, "auto") for layout in LAYOUTS),
        *(("BSHD", kernel) for kernel in RUNGS),
        *(("BHDSX", kernel) for kernel in RUNGS if kernel not in KERNELS_OF_ROWS),
    ],
)
def test_placement_changes_no_bit(layout, kernel, backend):
    shape = DecodeShape((100, 1, 333), layout=layout)
    first, second = (decode_case(shape, backend, placement=seed) for seed in (1, 2))
    assert not np.array_equal(to_numpy(first.block_tables), to_numpy(second.block_tables))
    a, b = (to_numpy(pg.paged_attention(*case.arguments, kernel=kernel)) for case in (first, second))
    np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))


@pytest.mark.parametrize(
    ("layout", "kernel"), [("BSHD", "auto"), ("BHDSX", "auto"), *(("BSHD", kernel) for kernel in RUNGS)]
)
def test_the_order_of_threads_changes_no_bit(layout, kernel):
    length = 5000 if kernel == "auto" else 700
    case = decode_case(DecodeShape((length, 40), layout=layout, num_heads=2, num_kv_heads=1), "host")
    expected = pg.paged_attention(*case.arguments, kernel=kernel)
    for seed in range(1, 5):
        with host.schedule(seed):
            np.testing.assert_array_equal(pg.paged_attention(*case.arguments, kernel=kernel), expected)


@pytest.mark.parametrize("kernel", ["auto", *ATTENTION_KERNELS])
def test_a_sequence_of_length_zero_gives_zero_and_minus_infinity(kernel, backend):
    case = decode_case(DecodeShape((0, 8)), backend)
    out, lse = (to_numpy(a) for a in pg.paged_attention(*case.arguments, kernel=kernel, return_lse=True))
    assert (out[0] == 0).all()
    assert np.isneginf(lse[0]).all()
    assert np.isfinite(lse[1]).all()


def test_no_sequences_give_no_rows(backend, xp):
    case = decode_case(DecodeShape((8,)), backend)
    out, lse = pg.paged_attention(
        case.query[:0], case.cache, case.block_tables[:0], case.seq_lens[:0], return_lse=True
    )  # fmt: skip
    assert out.shape == (0, 4, 64)
    assert lse.shape == (0, 4)


def test_out_is_written_and_returned(backend, xp):
    case = decode_case(DecodeShape((20, 30)), backend)
    out = xp.full(case.query.shape, xp.nan, dtype=case.query.dtype)
    assert pg.paged_attention(*case.arguments, out=out) is out
    assert_decode_matches_reference(case, out)


@pytest.mark.parametrize("kernel", ["auto", *RUNGS])
def test_the_scale_is_used(kernel, backend):
    case = decode_case(DecodeShape((50,)), backend)
    expected, expected_lse = pg.reference.paged_attention(*case.arguments, scale=0.5, return_lse=True)
    _, lse = pg.paged_attention(*case.arguments, scale=0.5, kernel=kernel, return_lse=True)
    np.testing.assert_allclose(to_numpy(lse), expected_lse, rtol=1e-5)
    assert np.abs(pg.reference.paged_attention(*case.arguments) - expected).max() > 0.01


def check_last_block(cache, kernel):
    """Append to the last block but one of a large cache, and attend over it."""
    xp, config = cache.xp, cache.config
    rng = np.random.default_rng(0)
    block, tokens = config.num_blocks - 2, config.block_size
    key, value = (xp.asarray(rng.standard_normal((tokens, 1, 256)).astype(np.float16)) for _ in "kv")
    pg.append_kv(cache, key, value, xp.arange(block * tokens, (block + 1) * tokens, dtype=xp.int64))
    np.testing.assert_array_equal(cache.blocks([block])[0][0], to_numpy(key))
    query = xp.asarray(rng.standard_normal((1, 2, 256)).astype(np.float16))
    arguments = query, cache, xp.asarray([[block]], dtype=xp.int32), xp.asarray([tokens], dtype=xp.int32)
    try:
        out = pg.paged_attention(*arguments, kernel=kernel)
    except pg.UnsupportedError as error:
        pytest.skip(str(error))
    assert decode_check(out, *arguments, kernel) <= 1


@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
def test_offsets_beyond_32_bits_on_the_host(kernel):
    """A cache of 2**31 elements and more, of which only the pages of the blocks in use exist."""
    num_blocks = 2**31 // (16 * 256) + 4
    check_last_block(pg.KVCache(pg.CacheConfig(num_blocks, 16, 1, 256, "float16", "BSHD"), "host"), kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_beyond_32_bits_on_the_gpu(layout, kernel):
    num_blocks = 2**32 // (16 * 256 * 2) + 1000  # keys alone take more than 2**32 bytes and 2**31 elements
    check_last_block(pg.KVCache(pg.CacheConfig(num_blocks, 16, 1, 256, "float16", layout), "cuda"), kernel)


def test_auto_says_what_it_takes(backend):
    case = decode_case(DecodeShape((8,)), backend)
    choice = pg.explain(*case.arguments)
    assert choice.kernel in pg.kernels()
    assert choice.reason
    assert pg.explain(*case.arguments, kernel="paged_attention_v1").reason == "it was named"
