"""Logits as large as finite inputs make them: every kernel gives what float64 gives, or what float32 holds of it."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.attention.choose import ATTENTION_KERNELS
from cupaged.reference import LARGEST_LOGIT
from tests.kit.compare import to_numpy

DTYPES = ["float16", "bfloat16", "float32"]
SIZES = {
    "float16": (300.0, 20000.0, 65504.0),
    "bfloat16": (300.0, 50000.0, 133120.0, 1e18, 3.3e38),
    "float32": (133120.0, 3.4e38),
}
ROOM = [(dtype, size) for dtype in DTYPES for size in SIZES[dtype]]
VARIANTS = {
    "plain": {},
    "window": {"window": 3},
    "softcap": {"softcap": 30.0},
    "alibi": {"alibi_slopes": np.array([0.5, 0.25], np.float32)},
    "sinks": {"sinks": np.array([4.0, -np.inf], np.float32)},
    "huge sinks": {"sinks": np.array([3.4e38, -3.4e38], np.float32)},
}


def cache_of(key, value, dtype, backend, layout="BSHD", block_size=4):
    """Return a cache that holds tokens in order, [tokens, Hkv, D], its tables and lengths."""
    tokens, kv_heads, dim = key.shape
    blocks = -(-tokens // block_size)
    cache = pg.KVCache(pg.CacheConfig(blocks, block_size, kv_heads, dim, dtype, layout), backend)
    xp, storage = cache.xp, cache.config.numpy_dtype
    key, value = (xp.asarray(array.astype(storage)) for array in (key, value))
    pg.append_kv(cache, key, value, xp.arange(tokens))
    return cache, xp.arange(blocks, dtype=np.int32)[np.newaxis], xp.asarray([tokens], dtype=np.int32)


def case_of(dtype, backend, query, keys, dim=64, heads=2):
    """Return a decode call: query and keys lie along the first dimension, and a token's value is its number from 1."""
    tokens = len(keys)
    key, value = np.zeros((tokens, 1, dim)), np.zeros((tokens, 1, dim))
    key[:, 0, 0], value[:, 0] = keys, np.arange(1, tokens + 1)[:, np.newaxis]
    cache, tables, lens = cache_of(key, value, dtype, backend)
    row = np.zeros((1, heads, dim))
    row[..., 0] = query
    return cache.xp.asarray(row.astype(cache.config.numpy_dtype)), cache, tables, lens


def every_result(call, **options):
    """Yield the name, output and log-sum-exp of every kernel that serves a decode call, prefill among them."""
    xp = call[1].xp
    options = {name: xp.asarray(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
    for kernel in ATTENTION_KERNELS:
        try:
            out, lse = pg.paged_attention(*call, kernel=kernel, return_lse=True, **options)
        except pg.UnsupportedError:
            continue
        yield kernel, to_numpy(out).astype(float), to_numpy(lse).astype(float)
    if call[1].config.dtype != "float32":
        starts = xp.asarray([0, 1], dtype=np.int32)
        out, lse = pg.paged_prefill(*call, starts, return_lse=True, **options)
        yield "paged_prefill", to_numpy(out).astype(float), to_numpy(lse).astype(float)


def assert_all_give(call, expected, **options):
    """Hold every kernel to values that are small whole numbers, so that a right one gives them exactly."""
    _, expected_lse = pg.reference.paged_attention(*call, return_lse=True, **options)
    names = []
    for name, out, lse in every_result(call, **options):
        np.testing.assert_array_equal(out, expected, err_msg=name)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, err_msg=name)
        names.append(name)
    assert "paged_attention_v1" in names and len(names) >= (2 if options else 6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_sees_itself_alone_gives_its_value(dtype, variant, backend):
    """Or, beside a sink, the larger of the two logits takes all: both are float32's largest at times, and share."""
    options = VARIANTS[variant]
    for size in SIZES[dtype]:
        for sign in (1, -1):
            call = case_of(dtype, backend, size, [sign * size])
            expected, expected_lse = pg.reference.paged_attention(*call, return_lse=True, **options)
            assert "sinks" in options or (expected == 1).all()
            for name, out, lse in every_result(call, **options):
                np.testing.assert_array_equal(out, expected, err_msg=f"{name} {size}")
                np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, err_msg=f"{name} {size}")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("dtype", "size"), [("float16", 60000.0), ("bfloat16", 3.3e38), ("bfloat16", 133120.0)])
