"""A prefix that sequences share is read for all of them at once, and the result is that of reading it for each."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.bench.traffic import CACHE_ARRAYS, record_traffic
from cupaged.runtime import host
from tests.kit.cases import DecodeShape, decode_case, serving_kernels
from tests.kit.compare import assert_decode_matches_reference, to_numpy

ALL = {"softcap": 3.0, "alibi": True, "sinks": True, "query_tokens": 3}
SHAPES = [
    *(DecodeShape(tuple(64 + 1 + 7 * i for i in range(count)), shared_prefix=64) for count in (1, 2, 3, 7, 8, 9, 40)),
    *(DecodeShape((n + 1, n + 16, n + 40), shared_prefix=n) for n in (16, 32, 2048)),
    *(DecodeShape((300, 67, 80), shared_prefix=64, **{name: value}) for name, value in ALL.items()),
    *(DecodeShape((51, 49, 90, 200), shared_prefix=48, query_tokens=1, head_dim=head_dim, dtype=dtype, sinks=True)
      for head_dim in (32, 80, 112, 128, 192, 256) for dtype in ("float16", "bfloat16")),
    *(DecodeShape((block_size + 3, 2 * block_size, 2 * block_size + 30), block_size=block_size,
                  shared_prefix=block_size, layout=layout, dtype="bfloat16", **ALL)
      for block_size in (3, 7, 16, 24, 256) for layout in ("BSHD", "HBSD")),
    *(DecodeShape((75, 80, 150), block_size=5, shared_prefix=70, layout=layout) for layout in ("BHSD", "BS2HD")),
    *(DecodeShape((500, 470, 0, 480), num_heads=heads, num_kv_heads=kv_heads, shared_prefix=464, **ALL)
      for heads, kv_heads in ((1, 1), (3, 1), (9, 1), (40, 1), (36, 3))),
    DecodeShape((0, 0, 70), shared_prefix=64),
    DecodeShape((0, 70, 0, 90), shared_prefix=64, **ALL),
    DecodeShape((0, 0), shared_prefix=32, sinks=True),
    DecodeShape((100, 130, 70), shared_prefix=64, unmapped=0.5, **ALL),
    DecodeShape((100, 70), shared_prefix=64, unmapped=1.0),
    DecodeShape((1030, 1025, 1050), shared_prefix=1024, spread=6.0, dtype="bfloat16"),
    DecodeShape((9000, 8193), shared_prefix=8192, num_heads=1, num_kv_heads=1),
]  # fmt: skip
UNSERVED = [  # by tensor cores
    DecodeShape((40, 33), shared_prefix=32, dtype="float32"),
    DecodeShape((40, 33), shared_prefix=32, head_dim=72),
    DecodeShape((40, 33), shared_prefix=32, layout="BHDSX"),
]
PERSISTENT = "paged_attention_persistent"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sharing_changes_no_result(shape, backend):
    case = decode_case(shape, backend)
    assert pg.explain(*case.arguments, **case.variants).kernel == PERSISTENT
    out, lse = pg.paged_attention(*case.arguments, return_lse=True, **case.variants)
    assert_decode_matches_reference(case, out, lse)


@pytest.mark.parametrize("shape", [SHAPES[2], *UNSERVED], ids=str)
def test_kernels_that_cannot_share_read_the_prefix_for_each(shape, backend):
    case = decode_case(shape, backend)
    for kernel in ["auto", *serving_kernels(case)]:
        choice = pg.explain(*case.arguments, kernel=kernel, **case.variants)
        out, lse = pg.paged_attention(*case.arguments, kernel=kernel, return_lse=True, **case.variants)
        assert_decode_matches_reference(case, out, lse, choice.kernel)
        shares = choice.kernel == PERSISTENT
        assert choice.shared_prefix == shares * shape.shared_prefix
        assert ("for all of them at once" if shares else "for each of them") in choice.reason


def test_nothing_is_shared_without_a_prefix_or_by_one_sequence(backend, xp):
    case = decode_case(DecodeShape((100, 90)), backend)
    assert pg.explain(*case.arguments, shared_prefix=0) == pg.explain(*case.arguments)
    plan = pg.plan_decode(case.cache, case.seq_lens, 4, shared_prefix=0)
    assert plan.prefix is None
    alone = decode_case(DecodeShape((100,)), backend)
    choice = pg.explain(*alone.arguments, shared_prefix=np.int64(64))
    assert choice.shared_prefix == 0 and "no other sequence to share with" in choice.reason
    np.testing.assert_array_equal(
        to_numpy(pg.paged_attention(*alone.arguments, shared_prefix=64)), to_numpy(pg.paged_attention(*alone.arguments))
    )


def test_queries_of_a_map_may_share_too(backend, xp):
    case = decode_case(DecodeShape((40, 33), shared_prefix=32), backend)
    rows = xp.asarray([1, 0], dtype=xp.int32)
    out = pg.paged_attention(*case.arguments, query_to_seq=rows, **case.variants)
    swapped = pg.paged_attention(case.query[::-1].copy(), *case.arguments[1:], kernel="paged_attention_batched")
    np.testing.assert_array_equal(to_numpy(out), to_numpy(swapped)[::-1])


@pytest.mark.parametrize(
    ("count", "query_tokens", "group", "rows"), [(2, 1, 4, 8), (4, 1, 4, 16), (5, 1, 4, 32), (40, 3, 4, 32)]
)
@pytest.mark.parametrize("head_dim", [64, 192])
def test_the_prefix_is_asked_for_once_per_tile_of_all_queries(count, query_tokens, group, rows, head_dim):
    """Counted: keys and values of the prefix, times the tiles of all query rows, and of each sequence's rest once."""
    prefix, suffix = 96, 20
    shape = DecodeShape((prefix + suffix,) * count, num_heads=2 * group, query_tokens=query_tokens, head_dim=head_dim)
    case = decode_case(shape, "host")
    case.block_tables[:, : prefix // 16] = case.block_tables[0, : prefix // 16]
    plan = pg.plan_decode(case.cache, case.seq_lens, 2 * group, query_tokens=query_tokens, shared_prefix=prefix)
    with record_traffic() as log:
        pg.paged_attention(*case.arguments, plan=plan, shared_prefix=prefix)
    of_prefix, of_rest = (launch.of(*CACHE_ARRAYS).bytes for launch in log)
    rows = min(rows, 32 if head_dim <= 128 else 16)
    assert plan.prefix.shape.rows == rows
    token = case.cache.config.bytes_per_token
    assert of_prefix == prefix * token * -(-count * query_tokens * group // rows)
    assert of_rest == count * suffix * token * -(-query_tokens * group // plan.shape.rows)


def test_the_prefix_is_found_by_the_first_row_alone():
    case = decode_case(DecodeShape((70, 100, 80), shared_prefix=64, **ALL), "host")
    expected = pg.paged_attention(*case.arguments, **case.variants)
    case.block_tables[1:, :4] = 10**6
    np.testing.assert_array_equal(pg.paged_attention(*case.arguments, validate=False, **case.variants), expected)


@pytest.mark.parametrize("shape", [SHAPES[6], DecodeShape((500, 470, 0, 480), shared_prefix=464, **ALL)], ids=str)
def test_no_schedule_changes_a_bit(shape):
    case = decode_case(shape, "host")
    expected = pg.paged_attention(*case.arguments, **case.variants)
    for seed in range(1, 4):
        with host.schedule(seed):
            np.testing.assert_array_equal(pg.paged_attention(*case.arguments, **case.variants), expected)


def test_a_plan_serves_other_lengths_behind_the_same_prefix(backend, xp):
    shape = DecodeShape((300, 70, 100), shared_prefix=64, sinks=True)
    case = decode_case(shape, backend)
    plan = pg.plan_decode(case.cache, case.seq_lens, 4, shared_prefix=64)
    for lens in ((300, 70, 100), (65, 70, 90), (0, 66, 100), (299, 65, 0)):
        case.seq_lens[:] = xp.asarray(lens, dtype=xp.int32)
        plan.update(case.seq_lens)
        result = pg.paged_attention(*case.arguments, plan=plan, return_lse=True, **case.variants)
        assert_decode_matches_reference(case, *result)


def test_a_plan_for_another_prefix_is_refused(backend):
    case = decode_case(DecodeShape((100, 90), shared_prefix=64), backend)
    plan = pg.plan_decode(case.cache, case.seq_lens, 4)
    with pytest.raises(ValueError, match="made for the same shared prefix: it is for 0, the call has 64"):
        pg.paged_attention(*case.arguments, plan=plan, shared_prefix=64)
    plan = pg.plan_decode(case.cache, case.seq_lens, 4, shared_prefix=48)
    with pytest.raises(ValueError, match="made for the same shared prefix: it is for 48, the call has 64"):
        pg.paged_attention(*case.arguments, plan=plan, shared_prefix=64)


@pytest.mark.parametrize(
    ("value", "window", "error", "message"),
    [
        (16.0, None, TypeError, "shared_prefix must be an integer, in tokens; got float 16.0"),
        (True, None, TypeError, "shared_prefix must be an integer, in tokens; got bool True"),
        (-16, None, ValueError, "shared_prefix must be whole blocks, a multiple of 16 tokens; got -16"),
        (24, None, ValueError, "shared_prefix must be whole blocks, a multiple of 16 tokens; got 24"),
        (160, None, ValueError, "shared_prefix must be at most 144, what the table maps; got 160"),
        (64, 20, pg.UnsupportedError, "left out where there is a window.*got shared_prefix 64 and window 20"),
    ],
)
def test_a_wrong_prefix_is_named(value, window, error, message, backend):
    case = decode_case(DecodeShape((100, 90), shared_prefix=64), backend)
    for call in (pg.paged_attention, pg.explain):
        with pytest.raises(error, match=message):
            call(*case.arguments, shared_prefix=value, window=window)
    if value != 160:
        with pytest.raises(error, match=message):
            pg.plan_decode(case.cache, case.seq_lens, 4, shared_prefix=value, window=window)


@pytest.mark.parametrize("call", [pg.paged_attention, pg.reference.paged_attention])
def test_what_is_not_shared_is_named(call, backend):
    case = decode_case(DecodeShape((100, 90), shared_prefix=64), backend)
    query, cache, tables, lens = case.arguments
    with pytest.raises(ValueError, match=r"same blocks in all rows for the shared prefix of 80 .*block_tables\[1, 4\]"):
        call(*case.arguments, shared_prefix=80)
    lens[1] = 64
    with pytest.raises(ValueError, match=r"must be 0 or count .* 64 tokens .*, 65 at least; seq_lens\[1\] is 64"):
        call(*case.arguments, shared_prefix=64)
    lens[1] = 66
    several = query.repeat(3, axis=0).reshape(2, 3, *query.shape[1:])
    with pytest.raises(ValueError, match=r"67 at least; seq_lens\[1\] is 66"):
        call(several, cache, tables, lens, shared_prefix=64)


@pytest.mark.gpu
def test_a_shared_prefix_is_captured_with_its_plan(monkeypatch):
    import cupy

    monkeypatch.delenv("CUPAGED_VALIDATE", raising=False)
    case = decode_case(DecodeShape((300, 170), shared_prefix=64, sinks=True), "cuda")
    plan, out = pg.plan_decode(case.cache, case.seq_lens, 4, shared_prefix=64), cupy.empty_like(case.query)
    pg.paged_attention(*case.arguments, plan=plan, out=out, **case.variants)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        plan.update(case.seq_lens)
        pg.paged_attention(*case.arguments, plan=plan, out=out, **case.variants)
        graph = stream.end_capture()
        for lens in ((65, 66), (0, 100), (300, 170)):
            case.seq_lens[:] = cupy.asarray(lens, dtype=cupy.int32)
            graph.launch(stream)
            stream.synchronize()
            assert_decode_matches_reference(case, out)
