"""Arrays of other libraries are read and written where these expect it: on their own current streams."""

from types import SimpleNamespace

import numpy as np
import pytest

import cupaged as pg
from cupaged.ops import streams as call_streams
from tests.kit.cases import DecodeShape, decode_case
from tests.kit.fake_torch import FakeTorch
from tests.kit.simulated_streams import Stream, Streams

cupy = pytest.importorskip("cupy", reason="streams need CuPy, though the simulated ones no GPU")

CONFIG = pg.CacheConfig(4, 4, 1, 32, "float16", "BSHD")
TOKENS = 5


@pytest.fixture(autouse=True)
def not_validated(monkeypatch):
    """Validation reads arrays back, which waits for the GPU and hides what is missing."""
    monkeypatch.delenv("CUPAGED_VALIDATE", raising=False)


# --- simulated streams, which do their work in any order that events permit ---------------------------------------


class Step:
    """New tokens that torch computes on its stream, appended to a cache that CuPy's stream uses before and after."""

    def __init__(self, monkeypatch, seed):
        self.streams = Streams(monkeypatch, seed)
        self.torch = FakeTorch(monkeypatch, self.streams)
        self.cache = pg.KVCache(CONFIG, "cuda")
        nothing = np.zeros((TOKENS, 1, 32), np.float16)
        self.key, self.value = self.torch.tensor(nothing), self.torch.tensor(nothing)
        self.slots = self.torch.tensor(np.full(TOKENS, -1, np.int64))
        self.found = {}

    @property
    def stored(self):
        return self.streams.seen(self.cache.key).reshape(-1, 32)

    def compute(self):
        self.torch.seen(self.key)[...] = 3
        self.torch.seen(self.value)[...] = 4
        self.torch.seen(self.slots)[...] = np.arange(TOKENS)

    def spoil(self):
        for tensor in (self.key, self.value):
            self.torch.seen(tensor)[...] = np.nan

    def run(self):
        """Return whether every piece of work saw what came before it on its own stream, and in the call."""
        current, torch = self.streams.current[-1], self.torch.stream
        current.add(lambda: self.stored.fill(1))  # what CuPy's stream wrote before is written over
        torch.add(self.compute)
        pg.append_kv(self.cache, self.key, self.value, self.slots)
        torch.add(lambda: self.found.update(torch=self.stored[:TOKENS].copy()))
        torch.add(self.spoil)
        current.add(lambda: self.found.update(cupy=self.stored.copy()))
        self.streams.run()
        return bool((self.found["torch"] == 3).all() and (self.found["cupy"][:TOKENS] == 3).all()
                    and (self.found["cupy"][TOKENS:] == 1).all())  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_a_call_with_tensors_is_in_order_with_torchs_work_and_with_cupys(seed, monkeypatch):
    assert Step(monkeypatch, seed).run()


def test_without_its_events_some_order_goes_wrong(monkeypatch):
    monkeypatch.setattr(call_streams, "_let_wait", lambda *_: None)
    assert not all(Step(monkeypatch, seed).run() for seed in range(30))


def test_on_cupys_stream_alone_some_order_goes_wrong(monkeypatch):
    monkeypatch.setattr(call_streams, "foreign_arrays", lambda values: [])
    assert not all(Step(monkeypatch, seed).run() for seed in range(30))


def test_launches_are_on_torchs_stream_and_nothing_is_left_current(monkeypatch):
    step = Step(monkeypatch, 0)
    before = len(step.streams.current)
    pg.append_kv(step.cache, step.key, step.value, step.slots)
    assert step.streams.launches == 1 and len(step.streams.current) == before
    with pytest.raises(TypeError, match="key must have dtype float16; got int64"):
        pg.append_kv(step.cache, step.slots, step.value, step.slots)
    assert len(step.streams.current) == before


def test_on_one_stream_there_is_nothing_to_wait_for(monkeypatch):
    step = Step(monkeypatch, 0)
    step.torch.stream = step.streams.current[-1]
    pg.append_kv(step.cache, step.key, step.value, step.slots)
    assert len(step.streams.current[-1].queue) == 1  # the launch


def test_arrays_of_cupy_cost_no_event(monkeypatch):
    step = Step(monkeypatch, 0)
    pg.append_kv(step.cache, step.key.array, step.value.array, step.slots.array)
    assert [len(stream.queue) for stream in step.streams.all] == [1, 0]


