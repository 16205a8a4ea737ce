"""A call like one that passed its checks is launched at once; one that differs in anything is checked in full."""

import gc
import shutil
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest

import cupaged as pg
from cupaged.attention import api
from cupaged.kv_cache import aligned_zeros
from cupaged.runtime import kernels_defining, kernels_folder, launch
from cupaged.runtime.host import HostKernel
from tests.kit.cases import DecodeShape, decode_case
from tests.kit.compare import assert_decode_matches_reference

SHAPE = DecodeShape((100, 33))


@pytest.fixture
def checks(monkeypatch):
    """The calls that were checked in full."""
    calls, checked_call = [], api.checked_call

    def counted(*arguments, **options):
        calls.append(options)
        return checked_call(*arguments, **options)

    monkeypatch.setattr(api, "checked_call", counted)
    return calls


def aligned(array):
    """Return a copy that starts where a GPU's allocator would let it start."""
    copy = aligned_zeros(array.shape, array.dtype)
    copy[...] = array
    return copy


class Planned:
    """A case, its plan, and one call that passed its checks."""

    def __init__(self, shape=SHAPE, seed=0):
        self.case = decode_case(shape, "host", seed)
        self.case.query, self.case.block_tables, self.case.seq_lens = (
            aligned(a) for a in (self.case.query, self.case.block_tables, self.case.seq_lens)
        )
        self.plan = pg.plan_decode(self.case.cache, self.case.seq_lens, shape.num_heads)
        self.out = aligned(np.zeros_like(self.case.query))
        self(out=self.out)

    def __call__(self, case=None, **changes):
        query, cache, tables, lens = (case or self.case).arguments
        given = {"query": query, "cache": cache, "block_tables": tables, "seq_lens": lens, "validate": False}
        return pg.paged_attention(**{**given, "plan": self.plan, **changes})


def test_a_call_like_one_before_is_not_checked_again(checks):
    planned = Planned()
    assert len(checks) == 1
    assert planned(out=planned.out) is planned.out
    assert_decode_matches_reference(planned.case, planned.out)
    assert len(checks) == 1


def test_other_arrays_and_caches_of_the_same_kind_take_the_place_of_those_that_were_checked(checks):
    """As in a model: each layer has its cache, each step its query."""
    planned = Planned()
    for seed in (1, 2):
        other = Planned(seed=seed)
        checks.clear()
        planned.plan.update(other.case.seq_lens)
        out = aligned(np.full_like(planned.out, np.nan))
        planned(other.case, out=out)
        assert_decode_matches_reference(other.case, out)
        assert not checks


def test_a_log_sum_exp_that_was_not_asked_for_before_is_computed():
    planned = Planned()
    assert_decode_matches_reference(planned.case, *planned(out=planned.out, return_lse=True))
    assert planned(out=planned.out) is planned.out


def test_room_for_results_is_made_anew(checks):
    planned = Planned()
    first, first_lse = planned(return_lse=True)
    checks.clear()
    out, lse = planned(return_lse=True)
    assert not checks and out is not first and lse is not first_lse
    assert_decode_matches_reference(planned.case, out, lse)


@pytest.mark.parametrize("variants", [{"softcap": 5.0}, {"alibi": True}, {"sinks": True}])
def test_variants_are_part_of_what_is_remembered(variants, checks):
    case = decode_case(replace(SHAPE, **variants), "host")
    plan = pg.plan_decode(case.cache, case.seq_lens, SHAPE.num_heads)
    for _ in range(2):
        out, lse = pg.paged_attention(*case.arguments, plan=plan, validate=False, return_lse=True, **case.variants)
        assert_decode_matches_reference(case, out, lse)
        out, lse = pg.paged_attention(*case.arguments, plan=plan, validate=False, return_lse=True)
        assert_decode_matches_reference(replace(case, variants={}), out, lse)
    assert len(checks) == 2


