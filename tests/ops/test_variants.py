"""What people serve besides plain decode: each variant alone and all together, held to the float64 reference."""

from dataclasses import replace

import numpy as np
import pytest

import cupaged as pg
from cupaged.attention.call import ALL_VARIANTS
from cupaged.attention.choose import ATTENTION_KERNELS
from tests.kit.cases import DecodeShape, decode_case, serving_kernels
from tests.kit.compare import assert_decode_matches_reference, to_numpy

LAYOUTS = ["BSHD", "BHSD", "HBSD", "BS2HD", "BHDSX"]
LENS = (0, 1, 2, 15, 16, 17, 300)
ALL = {"window": 20, "softcap": 3.0, "alibi": True, "sinks": True, "query_tokens": 3}
ALONE = [{name: value} for name, value in ALL.items()]
SHAPES = [
    *(DecodeShape(LENS, layout=layout, **variant) for variant in [*ALONE, ALL] for layout in ("BSHD", "BHDSX")),
    *(DecodeShape(LENS, layout=layout, dtype="float32", num_heads=6, **ALL) for layout in LAYOUTS),
    *(DecodeShape(LENS, dtype="bfloat16", head_dim=72, block_size=7, layout=layout, **ALL) for layout in LAYOUTS),
    *(DecodeShape(LENS, layout=layout, window=window)
      for layout in ("BHSD", "BHDSX") for window in (1, 2, 15, 16, 17, 31, 32, 33, 299, 300, 301)),
    *(DecodeShape((0, 1, 7, 8, 9, 40), query_tokens=tokens, window=window)
      for tokens in (1, 2, 8, 11) for window in (None, 1, 8)),
    *(DecodeShape(LENS, unmapped=0.5, layout=layout, **ALL) for layout in ("BSHD", "BHDSX")),
    *(DecodeShape((60, 5), num_heads=10, num_kv_heads=2, softcap=softcap, spread=3.0) for softcap in (0.5, 50.0, 1e4)),
    DecodeShape((40, 20), unmapped=1.0, sinks=True, query_tokens=2),
    DecodeShape((9000, 5000), num_heads=1, num_kv_heads=1, **ALL),
    DecodeShape((9000, 4097), num_heads=1, num_kv_heads=1, **{**ALL, "window": 4096}),
    DecodeShape((9000,), num_heads=2, num_kv_heads=1, block_size=256, layout="BHDSX", **{**ALL, "window": 5000}),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kernel_that_serves_it_matches_the_reference(shape, backend):
    case = decode_case(shape, backend)
    served_by = serving_kernels(case)
    assert {"paged_attention_v1", "paged_attention_v2"} <= set(served_by)
    for kernel in served_by:
        out, lse = pg.paged_attention(*case.arguments, kernel=kernel, return_lse=True, **case.variants)
        assert_decode_matches_reference(case, out, lse, kernel)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", 20),
        ("softcap", 3.0),
        ("alibi_slopes", np.array([0.5, 0.25, 0.1, 0.05], np.float32)),
        ("sinks", np.array([3, 2, 1, 4], np.float32)),
    ],
)
def test_each_variant_changes_the_result(name, value):
    """Or a kernel and a reference that both ignore it would agree."""
    case = decode_case(DecodeShape((40, 33)), "host")
    case.variants[name] = value
    result = pg.paged_attention(*case.arguments, return_lse=True, **case.variants)
    assert_decode_matches_reference(case, *result)
    for changed, plain in zip(result, pg.paged_attention(*case.arguments, return_lse=True), strict=True):
        assert (np.abs(changed - plain).max(axis=tuple(range(1, changed.ndim))) > 0.02).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_product_of_minus_infinity_counts_as_the_cap(layout, backend):
    """A token with such a key is there, unlike one whose block is not mapped: what it weighs is what any product far
    below the cap does."""
    results = {}
    for key in (-np.inf, -6e4):
        case = decode_case(DecodeShape((40, 33), softcap=3.0, layout=layout), backend)
        xp, config = case.cache.xp, case.cache.config
        row = xp.ones((1, config.num_kv_heads, config.head_dim), config.numpy_dtype)
        slot = int(case.block_tables[0, 1]) * config.block_size + 3  # token 19 of the first sequence
        pg.append_kv(case.cache, key * row, row, xp.asarray([slot]))
        for kernel in serving_kernels(case):
            out = pg.paged_attention(abs(case.query), *case.arguments[1:], kernel=kernel, **case.variants)
            results.setdefault(kernel, []).append(to_numpy(out))
    for kernel, (infinite, far_below) in results.items():
        np.testing.assert_array_equal(infinite.view(np.uint16), far_below.view(np.uint16), err_msg=kernel)
        assert np.isfinite(infinite).all()


