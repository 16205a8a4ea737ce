"""Calls of the cuda backend up to the launch, without a GPU: a known call launches what a checked one would."""

import time

import numpy as np
import pytest

import cupaged as pg
from cupaged.runtime import launch
from tests.kit import cuda_stub
from tests.kit.cuda_stub import CudaStub

cupy = pytest.importorskip("cupy", reason="the cuda backend's checks need CuPy, though no GPU")


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.delenv("CUPAGED_VALIDATE", raising=False)
    return CudaStub(monkeypatch)


class Step:
    """Arrays of a decode step, and its plan."""

    def __init__(self, stub):
        self.stub = stub
        self.config = pg.CacheConfig(64, 16, 8, 128)
        self.cache = pg.KVCache(self.config, "cuda")
        self.query = stub.array((4, 32, 128), np.float16)
        self.tables, self.lens = stub.array((4, 16), np.int32), stub.array((4,), np.int32)
        self.out = stub.array(self.query.shape, np.float16)
        self.plan = pg.plan_decode(self.cache, self.lens, 32)

    def __call__(self, **changes):
        """Call, and return the one launch."""
        given = {"query": self.query, "cache": self.cache, "block_tables": self.tables, "seq_lens": self.lens}
        self.stub.launches.clear()
        pg.paged_attention(**{**given, "plan": self.plan, "out": self.out, **changes})
        (made,) = self.stub.launches
        return made


def test_a_known_call_launches_what_a_checked_one_does(stub, monkeypatch):
    step = Step(stub)
    alike = {
        "query": stub.array(step.query.shape, np.float16),
        "cache": pg.KVCache(step.config, "cuda"),
        "block_tables": stub.array(step.tables.shape, np.int32),
        "seq_lens": stub.array(step.lens.shape, np.int32),
        "out": stub.array(step.out.shape, np.float16),
    }
    first, expected = step(), step(**alike, validate=None, scale=np.float64(128**-0.5))
    monkeypatch.setattr("cupaged.attention.api.checked_call", None)
    assert step() == first
    made = step(**alike)
    assert made == expected and made != first
    for array in (alike["query"], alike["cache"].value, alike["out"]):
        assert array.data.ptr in made.words and array.data.ptr not in first.words


def test_another_device_is_checked_and_named(stub):
    step = Step(stub)
    step()
    call = step.plan.prepare(step.query, step.cache, step.tables, step.lens, out=step.out)
    stub.device = 1
    query, cache = stub.array(step.query.shape, np.float16), pg.KVCache(step.config, "cuda")
    stub.device = 0
    with pytest.raises(ValueError, match="argument query lies on device 1; the current device is 0"):
        step(query=query)
    with pytest.raises(ValueError, match="plan must be made for the same device: it is for 0, the call has 1"):
        step(cache=cache)
    stub.device = 1
    with pytest.raises(ValueError, match="lies on device 0; the current device is 1"):
        step()
    with pytest.raises(ValueError, match="was prepared for device 0; the current device is 1"):
        call()


def test_mistakes_after_a_good_call_are_named(stub):
    step = Step(stub)
    step()
    address = step.query.data.ptr
    for change, error, message in (
        ({"query": stub.array(step.query.shape, np.float16, address=(1 << 45) + 2)}, ValueError, "query must start on"),
        ({"query": stub.array((4, 32, 128), np.float32)}, TypeError, "query must have dtype float16"),
        ({"query": np.zeros((4, 32, 128), np.float16)}, TypeError, "query must be a CuPy array"),
        ({"seq_lens": stub.array((8,), np.int32)[::2]}, ValueError, "seq_lens must be C-contiguous"),
        ({"out": stub.array(step.out.shape, np.float16, address=address + 64)}, ValueError, "memory with query"),
        ({"out": stub.array(step.out.shape, np.float16, address=step.cache.value.data.ptr)}, ValueError, "with cache"),
    ):
        with pytest.raises(error, match=message):
            step(**change)


