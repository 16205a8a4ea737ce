"""Decode attention is held to the float64 reference, on both backends, under hostile conditions."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.ops.registry import ATTENTION_KERNELS
from cupaged.runtime import host
from tests.kit.cases import DecodeShape, decode_case, random_shape
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


RUNGS = [kernel for kernel in ATTENTION_KERNELS if kernel not in ("paged_attention_v1", "paged_attention_mma")]
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
    *((kernel, shape) for kernel in RUNGS for shape in CORNERS_OF_RUNGS),
]


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


@pytest.mark.parametrize("seed", range(40))
def test_random_cases_match_the_reference(seed, backend):
    case = decode_case(random_shape(seed), backend, seed)
    out, lse = pg.paged_attention(*case.arguments, return_lse=True)
    assert_decode_matches_reference(case, out, lse)


@pytest.mark.parametrize("kernel", RUNGS)
@pytest.mark.parametrize("seed", range(100, 104))
def test_random_cases_match_the_reference_by_every_rung(seed, kernel, backend):
    case = decode_case(random_shape(seed), backend, seed)
    out, lse = pg.paged_attention(*case.arguments, kernel=kernel, return_lse=True)
    assert_decode_matches_reference(case, out, lse, kernel)


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
    [*((layout, "auto") for layout in LAYOUTS), *((layout, k) for layout in ("BSHD", "BHDSX") for k in RUNGS)],
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


@pytest.mark.parametrize("kernel", ["auto", *RUNGS])
def test_offsets_beyond_32_bits_on_the_host(kernel):
    """A cache of 2**31 elements and more, of which only the pages of the blocks in use exist."""
    elements_per_block = 16 * 1 * 256
    num_blocks = 2**31 // elements_per_block + 4
    config = pg.CacheConfig(num_blocks, 16, 1, 256, "float16", "BSHD")
    cache = pg.KVCache(config, "host")
    rng = np.random.default_rng(0)
    slots = np.array([(num_blocks - 2) * 16 + i for i in range(16)], dtype=np.int64)
    key, value = (rng.standard_normal((16, 1, 256)).astype(np.float16) for _ in "kv")
    pg.append_kv(cache, key, value, slots)
    np.testing.assert_array_equal(cache.key[num_blocks - 2], key)
    query = rng.standard_normal((1, 2, 256)).astype(np.float16)
    tables, lens = np.array([[num_blocks - 2]], dtype=np.int32), np.array([16], dtype=np.int32)
    out = pg.paged_attention(query, cache, tables, lens, kernel=kernel)
    expected, _ = pg.reference.attention(query[0], key, value, 256**-0.5)
    np.testing.assert_allclose(out[0].astype(np.float64), expected, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("layout", "kernel"), [*((layout, "auto") for layout in LAYOUTS), *(("BHDSX", kernel) for kernel in RUNGS)]
)
def test_offsets_beyond_32_bits_on_the_gpu(layout, kernel):
    import cupy

    num_blocks = 2**32 // (16 * 256 * 2) + 1000  # keys alone take more than 2**32 bytes and 2**31 elements
    cache = pg.KVCache(pg.CacheConfig(num_blocks, 16, 1, 256, "float16", layout), "cuda")
    rng = np.random.default_rng(0)
    block = num_blocks - 2
    key, value = (cupy.asarray(rng.standard_normal((16, 1, 256)).astype(np.float16)) for _ in "kv")
    pg.append_kv(cache, key, value, cupy.arange(block * 16, block * 16 + 16, dtype=cupy.int64))
    query = cupy.asarray(rng.standard_normal((1, 2, 256)).astype(np.float16))
    tables, lens = cupy.array([[block]], dtype=cupy.int32), cupy.array([16], dtype=cupy.int32)
    out = pg.paged_attention(query, cache, tables, lens, kernel=kernel)
    expected, _ = pg.reference.attention(query[0].get(), key.get(), value.get(), 256**-0.5)
    np.testing.assert_allclose(out[0].get().astype(np.float64), expected, atol=2e-3)


def test_auto_says_what_it_takes(backend):
    case = decode_case(DecodeShape((8,)), backend)
    choice = pg.explain(*case.arguments)
    assert choice.kernel in pg.kernels()
    assert choice.reason
    assert pg.explain(*case.arguments, kernel="paged_attention_v1").reason == "it was named"


def test_auto_takes_v1_where_nothing_is_shared_and_the_batch_is_large(backend, xp):
    """On an H100 v1 then reads at 95 % of the ceiling; with shared KV heads, or few sequences, it does not."""
    case = decode_case(DecodeShape((5,), num_heads=2, num_kv_heads=2), backend)
    many = xp.zeros((600, 2, 64), dtype=case.query.dtype)
    tables, lens = xp.full((600, 1), -1, dtype=xp.int32), xp.zeros(600, dtype=xp.int32)
    assert pg.explain(many, case.cache, tables, lens).kernel == "paged_attention_v1"
    assert pg.explain(*case.arguments).kernel == "paged_attention_mma"
    shared = xp.zeros((600, 4, 64), dtype=case.query.dtype)
    assert pg.explain(shared, case.cache, tables, lens).kernel == "paged_attention_mma"
    plan = pg.plan_decode(case.cache, lens, 2)
    assert not xp.asarray(pg.paged_attention(many, case.cache, tables, lens, plan=plan)).any()