def test_every_difference_is_checked_and_right(checks):
    planned = Planned()
    case = planned.case
    wider = aligned(np.pad(case.block_tables, ((0, 0), (0, 1)), constant_values=-1))
    for change in ({"scale": 0.5}, {"kernel": "paged_attention_persistent"}, {"block_tables": wider}):
        checks.clear()
        for _ in range(2):
            out = planned(out=planned.out, **change)
        assert len(checks) == 1, change
        expected = pg.reference.paged_attention(*case.arguments, scale=change.get("scale"))
        np.testing.assert_allclose(out, expected, atol=2e-3)
    checks.clear()
    several = planned(query=case.query[:, None])
    np.testing.assert_array_equal(several[:, 0], planned())
    assert len(checks) == 2  # a query of four axes, and a call that made room for its result


def read_only(array):
    view = array.view()
    view.flags.writeable = False
    return view


def moved(array, by=2):
    """Return a copy that starts `by` bytes past a 16-byte boundary."""
    room = aligned_zeros((array.nbytes + 16,), np.dtype(np.uint8))
    copy = room[by : by + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: {"query": p.case.query.astype(np.float32)}, TypeError, "query must have dtype float16"),
        (lambda p: {"query": p.case.query[:1]}, ValueError, "block_tables must have shape"),
        (lambda p: {"query": p.case.query[::-1]}, ValueError, "query must be C-contiguous"),
        (lambda p: {"query": moved(p.case.query)}, ValueError, "query must start on a 16-byte boundary"),
        (lambda p: {"query": p.case.query.tolist()}, TypeError, "query must be a NumPy array"),
        (lambda p: {"out": None, "query": aligned(p.case.query[:, :2])}, ValueError, "same number of query heads"),
        (lambda p: {"block_tables": p.case.block_tables.astype(np.int64)}, TypeError, "block_tables must have dtype"),
        (lambda p: {"seq_lens": p.case.seq_lens[:1]}, ValueError, "seq_lens must have shape"),
        (lambda p: {"out": None, "scale": True}, TypeError, "scale must be a real number"),
        (lambda p: {"scale": float("nan")}, ValueError, "scale must be finite"),
        (lambda p: {"scale": np.ones(3)}, TypeError, "scale must be a real number"),
        (lambda p: {"window": True}, TypeError, "window must be an integer"),
        (lambda p: {"window": 8}, ValueError, "same window"),
        (lambda p: {"kernel": "paged_attention_v1"}, ValueError, "plan must be left out for paged_attention_v1"),
        (lambda p: {"kernel": "none"}, ValueError, "kernel must be 'auto' or one of"),
        (lambda p: {"sinks": np.zeros(3, np.float32)}, ValueError, "sinks must have shape"),
        (lambda p: {"plan": {}}, TypeError, "plan must be a DecodePlan"),
        (lambda p: {"cache": p.case.query}, TypeError, "cache must be a KVCache"),
        (lambda p: {"cache": pg.KVCache(pg.CacheConfig(8, 32, 2, 64), "host")}, ValueError, "same cache"),
        (lambda p: {"cache": pg.KVCache(pg.CacheConfig(8, 16, 2, 64, "bfloat16"), "host")}, TypeError, "query must"),
        (lambda p: {"out": p.out.astype(np.float32)}, TypeError, "out must have dtype float16"),
        (lambda p: {"out": read_only(p.out)}, ValueError, "out is written, but it is read-only"),
        (lambda p: {"out": p.case.query}, ValueError, "out must not share memory with query"),
        (
            lambda p: {"out": p.case.cache.key.reshape(-1)[: p.out.size].reshape(p.out.shape)},
            ValueError,
            "out must not share memory with cache",
        ),
    ],
)
def test_a_mistake_after_a_good_call_is_still_named(change, error, message):
    planned = Planned()
    with pytest.raises(error, match=message):
        planned(**{"out": planned.out, **change(planned)})


def test_out_may_lie_right_behind_the_query_but_not_over_its_end(checks):
    planned = Planned()
    size = planned.out.size
    room = aligned_zeros((3 * size,), planned.out.dtype)
    query = room[size : 2 * size].reshape(planned.out.shape)
    query[...] = planned.case.query
    checks.clear()
    for start in (0, 2 * size):
        out = room[start : start + size].reshape(planned.out.shape)
        np.testing.assert_array_equal(planned(query=query, out=out), planned.out)
    assert not checks
    for start in (8, 2 * size - 8):
        with pytest.raises(ValueError, match="out must not share memory with query"):
            planned(query=query, out=room[start : start + size].reshape(planned.out.shape))