def test_a_prepared_call_goes_to_the_stream_that_is_torchs_by_then(monkeypatch):
    step = Step(monkeypatch, 0)
    query, tables = step.torch.tensor(np.ones((2, 1, 32), np.float16)), step.torch.tensor(np.zeros((2, 1), np.int32))
    lens = step.torch.tensor(np.array([4, 2], np.int32))
    plan = pg.plan_decode(step.cache, lens, 1)
    call = plan.prepare(query, step.cache, tables, lens)
    step.streams.run()
    earlier, step.torch.stream = step.torch.stream, Stream(step.streams)
    out = call()
    assert type(out) is type(query) and out.shape == query.shape
    behind_cupys, the_launch, before_cupys = step.torch.stream.queue
    assert behind_cupys[1] is not None and the_launch[1] is None and before_cupys[1] is None
    assert not earlier.queue and len(step.streams.current[-1].queue) == 2  # a mark, and the wait for the call
    step.streams.run()
    assert (step.torch.seen(out) == 0).all()  # as the cache's values are


def test_a_capture_on_another_stream_than_torchs_is_refused(monkeypatch):
    step = Step(monkeypatch, 0)
    stream = Stream(step.streams)
    stream.is_capturing = lambda: True
    with stream, pytest.raises(ValueError, match=r"capture with torch.cuda.graph, or make the captured stream torch's"):
        pg.append_kv(step.cache, step.key, step.value, step.slots)
    assert step.streams.launches == 0 and not stream.queue


class Interface:
    """An array with ``__cuda_array_interface__`` alone, on a stream."""

    def __init__(self, array, stream):
        self.array = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "stream": stream, "version": 3}


@pytest.mark.parametrize(("given", "address"), [(None, 0), (1, 0), (2, 2), (77, 77)])
def test_the_stream_that_an_interface_names_is_known(given, address, monkeypatch):
    monkeypatch.setattr(call_streams, "_stream_at", lambda number: number)

    named = SimpleNamespace(__cuda_array_interface__={"version": 3, "stream": given})
    assert call_streams.stream_of(named) == address


# --- a GPU and torch ----------------------------------------------------------------------------------------------

TRIALS = 50
SLOW = 20_000_000  # cycles: some 10 ms
CASE = DecodeShape((100, 33, 250))


def alike(out, expected):
    """Whether two results are equal up to rounding; without their late inputs they differ by far more."""
    return bool(((out.float() - expected.float()).abs() <= 4e-3).all())


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason="torch is not a dependency; it is tested where it is installed")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return torch


class OnGpu:
    """A decode case as tensors, and what its parts must give."""

    def __init__(self, torch, shape=CASE):
        self.torch, self.case = torch, decode_case(shape, "cuda")
        self.cache = self.case.cache
        self.query, self.tables, self.lens = (
            torch.from_dlpack(a).clone() for a in (self.case.query, self.case.block_tables, self.case.seq_lens)
        )
        out, lse = pg.paged_attention(*self.case.arguments, return_lse=True)
        self.expected = torch.from_dlpack(out).clone()
        self.lse = torch.from_dlpack(lse).clone()
        torch.cuda.synchronize()

    def on_fresh_stream(self, call, *, tensors=("query",)):
        """Call on a stream of torch's whose inputs come late, spoil these at once after, and return results in time."""
        torch = self.torch
        stream = torch.cuda.Stream()
        late = {name: torch.zeros_like(getattr(self, name)) for name in tensors}
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLOW)
            for name, tensor in late.items():
                tensor.copy_(getattr(self, name))
            results = call(**late)
            results = results if isinstance(results, tuple) else (results,)
            copies = [result.clone() for result in results]
            for tensor in late.values():
                tensor.zero_()
        stream.synchronize()
        return copies


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["auto", "paged_attention_v1", "paged_attention_v2"])
def test_decode_follows_and_precedes_torchs_work(kernel, torch):
    gpu = OnGpu(torch)
    expected = gpu.expected if kernel == "auto" else torch.from_dlpack(
        pg.paged_attention(*gpu.case.arguments, kernel=kernel)
    )  # fmt: skip
    torch.cuda.synchronize()
    for _ in range(TRIALS if kernel == "auto" else 5):
        (out,) = gpu.on_fresh_stream(
            lambda query: pg.paged_attention(query, gpu.cache, gpu.tables, gpu.lens, kernel=kernel)
        )
        assert alike(out, expected)