@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
@pytest.mark.parametrize("variant", ALONE, ids=lambda variant: next(iter(variant)))
def test_what_a_kernel_does_not_take_is_named(kernel, variant, backend):
    case = decode_case(DecodeShape((20, 33), **variant), backend)
    (name,) = {"alibi_slopes" if name == "alibi" else name for name in variant}
    if name in pg.kernels()[kernel].variants:
        assert pg.explain(*case.arguments, kernel=kernel, **case.variants).kernel == kernel
    else:
        with pytest.raises(pg.UnsupportedError, match=f"{kernel} does not take {name}"):
            pg.paged_attention(*case.arguments, kernel=kernel, **case.variants)


def test_the_registry_names_variants_that_exist():
    for kernel in ("paged_attention_v1", "paged_attention_v2"):
        assert pg.kernels()[kernel].variants == ALL_VARIANTS
    for info in pg.kernels().values():
        assert info.variants <= ALL_VARIANTS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_placement_changes_no_bit(layout, backend):
    shape = DecodeShape((100, 1, 333), layout=layout, **ALL)
    first, second = (decode_case(shape, backend, placement=seed) for seed in (1, 2))
    assert not np.array_equal(to_numpy(first.block_tables), to_numpy(second.block_tables))
    for kernel in serving_kernels(first):
        a, b = (
            to_numpy(pg.paged_attention(*case.arguments, kernel=kernel, **case.variants)) for case in (first, second)
        )
        np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))