def test_every_dimension_is_huge(dtype, size, head_dim, backend):
    full = np.full((1, 1, head_dim), size)
    cache, tables, lens = cache_of(full, np.ones_like(full), dtype, backend)
    query = cache.xp.asarray(np.repeat(full, 4, axis=1).astype(cache.config.numpy_dtype))
    for name, out, lse in every_result((query, cache, tables, lens)):
        assert (out == 1).all() and np.isfinite(lse).all(), name


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "size"), ROOM)
def test_equal_logits_share_alike_however_large(dtype, size, sign, backend):
    assert_all_give(case_of(dtype, backend, size, [sign * size] * 7), 4)


@pytest.mark.parametrize("at", [0, 40, 99])
@pytest.mark.parametrize(("dtype", "size"), [r for r in ROOM if r[0] != "float32" and 300 < r[1] <= 1e18])
def test_the_largest_of_nearly_equal_huge_logits_takes_all(dtype, size, at, backend):
    """The keys are neighbours in their type; products with them differ by many units in the last place of a float."""
    storage = np.dtype(pg.CacheConfig(1, 1, 1, 64, dtype).numpy_dtype)
    less = np.nextafter(np.array(size, storage), np.array(0, storage)).astype(float)
    assert (size - less) * size / 8 > 100
    assert_all_give(case_of(dtype, backend, size, np.where(np.arange(100) == at, size, less)), at + 1)