@pytest.mark.gpu
def test_every_door_with_tensors_follows_and_precedes_torchs_work(torch):
    gpu = OnGpu(torch)
    plan = pg.plan_decode(gpu.cache, gpu.lens, CASE.num_heads)
    starts = torch.arange(4, dtype=torch.int32, device="cuda")
    prefill = pg.plan_prefill(gpu.cache, gpu.lens, starts, 3, CASE.num_heads)
    prefilled = pg.paged_prefill(gpu.query, gpu.cache, gpu.tables, gpu.lens, starts, plan=prefill).clone()

    def into(query):
        out = torch.full_like(query, float("nan"))
        assert pg.paged_attention(query, gpu.cache, gpu.tables, gpu.lens, out=out, plan=plan) is out
        return out

    def updated(query, lens):
        plan.update(lens)
        return pg.paged_attention(query, gpu.cache, gpu.tables, lens, plan=plan, return_lse=True)

    def merged(query, lse):
        return pg.merge_states(query[None].contiguous(), lse[None].contiguous())

    def prefilling(query, tables):
        return pg.paged_prefill(query, gpu.cache, tables, gpu.lens, starts, plan=prefill)

    for _ in range(10):
        (out,) = gpu.on_fresh_stream(into)
        assert alike(out, gpu.expected)
        out, lse = gpu.on_fresh_stream(updated, tensors=("query", "lens"))
        assert alike(out, gpu.expected) and alike(lse, gpu.lse)
        out, lse = gpu.on_fresh_stream(merged, tensors=("query", "lse"))
        assert alike(out, gpu.query) and alike(lse, gpu.lse)
        (out,) = gpu.on_fresh_stream(prefilling, tensors=("query", "tables"))
        assert alike(out, prefilled)


@pytest.mark.gpu
def test_the_other_doors_with_tensors_follow_and_precede_torchs_work(torch):
    gpu = OnGpu(torch)
    generator = torch.Generator("cuda").manual_seed(0)
    gpu.logits = torch.randn(64, 1000, device="cuda", generator=generator)
    gpu.ids = torch.arange(4, dtype=torch.int32, device="cuda").flip(0).contiguous()
    rows = (5, CASE.num_kv_heads, CASE.head_dim)
    gpu.key, gpu.value = (torch.randn(rows, device="cuda", generator=generator).half() for _ in "kv")
    gpu.slots = torch.arange(5, device="cuda")
    positions = torch.arange(5, dtype=torch.int32, device="cuda")
    config = gpu.cache.config

    def rotated(key, value, slots):
        cache = pg.KVCache(config, "cuda")
        pg.rope_append_kv(cache, key, value, slots, positions, query=key)
        return pg.gather_blocks(cache, gpu.ids, out=torch.zeros(4, gathered, dtype=torch.float16, device="cuda"))

    def copied(ids):
        return pg.gather_blocks(gpu.cache, ids, out=torch.zeros(4, gathered, dtype=torch.float16, device="cuda"))

    def layered(query, key, value):
        layer = pg.PagedAttention(config, backend="cuda")
        return layer(query[:1].expand(5, -1, -1).contiguous(), key, value, [0], True)

    gathered = 2 * config.block_size * config.num_kv_heads * config.head_dim
    doors = (
        (lambda logits: pg.sample(logits, temperature=0.0), ("logits",)),
        (lambda logits: pg.sample(logits, 0.9, 50, 0.95, 7), ("logits",)),
        (rotated, ("key", "value", "slots")),
        (copied, ("ids",)),
        (layered, ("query", "key", "value")),
    )
    for door, names in doors:
        expected = door(**{name: getattr(gpu, name) for name in names}).clone()
        assert isinstance(expected, torch.Tensor)
        for _ in range(5):
            (out,) = gpu.on_fresh_stream(door, tensors=names)
            assert torch.equal(out.view(torch.int16), expected.view(torch.int16)), door  # NaN is NaN


@pytest.mark.gpu
def test_a_prepared_call_is_launched_on_the_stream_that_is_torchs_by_then(torch):
    gpu = OnGpu(torch)
    query, out = gpu.query.clone(), torch.empty_like(gpu.query)
    plan = pg.plan_decode(gpu.cache, gpu.lens, CASE.num_heads)
    call = plan.prepare(query, gpu.cache, gpu.tables, gpu.lens, out=out)
    torch.cuda.synchronize()
    for _ in range(TRIALS):
        stream = torch.cuda.Stream()
        query.zero_()
        out.fill_(float("nan"))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLOW)
            query.copy_(gpu.query)
            found = call().clone()
            query.zero_()
        stream.synchronize()
        assert alike(found, gpu.expected)


@pytest.mark.gpu
def test_what_torch_appends_is_what_cupy_and_swaps_find(torch):
    config = pg.CacheConfig(64, 16, 2, 64, "float16", "BSHD")
    cache = pg.KVCache(config, "cuda")
    engine = pg.SwapEngine([cache], 64)
    pairs = np.stack([np.arange(64), np.arange(64)], axis=1)
    slots = torch.arange(config.num_slots, device="cuda")
    for trial in range(1, 11):
        stream = torch.cuda.Stream()
        rows = torch.zeros(config.num_slots, 2, 64, dtype=torch.float16, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLOW)
            rows.fill_(trial)
            pg.append_kv(cache, rows, rows, slots)
            rows.fill_(float("nan"))
        seen = cache.key.copy()  # on CuPy's stream
        engine.swap_out(pairs)
        engine.synchronise()
        assert (seen == trial).all() and (engine.host[0].blocks == trial).all()
        key, value = cache.blocks(np.arange(64))
        assert (key == trial).all() and (value == trial).all()


