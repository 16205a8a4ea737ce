"""Prefill over a paged context, held to the float64 reference on both backends."""

from dataclasses import replace

import numpy as np
import pytest

import cupaged as pg
from cupaged.attention.kernels import prefill
from cupaged.bench.accuracy import prefill_budget
from tests.kit.cases import DecodeShape
from tests.kit.compare import assert_prefill_matches_reference, to_numpy
from tests.kit.cuda_stub import H100, CudaStub
from tests.kit.prefill import TENSOR_CORE_DIMS, PrefillShape, prefill_case, random_prefill_shape

ON_HOST = {"cases": 200, "specialisations": 30}
ON_GPU = {"cases": 1000, "specialisations": 120}
LAYOUTS = ["BSHD", "BHSD", "HBSD", "BS2HD"]


def attend(case, **more):
    return pg.paged_prefill(*case.arguments, return_lse=True, **case.options, **more)


SHAPES = [
    *(PrefillShape(DecodeShape((70, 9), head_dim=dim, num_heads=8), (40, 9)) for dim in TENSOR_CORE_DIMS),
    *(PrefillShape(DecodeShape((70, 200), head_dim=dim, num_heads=8), (4, 2)) for dim in TENSOR_CORE_DIMS),
    *(PrefillShape(DecodeShape((150, 60), head_dim=dim, dtype="bfloat16"), (60, 60)) for dim in (64, 128, 256)),
    *(PrefillShape(DecodeShape((90, 33), layout=layout, block_size=7), (60, 33)) for layout in LAYOUTS),
    PrefillShape(DecodeShape((90, 33), layout="BHDSX", block_size=1), (60, 33)),
    PrefillShape(DecodeShape((300, 0, 1, 129), head_dim=32), (0, 0, 1, 129)),
    PrefillShape(DecodeShape((130,), num_heads=2, num_kv_heads=2, head_dim=80), (130,)),
    *(PrefillShape(DecodeShape((70, 200), head_dim=dim, num_heads=8), new)  # 6, 18 and 30 vectors a row
      for dim in (48, 144, 240) for new in ((4, 2), (40, 9))),
    PrefillShape(DecodeShape((700, 64, 1), num_heads=6), (1, 64, 1)),
    PrefillShape(DecodeShape((100, 5), num_heads=6), (140, 9)),
    PrefillShape(DecodeShape((260, 40), num_heads=24, unmapped=0.4), (50, 40), causal=False),
    PrefillShape(DecodeShape((200, 70), spread=3.0, window=33, query_tokens=70, softcap=5.0, alibi=True, sinks=True),
                 (20, 70)),
    PrefillShape(DecodeShape((200, 70), softcap=5.0, alibi=True, sinks=True), (90, 70), causal=False),
    PrefillShape(DecodeShape((200,), window=1, query_tokens=100, num_heads=4), (100,)),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_matches_the_reference(shape, backend):
    case = prefill_case(shape, backend)
    assert_prefill_matches_reference(case, *attend(case))


def check(seed, specialisations, backend):
    shape = random_prefill_shape(seed, specialisations)
    case, elsewhere = (prefill_case(shape, backend, seed, placement) for placement in (seed, seed + 1))
    try:
        out, lse = attend(case)
        assert_prefill_matches_reference(case, out, lse)
        if seed % 3 == 0:
            moved = attend(elsewhere)[0]
            same = np.array_equal(*(to_numpy(array).view(np.uint8) for array in (out, moved)))
            assert same, "the result depends on where blocks lie"
    except (AssertionError, pg.KernelLaunchError) as error:
        raise AssertionError(f"random_prefill_shape({seed}, {specialisations}), {shape}: {error}") from error


@pytest.mark.parametrize("seed", range(ON_HOST["cases"]))
def test_a_random_case_on_the_host(seed):
    check(seed, ON_HOST["specialisations"], "host")


@pytest.mark.gpu
@pytest.mark.parametrize("hundred", range(ON_GPU["cases"] // 100))
def test_a_hundred_random_cases_on_the_gpu(hundred):
    for seed in range(hundred, ON_GPU["cases"], ON_GPU["cases"] // 100):  # which share what must be compiled
        check(seed, ON_GPU["specialisations"], "cuda")


@pytest.mark.parametrize(("dtype", "height"), [("float16", 60), ("bfloat16", 3000)])
@pytest.mark.parametrize("order", ["climbing", "falling", "now and then"])
def test_logits_may_outgrow_all_before_them(order, dtype, height, backend, xp):
    tokens = 200
    along = {
        "climbing": np.linspace(-1, 1, tokens),
        "falling": np.linspace(1, -1, tokens),
        "now and then": np.where(np.arange(tokens) % 37 == 36, 1, -1) * np.linspace(0.5, 1, tokens),
    }[order]
    cache = pg.KVCache(pg.CacheConfig(13, 16, 2, 64, dtype), backend)
    rng, storage = np.random.default_rng(0), cache.config.numpy_dtype
    key, query = np.zeros((tokens, 2, 64)), np.zeros((tokens, 4, 64))
    key[..., 0], query[..., 0] = height * along[:, np.newaxis], 1
    value = rng.standard_normal((tokens, 2, 64))
    key, query, value = (xp.asarray(array.astype(storage)) for array in (key, query, value))
    pg.append_kv(cache, key, value, xp.arange(tokens))
    tables, lens = xp.arange(13, dtype=np.int32)[np.newaxis], xp.asarray([tokens], dtype=np.int32)
    arguments = query, cache, tables, lens, xp.asarray([0, tokens], dtype=np.int32)
    out, lse = pg.paged_prefill(*arguments, scale=1.0, return_lse=True)
    budget = prefill_budget(*arguments, scale=1.0)
    assert budget.error_of(out) <= 1
    assert budget.error_of_lse(to_numpy(lse)) <= 1


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("prefix", [0, 48])
def test_chunks_end_at_a_block_or_beside_it(prefix, more, backend):
    for new in (16 + more, 64 + more):
        case = prefill_case(PrefillShape(DecodeShape((prefix + new, prefix + 2 * new)), (new, new)), backend)
        assert_prefill_matches_reference(case, *attend(case))


@pytest.mark.parametrize("chunks", [(1, 99), (33, 33, 34), (64, 36), (7,) * 14 + (2,)], ids=str)
def test_chunk_by_chunk_is_one_prefill(chunks, backend, xp):
    shape = PrefillShape(DecodeShape((100,), num_heads=6, head_dim=64, dtype="bfloat16"), (100,))
    case = prefill_case(shape, backend)
    query, cache, tables, _, _ = case.arguments
    once = to_numpy(pg.paged_prefill(*case.arguments)).astype(float)
    budget = prefill_budget(*case.arguments)
    done = 0
    for chunk in chunks:
        lens, starts = xp.asarray([done + chunk], dtype=xp.int32), xp.asarray([0, chunk], dtype=xp.int32)
        out = to_numpy(pg.paged_prefill(query[done : done + chunk].copy(), cache, tables, lens, starts)).astype(float)
        rows = slice(done, done + chunk)
        assert (np.abs(out - budget.expected[rows]) <= budget.out[rows]).all()
        assert (np.abs(out - once[rows]) <= 2 * budget.out[rows]).all()
        done += chunk


@pytest.mark.parametrize("heads", [1, 4])
def test_a_long_context_is_cut_into_parts(heads, backend, monkeypatch):
    shape = PrefillShape(DecodeShape((900, 40), num_heads=heads, num_kv_heads=1, sinks=True), (3, 1))
    case = prefill_case(shape, backend)
    plan = pg.plan_prefill(case.decode.cache, case.decode.seq_lens, case.query_start, 4, heads)
    count = int(to_numpy(plan.summary)[0])
    if backend == "host":
        assert to_numpy(plan.pieces)[:count, 8].max() > 1
    assert_prefill_matches_reference(case, *attend(case, plan=plan))
    assert not to_numpy(plan.arrivals).any()


def test_a_plan_lists_every_row_and_tile_once_the_longest_first(backend):
    lens, new, group, heads = (500, 130, 0, 64, 65), (300, 2, 0, 64, 1), 3, 2
    case = prefill_case(PrefillShape(DecodeShape(lens, num_heads=group * heads, num_kv_heads=heads), new), backend)
    plan = pg.plan_prefill(case.decode.cache, case.decode.seq_lens, case.query_start, sum(new), group * heads)
    count, section = to_numpy(plan.summary)
    assert 1 <= section <= heads
    pieces = to_numpy(plan.pieces)[:count]
    seq, first_row, context, seq_len, begin, end = pieces.T[[0, 2, 4, 5, 6, 7]]
    lengths = end - begin
    assert (lengths[:-1] + lengths.max() / 1024 + 1 >= lengths[1:]).all()
    covered = {}
    for piece in pieces.tolist():
        s, _, row, count_of_rows = piece[:4]
        for r in range(row, row + count_of_rows):
            covered.setdefault((s, r), []).extend(range(piece[6], piece[7]))
    expected = {}
    for s, (length, tokens) in enumerate(zip(lens, new, strict=True)):
        for r in range(tokens * group):
            last_row = min(r // plan.shape.rows * plan.shape.rows + plan.shape.rows, tokens * group) - 1
            expected[s, r] = list(range(-(-(length - tokens + 1 + last_row // group) // 64)))
    assert {key: sorted(tiles) for key, tiles in covered.items()} == expected
    assert (seq_len == np.array(lens)[seq]).all() and (context == seq_len - np.array(new)[seq] + 1).all()
    for s, row in {(p[0], p[2]) for p in pieces.tolist()}:
        mine = pieces[(seq == s) & (first_row == row)]
        assert sorted(mine[:, 9].tolist()) == list(range(mine[0, 8])) and len(set(mine[:, 10])) == 1


def test_a_plan_serves_other_lengths_after_update(backend, xp):
    shapes = [
        PrefillShape(DecodeShape(lens, num_heads=4), new) for lens, new in (((80, 20), (40, 20)), ((50, 300), (50, 10)))
    ]
    cases = [prefill_case(shape, backend) for shape in shapes]
    plan = pg.plan_prefill(cases[0].decode.cache, cases[0].decode.seq_lens, cases[0].query_start, 60, 4)
    for case in (*cases, *cases[::-1]):
        plan.update(case.decode.seq_lens, case.query_start)
        assert_prefill_matches_reference(case, *attend(case, plan=plan))


def test_out_is_written_and_returned(backend, xp):
    case = prefill_case(PrefillShape(DecodeShape((40,)), (40,)), backend)
    out = xp.full_like(case.query, 7)
    assert pg.paged_prefill(*case.arguments, out=out) is out
    np.testing.assert_array_equal(to_numpy(out), to_numpy(pg.paged_prefill(*case.arguments)))


def test_no_new_tokens_are_fine(backend):
    case = prefill_case(PrefillShape(DecodeShape((40, 3)), (0, 0)), backend)
    out, lse = attend(case)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("query_start", [0, 10], ValueError, "must begin with 0 and end with the number of query tokens, 12"),
        ("query_start", [1, 12], ValueError, "it begins with 1 and ends with 12"),
        ("query_start", [0, 12, 12], ValueError, r"query_start must have shape \[2\]; got \[3\]"),
        ("seq_lens", [-1], ValueError, r"seq_lens must be at least 0; seq_lens\[0\] is -1"),
        ("seq_lens", [10**6], ValueError, "seq_lens must be at most"),
        ("seq_lens", [1.0], TypeError, "seq_lens must have dtype int32"),
    ],
)
def test_a_mistake_names_the_argument(argument, value, error, message, backend, xp):
    case = prefill_case(PrefillShape(DecodeShape((20,)), (12,)), backend)
    given = {"query": case.query, "block_tables": case.decode.block_tables, "seq_lens": case.decode.seq_lens,
             "query_start": case.query_start}  # fmt: skip
    array = np.asarray(value)
    given[argument] = xp.asarray(array.astype(np.int32) if array.dtype.kind == "i" else array)
    with pytest.raises(error, match=message):
        pg.paged_prefill(cache=case.decode.cache, **given)


def test_starts_may_not_fall(backend, xp):
    case = prefill_case(PrefillShape(DecodeShape((20, 20)), (12, 3)), backend)
    query, cache, tables, lens, _ = case.arguments
    with pytest.raises(ValueError, match=r"query_start\[1\] is 16, and query_start\[2\] 15"):
        pg.paged_prefill(query, cache, tables, lens, xp.asarray([0, 16, 15], dtype=xp.int32))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (DecodeShape((20,), layout="BHDSX"), {}, "paged_prefill takes layouts that keep a token's row together; BHDSX"),
        (DecodeShape((20,), dtype="float32"), {}, "paged_prefill takes float16 or bfloat16; the cache is float32"),
        (DecodeShape((20,), head_dim=72), {}, "paged_prefill takes a head_dim that is a multiple of 16"),
        (DecodeShape((20,)), {"causal": False, "window": 4}, "window must be left out where causal is False"),
    ],
)
def test_what_it_does_not_serve_is_said(shape, options, message, backend):
    case = prefill_case(PrefillShape(shape, (12,)), backend)
    with pytest.raises(pg.UnsupportedError, match=message):
        pg.paged_prefill(*case.arguments, **options)


def test_starts_that_fall_are_refused_or_do_nothing(backend, xp, monkeypatch):
    case = prefill_case(PrefillShape(DecodeShape((200,)), (200,)), backend)
    query, cache, tables, lens, _ = case.arguments
    falling = xp.asarray([0, 200] * 40, dtype=xp.int32)
    many = xp.repeat(tables, 79, axis=0), xp.repeat(lens, 79)
    with pytest.raises(ValueError, match="query_start must not fall; query_start\\[1\\] is 200"):
        pg.paged_prefill(query, cache, *many, falling, validate=True)
    if backend == "host":
        with pytest.raises(ValueError, match="query_start must not fall"):
            pg.plan_prefill(cache, many[1], falling, 200, query.shape[1])
    plan = prefill.PrefillPlan(cache, 79, 200, query.shape[1])
    monkeypatch.setattr(prefill, "must_validate", lambda *_: False)
    plan.update(many[1], falling)
    assert int(plan.summary[0]) == 0


def test_a_plan_for_other_lengths_is_refused(backend, xp):
    case = prefill_case(PrefillShape(DecodeShape((100, 60)), (30, 9)), backend)
    query, cache, _, lens, starts = case.arguments
    stale = pg.plan_prefill(cache, xp.asarray([90, 60], dtype=xp.int32), starts, 39, query.shape[1])
    with pytest.raises(ValueError, match="must be what the plan was last made for: call plan.update"):
        attend(case, plan=stale, validate=True)
    other = pg.plan_prefill(cache, lens, xp.asarray([0, 20, 39], dtype=xp.int32), 39, query.shape[1])
    with pytest.raises(ValueError, match="must be what the plan was last made for"):
        attend(case, plan=other, validate=True)
    stale.update(lens, starts)
    assert_prefill_matches_reference(case, *attend(case, plan=stale, validate=True))


def test_a_plan_for_something_else_is_refused(backend):
    case = prefill_case(PrefillShape(DecodeShape((20,)), (12,)), backend)
    plan = pg.plan_prefill(case.decode.cache, case.decode.seq_lens, case.query_start, 12, 4, window=5)
    with pytest.raises(ValueError, match="plan must be made for the same window: it is for 5, the call has None"):
        pg.paged_prefill(*case.arguments, plan=plan)
    with pytest.raises(TypeError, match="plan must be a PrefillPlan or a DecodePlan; got int"):
        pg.paged_prefill(*case.arguments, plan=3)


FEW = PrefillShape(DecodeShape((70, 3, 129), num_heads=8, spread=3.0, query_tokens=4), (4, 4, 4))


@pytest.mark.parametrize("more", [{}, {"window": 20}, {"softcap": 5.0, "alibi": True, "sinks": True}], ids=str)
def test_as_few_new_tokens_each_are_planned_as_decode(more, backend, xp):
    case = prefill_case(replace(FEW, decode=replace(FEW.decode, **more)), backend)
    plan = pg.plan_decode(case.decode.cache, case.decode.seq_lens, 8, query_tokens=4, window=more.get("window"))
    assert_prefill_matches_reference(case, *attend(case, plan=plan))
    out = xp.empty_like(case.arguments[0])
    assert pg.paged_prefill(*case.arguments, **case.options, plan=plan, out=out) is out
    assert_prefill_matches_reference(case, out, attend(case)[1])


def test_others_are_not_planned_as_decode(backend, xp):
    case = prefill_case(FEW, backend)
    lens = case.decode.seq_lens
    plan = pg.plan_decode(case.decode.cache, lens, 8, query_tokens=4)
    query, cache, tables, _, _ = case.arguments
    uneven = xp.asarray([0, 3, 8, 12], dtype=np.int32)
    with pytest.raises(
        ValueError, match=r"query_start must give every sequence the 4 new tokens .* got \[0, 3, 8, 12\]"
    ):
        pg.paged_prefill(query, cache, tables, lens, uneven, plan=plan, validate=True)
    with pytest.raises(pg.UnsupportedError, match="causal must be True where plan is a DecodePlan"):
        pg.paged_prefill(*case.arguments, plan=plan, causal=False)
    prefixed = pg.plan_decode(cache, lens, 8, query_tokens=4, shared_prefix=16)
    with pytest.raises(pg.UnsupportedError, match="plan must be for no shared prefix; it is for one of 16 tokens"):
        pg.paged_prefill(*case.arguments, plan=prefixed)
    for tokens, seqs in ((3, 3), (4, 2)):
        other = pg.plan_decode(cache, lens[:seqs], 8, query_tokens=tokens)
        with pytest.raises(ValueError, match=f"it is for {tokens} of each of {seqs} sequences, the call has 12 of 3"):
            pg.paged_prefill(*case.arguments, plan=other)


def test_a_head_dim_that_a_device_has_no_room_for_is_refused(monkeypatch):
    """Consumer GPUs give a block 99 KiB; the module takes such prompts as decode queries then."""
    stub = CudaStub(monkeypatch)
    lens, starts = stub.array((2,), np.int32), stub.array((3,), np.int32)
    wide, narrow = (pg.KVCache(pg.CacheConfig(8, 16, 2, dim), "cuda") for dim in (256, 128))
    assert pg.PrefillPlan(wide, 2, 100, 4).num_blocks == 132
    monkeypatch.setitem(H100, "MaxSharedMemoryPerBlockOptin", 101376)
    assert pg.PrefillPlan(narrow, 2, 100, 4).num_blocks == 264
    with pytest.raises(pg.UnsupportedError, match="139264 bytes of shared memory for a head_dim of 256; .* 97280"):
        pg.plan_prefill(wide, lens, starts, 100, 4)