def test_the_environment_asks_for_validation(stub, monkeypatch):
    step = Step(stub)
    step()
    now = time.monotonic()
    monkeypatch.setenv("CUPAGED_VALIDATE", "1")
    monkeypatch.setattr(time, "monotonic", lambda: now + 2 * launch.LOOK_SECONDS)  # it is noticed as late as a file
    monkeypatch.setattr("cupaged.attention.call.check_block_tables", lambda *_: (_ for _ in ()).throw(KeyError("read")))
    with pytest.raises(KeyError, match="read"):
        step()


def test_files_are_looked_at_now_and_then_only(stub, monkeypatch):
    step, looks = Step(stub), []
    step()
    now = [time.monotonic()]
    monkeypatch.setattr("cupaged.runtime.source.KernelSource.is_unchanged", lambda source: looks.append(source) or True)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for expected in (1, 2):
        now[0] += 2 * launch.LOOK_SECONDS
        for _ in range(5):
            step()
        assert len(looks) == expected


def test_shared_memory_beyond_48_kib_is_opted_into_once(stub):
    step = Step(stub)
    made = step()
    assert stub.kernel.max_dynamic_shared_size_bytes == made.shared_bytes > 48 * 1024


def test_numbers_reach_the_driver_as_their_own_bytes(stub):
    step = Step(stub)
    words = step(scale=0.3).words
    assert int(np.float32(0.3).view(np.uint32)) in words and step.config.num_blocks in words
    assert step(softcap=2.0, scale=0.3).words != words


def test_calls_start_early_where_the_plan_has_them(stub):
    step = Step(stub)
    assert step().overlaps
    assert not step(plan=pg.plan_decode(step.cache, step.lens, 32, overlap=False)).overlaps
    stub.launches.clear()
    step.plan.update(step.lens)  # the planner waits for nothing by itself
    assert [made.overlaps for made in stub.launches] == [False]


@pytest.mark.parametrize(("limit", "warps"), [(232448, 8), (166912, 8), (101376, 4)], ids=["H100", "A100", "L4"])
def test_a_plan_fits_the_shared_memory_of_the_gpu(stub, monkeypatch, limit, warps):
    monkeypatch.setitem(cuda_stub.H100, "MaxSharedMemoryPerBlockOptin", limit)
    monkeypatch.setitem(cuda_stub.H100, "MaxSharedMemoryPerMultiprocessor", limit + 1024)
    plan = Step(stub).plan
    assert plan.shape.warps == warps
    assert plan.shape.shared_bytes(plan.config) <= plan.block_shared_bytes <= limit


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("num_seqs", [1, 40], ids=["few tiles", "many"])
def test_blocks_of_the_next_call_find_no_room_before_one_of_this_leaves(stub, num_seqs, head_dim):
    per_sm, system = cuda_stub.H100["MaxSharedMemoryPerMultiprocessor"], 1024
    cache = pg.KVCache(pg.CacheConfig(64, 16, 8, head_dim), "cuda")
    lens = stub.array((num_seqs,), np.int32)
    plan = pg.plan_decode(cache, lens, 32)
    at_once, taken = plan.num_blocks // plan.num_sms, plan.block_shared_bytes + system
    assert at_once * taken <= per_sm < (at_once + 1) * taken
    if head_dim in (32, 80):  # whose chunks alone leave room
        assert plan.block_shared_bytes > plan.shape.shared_bytes(plan.config)
    shared = pg.plan_decode(cache, lens, 32, shared_prefix=64)
    if shared.prefix is not None:
        before, at_once = shared.prefix.block_shared_bytes + system, shared.prefix.num_blocks // shared.prefix.num_sms
        assert at_once * before <= per_sm < at_once * before + shared.block_shared_bytes + system
    free = pg.plan_decode(cache, lens, 32, overlap=False)
    assert free.block_shared_bytes == free.shape.shared_bytes(free.config)