def test_memory_that_is_used_again_is_taken_for_what_it_is_now(checks):
    planned = Planned()
    room = aligned_zeros((planned.case.query.nbytes,), np.dtype(np.uint8))
    query = room.view(np.float16).reshape(planned.case.query.shape)
    query[...] = planned.case.query
    planned(query=query, out=planned.out)
    del query
    again = room.view(np.float16).reshape(planned.case.query.shape)
    again[...] = -planned.case.query
    checks.clear()
    np.testing.assert_array_equal(planned(query=again, out=planned.out), planned(query=-planned.case.query))
    with pytest.raises(TypeError, match="query must have dtype float16; got int16"):
        planned(query=again.view(np.int16), out=planned.out)
    again.shape = (*again.shape[:-1], 32, 2)
    with pytest.raises(ValueError, match="query must have shape"):
        planned(query=again, out=planned.out)


def test_a_plan_holds_no_arrays_of_its_calls():
    planned = Planned()
    case, plan = planned.case, planned.plan
    held = [weakref.ref(a) for a in (case.query, planned.out, case.block_tables, case.cache.key, case.cache)]
    pg.append_kv(case.cache, *(np.zeros((1, 2, 64), np.float16) for _ in "kv"), np.array([3]), validate=False)
    del planned, case
    gc.collect()
    assert plan.calls._calls and [ref() for ref in held] == [None] * 5


def test_validation_reads_what_a_known_call_is_given(checks):
    planned = Planned()
    tables = planned.case.block_tables.copy()
    tables[0, 0] = 10**6
    for validate in (True, None):  # None: as the environment says, and always on the host
        with pytest.raises(ValueError, match=r"block_tables\[0, 0\] is 1000000"):
            planned(block_tables=aligned(tables), validate=validate)
    checks.clear()
    planned(validate=True)
    planned(validate=True)
    assert len(checks) == 2


def test_an_edited_kernel_is_noticed(tmp_path):
    copy = tmp_path / "kernels_cu"
    shutil.copytree(kernels_folder(), copy)
    with pg.kernels_from(copy):
        planned = Planned()
        before = planned(out=planned.out).copy()
        header = copy / "include" / "attention_tile.cuh"
        header.write_text(header.read_text(encoding="utf-8") + "\n#error edited\n", encoding="utf-8")
        time.sleep(2 * launch.LOOK_SECONDS)
        with pytest.raises(pg.KernelBuildError, match="#error edited"):
            planned(out=planned.out)
    np.testing.assert_array_equal(planned(out=planned.out), before)


def test_blocks_that_ask_for_other_kernels_get_them_at_once(tmp_path, monkeypatch):
    copy = tmp_path / "kernels_cu"
    shutil.copytree(kernels_folder(), copy)
    launched = []
    monkeypatch.setattr(HostKernel, "_run", lambda kernel, *_: launched.append(kernel.source))
    planned = Planned()
    launched.clear()
    planned(out=planned.out)
    with pg.kernels_from(copy):
        planned(out=planned.out)
    with kernels_defining(SWITCH=1):
        planned(out=planned.out)
        planned(out=planned.out)
    planned(out=planned.out)
    own = kernels_folder()
    assert [source.folder for source in launched] == [own, copy, own, own, own]
    assert [("SWITCH", "1") in source.defines for source in launched] == [False, False, True, True, False]


def test_the_folder_of_the_environment_is_noticed(tmp_path, monkeypatch):
    copy = tmp_path / "kernels_cu"
    shutil.copytree(kernels_folder(), copy)
    launched = []
    monkeypatch.setattr(HostKernel, "_run", lambda kernel, *_: launched.append(kernel.source.folder))
    planned = Planned()
    launched.clear()
    monkeypatch.setenv("CUPAGED_KERNELS", str(copy))
    time.sleep(2 * launch.LOOK_SECONDS)
    planned(out=planned.out)
    assert launched == [copy]


# --- prepared calls, updates, appends -----------------------------------------------------------------------------