@pytest.mark.gpu
def test_what_cupy_wrote_late_is_there_for_a_call_with_tensors(torch):
    gpu = OnGpu(torch)
    held = [array.copy() for array in gpu.cache.storage]
    for _ in range(10):
        stream, cupys = torch.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)
        for array in gpu.cache.storage:
            array.fill(0)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.ExternalStream(cupys.ptr)):
            torch.cuda._sleep(SLOW)
        with cupys:
            for array, content in zip(gpu.cache.storage, held, strict=True):
                array[...] = content
            with torch.cuda.stream(stream):
                out = pg.paged_attention(gpu.query, gpu.cache, gpu.tables, gpu.lens).clone()
            for array in gpu.cache.storage:
                array.fill(0)  # only once the call has read it
        torch.cuda.synchronize()
        assert alike(out, gpu.expected)
        for array, content in zip(gpu.cache.storage, held, strict=True):
            array[...] = content


@pytest.mark.gpu
def test_results_are_torchs_own_memory(torch):
    """Torch gives it to others only when the stream that it was made on, and those it was recorded on, are done."""
    gpu = OnGpu(torch)
    before = torch.cuda.memory_allocated()
    out, lse = pg.paged_attention(gpu.query, gpu.cache, gpu.tables, gpu.lens, return_lse=True)
    assert torch.cuda.memory_allocated() >= before + out.nbytes + lse.nbytes
    assert out.untyped_storage().nbytes() == out.nbytes
    del out, lse
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("kernel", ["auto", "paged_attention_v2"])
def test_calls_are_captured_by_torch_and_replayed_after_other_work(planned, kernel, torch):
    if planned and kernel != "auto":
        pytest.skip("only the kernel of auto takes a plan")
    gpu = OnGpu(torch)
    plan = pg.plan_decode(gpu.cache, gpu.lens, CASE.num_heads) if planned else None
    query, out = gpu.query.clone(), torch.empty_like(gpu.query)

    def call():
        return pg.paged_attention(query, gpu.cache, gpu.tables, gpu.lens, kernel=kernel, plan=plan, return_lse=True)

    expected, _ = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if plan is not None:
            plan.update(gpu.lens)
        made, lse = call()
        out.copy_(made)
    for _ in range(10):
        held = [torch.full((n,), 7.0, device="cuda") for n in (64, 1000, 100_000, 1_000_000)]
        others = [cupy.full(n, 7.0, np.float32) for n in (64, 1000, 100_000, 1_000_000)]
        query.zero_()
        query.copy_(gpu.query)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert alike(out, expected) and alike(lse, gpu.lse)
        assert all(bool((a == 7).all()) for a in (*held, *others))


@pytest.mark.gpu
def test_a_class_derived_from_a_tensor_is_one(torch):
    class Mine(torch.Tensor):
        pass

    gpu = OnGpu(torch)
    (out,) = gpu.on_fresh_stream(
        lambda query: pg.paged_attention(query.as_subclass(Mine), gpu.cache, gpu.tables, gpu.lens)
    )
    assert isinstance(out, torch.Tensor) and alike(out, gpu.expected)


@pytest.mark.gpu
def test_the_stream_that_an_interface_names_is_followed_and_waits(torch):
    gpu = OnGpu(torch)
    for _ in range(10):
        stream = cupy.cuda.Stream(non_blocking=True)
        query = cupy.zeros_like(gpu.case.query)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            torch.cuda._sleep(SLOW)
        with stream:
            query[...] = gpu.case.query
        given = Interface(query, stream.ptr)
        with cupy.cuda.Stream(non_blocking=True) as current:
            out = pg.paged_attention(given, gpu.cache, gpu.case.block_tables, gpu.case.seq_lens)
        with stream:
            query.fill(0)
        current.synchronize()
        stream.synchronize()
        assert alike(torch.from_dlpack(out), gpu.expected)


@pytest.mark.gpu
def test_tensors_on_the_second_gpu_use_its_stream(torch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with cupy.cuda.Device(1):
        case = decode_case(CASE, "cuda")
        expected = torch.from_dlpack(pg.paged_attention(*case.arguments)).clone()
    tensors = [torch.from_dlpack(a) for a in (case.query, case.block_tables, case.seq_lens)]
    torch.cuda.synchronize(1)
    with torch.cuda.device(0):
        out = pg.paged_attention(tensors[0], case.cache, *tensors[1:])
    torch.cuda.synchronize(1)
    assert out.device.index == 1 and alike(out, expected)
