"""Calls that start while the kernel before them ends: they see all that it writes, whatever that is."""

import threading
from functools import partial

import numpy as np
import pytest

import cupaged as pg
from cupaged.runtime.driver import can_overlap_launches
from tests.kit.cases import DecodeShape, decode_case
from tests.kit.compare import assert_decode_matches_reference

LONG = DecodeShape((6000, 3000, 1500, 40), num_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16")


class Steps:
    """Steps of decoding in which the kernel right before attention writes the table, values, the plan or the query.

    A step's query is the output of the step before. Two tables and two sets of keys and values take turns, so that what
    a call peeks at too early is another step's.
    """

    def __init__(self, overlap, count=10):
        import cupy

        self.cases = [decode_case(LONG, "cuda", seed) for seed in (1, 2, 3)]
        first = self.cases[0]
        self.count, self.cache = count, first.cache
        self.tables, self.lens = first.block_tables.copy(), first.seq_lens.copy()
        self.plan = pg.plan_decode(self.cache, self.lens, 8, overlap=overlap)
        self.outs = cupy.zeros((count, *first.query.shape), dtype=first.query.dtype)
        self.copy = cupy.ElementwiseKernel("T source", "T to", "to = source", "copied_by_a_kernel")
        self.shorten = cupy.ElementwiseKernel("int32 full, int32 by", "int32 to", "to = max(full - by, 0)", "shortened")

    def run(self, after_each=lambda: None):
        """Make the steps, and call `after_each` after everything that is launched."""
        for step in range(self.count):
            case = self.cases[1 + step % 2]
            query = self.outs[step - 1] if step else case.query
            tables = [partial(self.copy, case.block_tables, self.tables)]
            cache = [
                partial(self.copy, getattr(case.cache, name).view(np.int16), getattr(self.cache, name).view(np.int16))
                for name in ("key", "value")
            ]
            plan = [partial(self.shorten, case.seq_lens, 100 * step, self.lens), partial(self.plan.update, self.lens)]
            orders = plan + cache + tables, plan + tables + cache, cache + tables + plan, []
            for write in orders[step % 4]:
                write()
                after_each()
            pg.paged_attention(query, self.cache, self.tables, self.lens, plan=self.plan, out=self.outs[step])
            after_each()


@pytest.mark.gpu
def test_a_call_sees_what_the_kernels_before_it_write(monkeypatch):
    import cupy

    monkeypatch.delenv("CUPAGED_VALIDATE", raising=False)
    in_turns, overlapping = Steps(overlap=False), Steps(overlap=True)
    assert overlapping.plan.overlap == can_overlap_launches("cuda", 0) and not in_turns.plan.overlap
    in_turns.run(after_each=cupy.cuda.Device().synchronize)
    expected = in_turns.outs.view(np.int16).get()
    assert len({out.tobytes() for out in expected}) == len(expected)
    assert np.isfinite(in_turns.outs.get().astype(np.float32)).all()
    stream = cupy.cuda.Stream(non_blocking=True)
    overlapping.run()
    cupy.cuda.Device().synchronize()
    np.testing.assert_array_equal(overlapping.outs.view(np.int16).get(), expected)
    with stream:
        stream.begin_capture()
        overlapping.run()
        graph = stream.end_capture()
        for _ in range(20):
            overlapping.outs.fill(0)
            graph.launch(stream)
            stream.synchronize()
            np.testing.assert_array_equal(overlapping.outs.view(np.int16).get(), expected)


@pytest.mark.gpu
def test_a_call_waits_for_other_streams_that_it_is_told_to(monkeypatch):
    """In a graph too, where what a call depends on is on two branches."""
    import cupy

    monkeypatch.delenv("CUPAGED_VALIDATE", raising=False)
    case = decode_case(LONG, "cuda")
    plan, out = pg.plan_decode(case.cache, case.seq_lens, 8), cupy.empty_like(case.query)
    wanted, tables = case.query.copy(), case.block_tables.copy()
    stream, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    busy = cupy.ones((2048, 2048), dtype=cupy.float32)
    copy = cupy.ElementwiseKernel("T source", "T to", "to = source", "copied_by_a_kernel")

    def forked():
        other.wait_event(stream.record())
        with other:
            for _ in range(3):
                copy(busy, busy)
            copy(wanted, case.query)
        copy(tables, case.block_tables)
        stream.wait_event(other.record())
        pg.paged_attention(*case.arguments, plan=plan, out=out)

    cupy.cuda.Device().synchronize()
    with stream:
        forked()
        stream.synchronize()
        assert_decode_matches_reference(case, out)
        stream.begin_capture()
        forked()
        graph = stream.end_capture()
        for _ in range(5):
            case.query.fill(0)
            case.block_tables.fill(-1)
            graph.launch(stream)
            stream.synchronize()
            assert_decode_matches_reference(case, out)


@pytest.mark.gpu
def test_threads_share_a_plan_and_each_keeps_its_stream(monkeypatch):
    """A thread that has not used the GPU launches too; calls of one plan are ordered by who asks for them."""
    import cupy

    monkeypatch.delenv("CUPAGED_VALIDATE", raising=False)
    case = decode_case(LONG, "cuda")
    plan, out = pg.plan_decode(case.cache, case.seq_lens, 8), cupy.empty_like(case.query)
    call = plan.prepare(*case.arguments, out=out)
    failed = []

    def work():
        try:
            for _ in range(20):
                call()
                pg.paged_attention(*case.arguments, plan=plan, out=out)
        except Exception as error:
            failed.append(error)

    cupy.cuda.Device().synchronize()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cupy.cuda.Device().synchronize()
    assert not failed
    assert_decode_matches_reference(case, out)


@pytest.mark.gpu
@pytest.mark.parametrize("num_seqs", [1, 200], ids=["one sequence", "many"])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_blocks_of_the_next_call_find_no_room_before_one_of_this_leaves(head_dim, num_seqs):
    """They would fetch what they read first too early: it took D = 80 a third longer."""
    case = decode_case(DecodeShape((5,) * num_seqs, head_dim=head_dim, dtype="bfloat16"), "cuda")
    plan = pg.plan_decode(case.cache, case.seq_lens, 4)
    assert plan.overlap == can_overlap_launches("cuda", 0)
    if plan.overlap:
        from cupy.cuda import driver

        kernel, fits = plan.kernel.raw_kernel(), driver.occupancyMaxActiveBlocksPerMultiprocessor
        kernel.max_dynamic_shared_size_bytes = plan.block_shared_bytes  # as a call does
        at_once = fits(kernel.kernel.ptr, 32 * plan.shape.warps, plan.block_shared_bytes)
        assert at_once * plan.num_sms == plan.num_blocks


@pytest.mark.parametrize("overlap", [False, True])
def test_overlap_changes_no_bit(overlap, backend):
    case = decode_case(LONG, backend)
    plan = pg.plan_decode(case.cache, case.seq_lens, 8, overlap=overlap)
    out, lse = pg.paged_attention(*case.arguments, plan=plan, return_lse=True)
    assert_decode_matches_reference(case, out, lse)
    other = pg.paged_attention(*case.arguments, plan=pg.plan_decode(case.cache, case.seq_lens, 8, overlap=not overlap))
    assert (other.view(np.int16) == out.view(np.int16)).all()


@pytest.mark.parametrize("head_dim", [32, 80, 160, 256])
def test_what_is_fetched_ahead_lies_in_the_cache(head_dim, backend):
    """Rows of other lengths than lines, a table with entries that must not be followed, and contexts long enough."""
    shape = DecodeShape((9000, 5000), head_dim=head_dim, block_size=24, unmapped=0.2)
    case = decode_case(shape, backend)
    assert_decode_matches_reference(case, pg.paged_attention(*case.arguments))


@pytest.mark.parametrize("query_tokens", [None, 3])
def test_what_is_fetched_ahead_of_a_shared_prefix_lies_in_the_query(query_tokens, backend):
    shape = DecodeShape((200, 300, 120, 90), num_heads=8, block_size=16, query_tokens=query_tokens, shared_prefix=64)
    case = decode_case(shape, backend)
    assert_decode_matches_reference(case, pg.paged_attention(*case.arguments, shared_prefix=64))