@pytest.mark.parametrize("scale", [-0.125, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize(("dtype", "size"), [("float16", 60000.0), ("bfloat16", 133120.0), ("float32", 1e15)])
def test_the_callers_scale(dtype, size, scale, backend):
    keys = [-size, size / 2, size, -size / 2]
    expected = 1 if scale < 0 else 3
    assert_all_give(case_of(dtype, backend, size, keys), expected, scale=scale)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_beyond_float32_count_as_the_largest_that_it_holds(dtype, backend):
    call = case_of(dtype, backend, 3e38, [1.0, 3e38, 2e38, -3e38])
    for name, out, lse in every_result(call):
        np.testing.assert_array_equal(out, 2.5, err_msg=name)
        np.testing.assert_allclose(lse, LARGEST_LOGIT, rtol=1e-6, err_msg=name)
    call = case_of(dtype, backend, 3e38, [-3e38, -3e38, -2e38])
    for name, out, lse in every_result(call):
        np.testing.assert_array_equal(out, 2, err_msg=name)
        np.testing.assert_allclose(lse, -LARGEST_LOGIT, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_that_pass_through_both_infinities_count_as_an_end_of_the_range_or_as_no_number(dtype, backend):
    """A fused multiply-add does not overflow where a product and a sum do: the order of additions decides."""
    key = np.zeros((1, 1, 64))
    key[..., 0], key[..., 40] = 3e38, -3e38
    cache, tables, lens = cache_of(key, np.ones_like(key), dtype, backend)
    query = cache.xp.asarray(np.full((1, 2, 64), 3e38).astype(cache.config.numpy_dtype))
    for name, out, lse in every_result((query, cache, tables, lens)):
        nothing = np.isnan(lse)
        assert np.isnan(out[nothing]).all(), name
        assert (out[~nothing] == 1).all(), f"{name}: one token that counts gives its value"
        assert (np.abs(lse[~nothing]) > 1e37).all(), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_logit_that_is_nan_makes_its_row_nan(dtype, backend):
    call = case_of(dtype, backend, 1.0, [1.0, np.nan, 60000.0, -60000.0])
    for name, out, lse in every_result(call):
        assert np.isnan(out).all() and np.isnan(lse).all(), name


# --- many rows and tiles, as prefill has them -----------------------------------------------------------------------


def prefill_of(dtype, backend, size, keys, group=2, dim=64, **options):
    """Return a prefill call of as many query tokens as keys; the value of a token is its number modulo 16."""
    tokens = len(keys)
    key, value = np.zeros((tokens, 1, dim)), np.zeros((tokens, 1, dim))
    key[:, 0, 0], value[:, 0] = keys, (np.arange(tokens) % 16)[:, np.newaxis]
    cache, tables, lens = cache_of(key, value, dtype, backend, block_size=16)
    query = np.zeros((tokens, group, dim))
    query[..., 0] = size
    starts = cache.xp.asarray([0, tokens], dtype=np.int32)
    return cache.xp.asarray(query.astype(cache.config.numpy_dtype)), cache, tables, lens, starts


ORDERS = {
    "climbing": lambda n: np.linspace(0.1, 1, n),
    "falling": lambda n: np.linspace(1, 0.1, n),
    "small, then huge": lambda n: np.where(np.arange(n) < 77, 1e-6, 1.0) * np.linspace(0.5, 1, n),
    "huge once": lambda n: np.where(np.arange(n) == 90, 1.0, 1e-8),
    "huge again and again": lambda n: np.where(np.isin(np.arange(n), (70, 85, 101, 127, 128)), 1.0, 1e-8),
    "negative": lambda n: -np.linspace(1, 0.1, n),
    "alternating": lambda n: np.where(np.arange(n) % 2, 1, -1) * np.linspace(0.5, 1, n),
}


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 70}, {"window": 9, "softcap": 1e9}], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("dtype", "size"), [("float16", 60000.0), ("bfloat16", 1e15)])
def test_the_largest_logit_of_each_row_takes_all(dtype, size, order, options, backend):
    """One-hot rows: a row's output is the value of the key with the largest logit among those that it sees."""
    tokens, storage = 150, np.dtype(pg.CacheConfig(1, 1, 1, 64, dtype).numpy_dtype)
    keys = (size * ORDERS[order](tokens)).astype(storage).astype(float)
    call = prefill_of(dtype, backend, size, keys)
    expected, expected_lse = pg.reference.paged_prefill(*call, return_lse=True, **options)
    out, lse = pg.paged_prefill(*call, return_lse=True, **options)
    np.testing.assert_allclose(to_numpy(out).astype(float), expected, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(to_numpy(lse), expected_lse, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize(("dtype", "size"), [("float16", 60000.0), ("bfloat16", 133120.0), ("bfloat16", 1e15)])
def test_parts_with_huge_logits_merge(dtype, size, backend):
    """Few rows over a long context: warps share the tokens, and the context is cut into parts."""
    tokens = 1500
    keys = size * np.linspace(0.1, 1, tokens)
    keys[[700, 1499]] = 2 * size if dtype == "bfloat16" else 65504.0
    query, cache, tables, lens, _ = prefill_of(dtype, backend, size, keys, group=4)
    xp = cache.xp
    starts = xp.asarray([0, 1], dtype=np.int32)
    plan = pg.plan_prefill(cache, lens, starts, 1, 4)
    if backend == "host":
        assert to_numpy(plan.pieces)[: int(to_numpy(plan.summary)[0]), 8].max() > 1
    for out in (
        pg.paged_prefill(query[:1], cache, tables, lens, starts, plan=plan),
        pg.paged_attention(query[:1], cache, tables, lens, kernel="paged_attention_persistent"),
        pg.paged_attention(query[:1], cache, tables, lens, kernel="paged_attention_mma"),
        pg.paged_attention(query[:1], cache, tables, lens, kernel="paged_attention_v2"),
    ):
        np.testing.assert_array_equal(to_numpy(out).astype(float), (700 % 16 + 1499 % 16) / 2)


def test_log_sum_exps_at_the_ends_of_float32_merge(backend, xp):
    huge = np.float32(LARGEST_LOGIT)
    outs = xp.asarray(np.arange(1, 4, dtype=np.float32)[:, np.newaxis, np.newaxis] * np.ones((3, 6, 8), np.float32))
    lses = [
        [huge, 0, 0],
        [huge, huge, -huge],
        [-huge, -huge, -np.inf],
        [-np.inf, -huge, -np.inf],
        [-np.inf, -np.inf, -np.inf],
        [3.4e38, 3.3e38, 0],
    ]
    merged, lse = pg.merge_states(outs, xp.asarray(np.array(lses, np.float32).T.copy()))
    np.testing.assert_array_equal(to_numpy(merged)[..., 0], [1, 1.5, 1.5, 2, 0, 1.5])
    expected = [huge, huge, -huge, -huge, -np.inf, huge]
    np.testing.assert_allclose(to_numpy(lse), expected, rtol=1e-6)