@pytest.mark.parametrize("kernel", ["paged_attention_v1", "paged_attention_v2"])
@pytest.mark.parametrize(("length", "window"), [(300, 20), (300, 1), (64, 16), (65, 16), (5, 16)])
def test_nothing_outside_the_window_is_read(length, window, kernel):
    """Counted: the keys and values of the window's tokens, and the table entries of their blocks."""
    from cupaged.bench.traffic import cache_traffic
    from cupaged.runtime.host import record_traffic

    case = decode_case(DecodeShape((length,), num_heads=1, num_kv_heads=1, window=window), "host")

    def call():
        pg.paged_attention(*case.arguments, kernel=kernel, **case.variants)

    _, cache = cache_traffic(call)
    assert cache.bytes == min(length, window) * 64 * 2 * 2
    with record_traffic() as log:
        call()
    (table,) = (part for part in log[0].arrays if part.array == "block_tables")
    assert table.block_bytes == 4 * (-(-length // 16) - max(length - window, 0) // 16)


def test_blocks_before_the_window_may_be_gone_and_those_in_it_may_not(backend):
    case = decode_case(DecodeShape((100,), query_tokens=2, window=10), backend)  # tokens 89 to 99, blocks 5 and 6
    assert (to_numpy(case.block_tables)[0, :5] == 10**6).any() or (to_numpy(case.block_tables)[0, :5] < -1).any()
    pg.paged_attention(*case.arguments, **case.variants)
    with pytest.raises(ValueError, match=r"block_tables\[0, 0\] is"):
        pg.paged_attention(*case.arguments)
    case.block_tables[0, 5] = 10**6
    with pytest.raises(ValueError, match=r"block_tables\[0, 5\] is 1000000"):
        pg.paged_attention(*case.arguments, **case.variants)


def test_a_window_as_wide_as_the_table_is_none(backend):
    case = decode_case(DecodeShape((100,)), backend)
    reach = case.block_tables.shape[1] * 16
    assert pg.explain(*case.arguments, window=reach) == pg.explain(*case.arguments)
    assert_decode_matches_reference(case, pg.paged_attention(*case.arguments, window=2**40))


def test_one_query_token_with_an_axis_of_its_own_is_plain_decode(backend):
    case = decode_case(DecodeShape((100, 3), query_tokens=1), backend)
    flat = replace(case, query=case.query[:, 0])
    assert pg.explain(*case.arguments) == pg.explain(*flat.arguments)
    out, lse = pg.paged_attention(*case.arguments, return_lse=True)
    assert out.shape == (2, 1, 4, 64) and lse.shape == (2, 1, 4)
    np.testing.assert_array_equal(to_numpy(out)[:, 0], to_numpy(pg.paged_attention(*flat.arguments)))


def test_what_sees_no_token_has_output_zero_and_the_sink(backend):
    case = decode_case(DecodeShape((0, 2), query_tokens=4, sinks=True), backend)
    for kernel in serving_kernels(case):
        out, lse = pg.paged_attention(*case.arguments, kernel=kernel, return_lse=True, **case.variants)
        out, lse = to_numpy(out), to_numpy(lse)
        assert (out[0] == 0).all() and (out[1, :2] == 0).all() and (out[1, 2:] != 0).all()
        sinks = to_numpy(case.variants["sinks"])
        np.testing.assert_allclose(lse[0], np.tile(sinks, (4, 1)), rtol=1e-6)
        np.testing.assert_allclose(lse[1, :2], np.tile(sinks, (2, 1)), rtol=1e-6)
        assert (lse[1, 2:] > sinks).all()


def test_query_tokens_are_single_queries_over_shorter_contexts(backend, xp):
    case = decode_case(DecodeShape((100, 20), query_tokens=5), backend)
    case.variants["window"] = 12
    together = to_numpy(pg.paged_attention(*case.arguments, kernel="paged_attention_v1", **case.variants))
    for i in range(5):
        query, lens = xp.ascontiguousarray(case.query[:, i]), case.seq_lens - (4 - i)
        alone = pg.paged_attention(
            query, case.cache, case.block_tables, lens, kernel="paged_attention_v1", **case.variants
        )
        np.testing.assert_array_equal(to_numpy(alone), together[:, i])


@pytest.mark.parametrize("kernel", ["auto", "paged_attention_v1", "paged_attention_v2"])
@pytest.mark.parametrize(
    ("dtype", "layout", "head_dim"), [("float32", "BSHD", 64), ("float16", "BHDSX", 64), ("bfloat16", "HBSD", 72)]
)
def test_what_tensor_cores_do_not_serve_has_every_variant(dtype, layout, head_dim, kernel, backend):
    shape = DecodeShape((600, 9), num_heads=10, dtype=dtype, layout=layout, head_dim=head_dim, **{**ALL, "window": 400})
    case = decode_case(shape, backend)
    assert pg.explain(*case.arguments, **case.variants).kernel == "paged_attention_v2"
    out, lse = pg.paged_attention(*case.arguments, kernel=kernel, return_lse=True, **case.variants)
    assert_decode_matches_reference(case, out, lse, kernel)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("window", 0, ValueError, "window must be at least 1, the query's own token; got 0"),
        ("window", -1, ValueError, "window must be at least 1, the query's own token; got -1"),
        ("window", 4.0, TypeError, "window must be an integer, in tokens; got float 4.0"),
        ("window", True, TypeError, "window must be an integer, in tokens; got bool True"),
        ("softcap", "50", TypeError, "softcap must be a real number; got str '50'"),
        ("softcap", 0.0, ValueError, r"softcap must lie in \[1e-30, 1e\+30\]; got 0.0"),
        ("softcap", -1, ValueError, "softcap must lie in .* got -1"),
        ("softcap", float("nan"), ValueError, "softcap must lie in .* got nan"),
        ("softcap", float("inf"), ValueError, "softcap must lie in .* got inf"),
        ("alibi_slopes", lambda xp: xp.ones(4), TypeError, "alibi_slopes must have dtype float32; got float64"),
        ("alibi_slopes", lambda xp: xp.ones(2, xp.float32), ValueError, r"alibi_slopes must have shape \[4\]; got \[2"),
        ("alibi_slopes", lambda xp: xp.ones(8, xp.float32)[::2], ValueError, "alibi_slopes must be C-contiguous"),
        ("sinks", lambda xp: 1.0, TypeError, "sinks must be a (NumPy|CuPy) array"),
        ("sinks", lambda xp: xp.ones((2, 2), xp.float32), ValueError, r"sinks must have shape \[4\]; got \[2, 2\]"),
        ("query", lambda xp: xp.ones((2, 3, 2, 4, 64), xp.float16), ValueError, "query must have shape"),
        ("query", lambda xp: xp.ones((2, 3, 5, 64), xp.float16), ValueError, "multiple of the cache's 2 KV heads; got"),
        ("query", lambda xp: xp.ones((2, 3, 4, 32), xp.float16), ValueError, r"\[num_seqs, Q, H, 64\]; got \[2, 3, 4"),
    ],
)  # fmt: skip
def test_a_mistake_names_the_argument(argument, value, error, message, backend, xp):
    case = decode_case(DecodeShape((20, 33)), backend)
    given = {"query": case.query, argument: value(xp) if callable(value) else value}
    with pytest.raises(error, match=message):
        pg.paged_attention(cache=case.cache, block_tables=case.block_tables, seq_lens=case.seq_lens, **given)
