"""Plans share decode work out evenly, serve other lengths after an update, and are refused where they do not fit."""

import functools
import itertools

import numpy as np
import pytest

import cupaged as pg
from cupaged.bench.timing import time_python
from tests.kit.cases import DecodeShape, decode_case
from tests.kit.compare import assert_decode_matches_reference, to_numpy


@pytest.mark.parametrize("lens", [(0, 1, 16, 17, 9000, 0, 100), (64,) * 9, (40000,), (5, 3) * 200])
def test_pieces_cover_every_chunk_once(lens, backend):
    cache = pg.KVCache(pg.CacheConfig(1, 16, 3, 64, "float16"), backend)
    plan = pg.plan_decode(cache, cache.xp.asarray(lens, dtype=np.int32), 6)
    pieces = to_numpy(plan.pieces)[: int(plan.summary[0])]
    covered = {}
    for seq, tile, begin, end, parts, part, slot, _ in pieces.tolist():
        covered.setdefault((seq, tile), []).append((begin, end))
        assert 0 <= part < parts and (parts == 1 or 0 <= slot <= len(plan.partial_out) - parts)
    assert sorted(covered) == [(seq, tile) for seq in range(len(lens)) for tile in range(3)]
    for (seq, _), parts in covered.items():
        edges = sorted(parts)
        assert edges[0][0] == 0 and edges[-1][1] == max(1, -(-lens[seq] // plan.shape.chunk))
        assert all(before[1] == after[0] for before, after in itertools.pairwise(edges))
    sizes = (pieces[:, 3] - pieces[:, 2]).tolist()
    assert all(before >= after - 1 for before, after in itertools.pairwise(sizes))  # the largest first


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 2500])
def test_more_sequences_than_the_planner_has_threads(count, backend):
    lens = tuple(int(n) for n in np.random.default_rng(count).integers(0, 40, count))
    case = decode_case(DecodeShape(lens, num_heads=1, num_kv_heads=1, head_dim=32), backend)
    plan = pg.plan_decode(case.cache, case.seq_lens, 1)
    assert int(plan.summary[0]) >= count
    out, lse = pg.paged_attention(*case.arguments, plan=plan, return_lse=True)
    assert_decode_matches_reference(case, out, lse, "paged_attention_persistent")


def test_a_plan_serves_shorter_and_longer_sequences_after_an_update(backend, xp):
    case = decode_case(DecodeShape((300, 70)), backend)
    plan = pg.plan_decode(case.cache, case.seq_lens, 4)
    for lens in ((300, 70), (17, 70), (0, 1), (299, 64)):
        case.seq_lens[:] = xp.asarray(lens, dtype=xp.int32)
        plan.update(case.seq_lens)
        assert_decode_matches_reference(case, *pg.paged_attention(*case.arguments, plan=plan, return_lse=True))


def test_one_plan_serves_the_caches_of_all_layers(backend):
    first, second = (decode_case(DecodeShape((100, 33)), backend, seed) for seed in (0, 1))
    plan = pg.plan_decode(first.cache, first.seq_lens, 4)
    for case in (first, second, first):
        assert_decode_matches_reference(case, pg.paged_attention(*case.arguments, plan=plan))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (8, 1), (9, 1), (16, 1), (17, 1), (40, 1), (36, 3)])
def test_groups_of_every_size(heads, kv_heads, backend):
    shape = DecodeShape((150, 20, 0, 333), num_heads=heads, num_kv_heads=kv_heads, dtype="bfloat16")
    case = decode_case(shape, backend)
    out, lse = pg.paged_attention(*case.arguments, kernel="paged_attention_persistent", return_lse=True)
    assert_decode_matches_reference(case, out, lse)


def test_a_plan_that_does_not_fit_is_refused(backend):
    case = decode_case(DecodeShape((100, 33)), backend)
    plan = pg.plan_decode(case.cache, case.seq_lens, 8)
    with pytest.raises(ValueError, match="same number of query heads: it is for 8, the call has 4"):
        pg.paged_attention(*case.arguments, plan=plan)
    fewer = pg.plan_decode(case.cache, case.seq_lens[:1], 4)
    with pytest.raises(ValueError, match="same number of sequences: it is for 1, the call has 2"):
        pg.paged_attention(*case.arguments, plan=fewer)
    with pytest.raises(ValueError, match="plan must be left out for paged_attention_v1"):
        pg.paged_attention(*case.arguments, plan=plan, kernel="paged_attention_v1")
    with pytest.raises(TypeError, match="plan must be a DecodePlan, from plan_decode; got dict"):
        pg.paged_attention(*case.arguments, plan={})
    with pytest.raises(ValueError, match="num_heads must be a multiple of the cache's 2 KV heads; got 3"):
        pg.plan_decode(case.cache, case.seq_lens, 3)