def test_a_prepared_call_launches_and_checks_nothing(backend, xp, checks):
    case = decode_case(DecodeShape((300, 70)), backend)
    plan, out = pg.plan_decode(case.cache, case.seq_lens, 4), xp.empty_like(case.query)
    call = plan.prepare(*case.arguments, out=out, return_lse=True)
    checks.clear()
    for lens in ((300, 70), (17, 70), (0, 1), (299, 64)):
        case.query *= xp.float16(0.9)
        case.seq_lens[:] = xp.asarray(lens, dtype=xp.int32)
        plan.update(case.seq_lens)
        result, lse = call()
        assert result is out
        assert_decode_matches_reference(case, out, lse)
    assert not checks


def test_a_prepared_call_makes_room_once(backend):
    case = decode_case(SHAPE, backend)
    call = pg.plan_decode(case.cache, case.seq_lens, 4).prepare(*case.arguments, scale=0.125)
    assert call() is call()
    assert_decode_matches_reference(case, call())


def test_preparing_checks_and_launches_nothing(backend, xp):
    case = decode_case(SHAPE, backend)
    plan = pg.plan_decode(case.cache, case.seq_lens, 4)
    out = xp.full_like(case.query, xp.nan)
    plan.prepare(*case.arguments, out=out)
    assert xp.isnan(out).all()
    with pytest.raises(ValueError, match="out must not share memory with query"):
        plan.prepare(*case.arguments, out=case.query)
    with pytest.raises(ValueError, match="plan must be left out for paged_attention_v1"):
        plan.prepare(*case.arguments, kernel="paged_attention_v1")
    case.block_tables[0, 0] = 10**6
    with pytest.raises(ValueError, match=r"block_tables\[0, 0\] is 1000000"):
        plan.prepare(*case.arguments)


def test_updates_with_lengths_of_the_same_kind_are_not_checked_again(monkeypatch):
    planned = Planned()
    loads = []
    monkeypatch.setattr("cupaged.attention.kernels.persistent.load_kernel", lambda *a, **k: loads.append(a))
    planned.plan.update(aligned(np.array([5, 20], np.int32)))
    planned.case.seq_lens[:] = (5, 20)
    monkeypatch.undo()
    assert not loads
    assert_decode_matches_reference(planned.case, planned(out=planned.out))
    for lens, error in ((np.zeros(3, np.int32), ValueError), (np.zeros(2, np.int64), TypeError)):
        with pytest.raises(error, match="seq_lens must have"):
            planned.plan.update(lens)


@pytest.mark.parametrize("slot_dtype", [np.int32, np.int64])
def test_an_append_like_one_before_is_not_checked_again(slot_dtype, monkeypatch):
    cache = pg.KVCache(pg.CacheConfig(4, 16, 2, 64), "host")
    rng = np.random.default_rng(0)
    rows = [[aligned(rng.standard_normal((3, 2, 64)).astype(np.float16)) for _ in "kv"] for _ in range(2)]
    first, second = (aligned(np.array(slots, slot_dtype)) for slots in ([3, 17, 60], [4, -1, 61]))
    pg.append_kv(cache, *rows[0], first, validate=False)
    loads = []
    monkeypatch.setattr("cupaged.ops.cache.load_kernel", lambda *a, **k: loads.append(a))
    pg.append_kv(cache, *rows[1], second, validate=False)
    monkeypatch.undo()
    assert not loads
    for array, old, new in zip(cache.to_dense(), *rows, strict=True):
        flat = array.reshape(64, 2, 64)
        np.testing.assert_array_equal(flat[[3, 17, 60, 4, 61]], [*old, new[0], new[2]])
        assert np.count_nonzero(flat.any(axis=(1, 2))) == 5
    pg.append_kv(cache, *(array[:1] for array in rows[1]), first[:1], validate=False)  # fewer tokens: another call
    np.testing.assert_array_equal(cache.to_dense()[0].reshape(64, 2, 64)[[3, 17]], [rows[1][0][0], rows[0][0][1]])
    with pytest.raises(ValueError, match="value must have shape"):
        pg.append_kv(cache, rows[0][0], rows[0][1][:2], first, validate=False)
    with pytest.raises(ValueError, match="slot_mapping must hold slots below 64"):
        pg.append_kv(cache, *rows[0], aligned(np.array([1, 2, 64], slot_dtype)), validate=True)