@pytest.mark.parametrize(
    ("shape", "limit"),
    [
        (DecodeShape((20,), dtype="float32"), "float16 or bfloat16; the cache is float32"),
        (DecodeShape((20,), head_dim=72), "a head_dim that is a multiple of 16; the cache's is 72"),
        (DecodeShape((20,), layout="BHDSX"), "keep a token's row together; BHDSX does not"),
    ],
)
def test_what_tensor_cores_do_not_serve_is_named(shape, limit, backend):
    case = decode_case(shape, backend)
    for kernel in ("paged_attention_mma", "paged_attention_persistent"):
        with pytest.raises(pg.UnsupportedError, match=f"{kernel} takes .*{limit}"):
            pg.paged_attention(*case.arguments, kernel=kernel)
    with pytest.raises(pg.UnsupportedError, match=limit):
        pg.plan_decode(case.cache, case.seq_lens, 4)
    choice = pg.explain(*case.arguments)
    assert choice.kernel == "paged_attention_v2" and limit in choice.reason


@pytest.mark.gpu
@pytest.mark.parametrize("prepared", [False, True], ids=["called", "prepared"])
def test_a_planned_step_is_captured_and_serves_growing_sequences(prepared, monkeypatch):
    import cupy

    monkeypatch.delenv("CUPAGED_VALIDATE", raising=False)
    case = decode_case(DecodeShape((300, 70)), "cuda")
    case.seq_lens[:] = cupy.asarray([20, 5], dtype=cupy.int32)
    plan, out = pg.plan_decode(case.cache, case.seq_lens, 4), cupy.empty_like(case.query)
    called = functools.partial(pg.paged_attention, *case.arguments, plan=plan, out=out)
    call = plan.prepare(*case.arguments, out=out) if prepared else called
    call()
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        plan.update(case.seq_lens)
        call()
        graph = stream.end_capture()
        for lens in ((20, 5), (21, 6), (160, 17), (300, 70)):
            case.seq_lens[:] = cupy.asarray(lens, dtype=cupy.int32)
            graph.launch(stream)
            stream.synchronize()
            assert_decode_matches_reference(case, out)


@pytest.mark.gpu
def test_a_planned_call_costs_at_most_10_us_of_python_more_than_a_bare_launch(monkeypatch):
    monkeypatch.delenv("CUPAGED_VALIDATE", raising=False)
    case = decode_case(DecodeShape((40, 33), num_heads=8, head_dim=128), "cuda")
    plan, out = pg.plan_decode(case.cache, case.seq_lens, 8), case.cache.xp.empty_like(case.query)
    prepared = plan.prepare(*case.arguments, out=out)
    (launch,) = prepared.launches
    bare = functools.partial(launch.launcher.by_cupy, launch.values)
    planned = functools.partial(pg.paged_attention, *case.arguments, plan=plan, out=out)
    bare_us, planned_us = (timing.median_us for timing in time_python([bare, planned]))
    assert planned_us - bare_us <= 10


def test_lengths_that_the_plan_does_not_hold_are_refused(backend, xp):
    case = decode_case(DecodeShape((300, 70)), backend)
    plan = pg.plan_decode(case.cache, xp.asarray([200, 70], dtype=xp.int32), 4)
    with pytest.raises(ValueError, match=r"call plan.update\(seq_lens\); seq_lens\[0\] is 300"):
        pg.paged_attention(*case.arguments, plan=plan, validate=True)
    windowed = decode_case(DecodeShape((300, 70), window=50), backend)
    plan = pg.plan_decode(windowed.cache, xp.asarray([600, 70], dtype=xp.int32), 4, window=50)
    with pytest.raises(ValueError, match="the plan holds its tokens 544 to 607"):
        pg.paged_attention(*windowed.arguments, plan=plan, window=50, validate=True)
    plan.update(windowed.seq_lens)
    assert_decode_matches_reference(windowed, pg.paged_attention(*windowed.arguments, plan=plan, window=50))


def test_a_window_as_wide_as_the_table_fits_its_plan(backend):
    case = decode_case(DecodeShape((300, 70)), backend)
    plan = pg.plan_decode(case.cache, case.seq_lens, 4, window=5000)
    assert_decode_matches_reference(case, pg.paged_attention(*case.arguments, plan=plan, window=5000))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"query_tokens": 0}, ValueError, "query_tokens must be at least 1; got 0"),
        ({"window": -5}, ValueError, "window must be at least 1, the query's own token; got -5"),
        ({"window": 2.5}, TypeError, "window must be an integer, in tokens; got float 2.5"),
    ],
)
def test_a_plan_of_nonsense_is_refused(options, error, message, backend):
    case = decode_case(DecodeShape((20,)), backend)
    with pytest.raises(error, match=message):
        pg.plan_decode(case.cache, case.seq_lens, 4, **options)
