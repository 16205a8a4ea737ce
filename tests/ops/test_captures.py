"""What a call allocates for itself while a graph is captured lives as long as the graph; what cannot be replayed is
refused."""

import ctypes
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

import cupaged as pg
from cupaged.engine.products import product
from cupaged.ops.streams import on_callers_streams
from cupaged.runtime import captures
from tests.kit.cases import DecodeShape, decode_case
from tests.kit.compare import assert_decode_matches_reference
from tests.kit.cuda_stub import CudaStub

cupy = pytest.importorskip("cupy", reason="captures need CuPy, though the stand-ins no GPU")

RELEASE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@pytest.fixture(autouse=True)
def not_validated(monkeypatch):
    """Validation reads arrays back, which no capture can."""
    monkeypatch.delenv("CUPAGED_VALIDATE", raising=False)


# --- a driver that keeps user objects as CUDA's documentation has it ----------------------------------------------


class Driver:
    """Graphs are numbers; a user object is released when its graph is dropped."""

    def __init__(self):
        self.capture, self.status, self.modes, self.of_graph = 1, 1, [], {}
        self.refuse = 0

    def cuStreamGetCaptureInfo_v3(self, stream, status, capture, graph, nodes, edges, count):
        status._obj.value, capture._obj.value, graph._obj.value = self.status, self.capture, 100 + self.capture
        return 0

    def cuUserObjectCreate(self, made, pointer, destroy, references, flags):
        assert (references.value, flags.value) == (1, 1)
        made._obj.value = len(self.of_graph) + 1
        self._made = pointer.value, RELEASE(destroy.value)
        return 0

    def cuGraphRetainUserObject(self, graph, made, references, flags):
        assert (references.value, flags.value) == (1, 1)
        if not self.refuse:
            self.of_graph.setdefault(graph.value, []).append(self._made)
        return self.refuse

    def cuUserObjectRelease(self, made, references):
        pointer, destroy = self._made
        destroy(pointer)

    def cuThreadExchangeStreamCaptureMode(self, mode):
        before = self.modes[-1] if self.modes else 0
        self.modes.append(mode._obj.value)
        mode._obj.value = before
        return 0

    def drop(self, capture):
        """Drop a graph."""
        for pointer, destroy in self.of_graph.pop(100 + capture):
            destroy(pointer)


@pytest.fixture
def driver(monkeypatch):
    stand_in = Driver()
    monkeypatch.setattr(captures, "_driver", lambda: stand_in)
    monkeypatch.setattr(captures, "_kept", {})
    return stand_in


class Kept:
    """Something that can be seen to go."""


STREAM = SimpleNamespace(ptr=77, is_capturing=lambda: True)


def test_what_is_kept_goes_with_its_graph(driver):
    first, second, third = Kept(), Kept(), Kept()
    seen = [weakref.ref(thing) for thing in (first, second, third)]
    captures.keep_for_graph(STREAM, first)
    captures.keep_for_graph(STREAM, second)
    driver.capture = 2
    captures.keep_for_graph(STREAM, third)
    assert [len(objects) for objects in driver.of_graph.values()] == [1, 1]  # one for a graph
    del first, second, third
    gc.collect()
    assert captures.kept_for_graphs() == 2 and None not in [ref() for ref in seen]
    driver.drop(1)
    assert captures.kept_for_graphs() == 1 and [ref() is None for ref in seen] == [True, True, False]
    driver.drop(2)
    assert captures.kept_for_graphs() == 0 and seen[2]() is None


def test_a_graph_that_takes_no_object_is_an_error_and_keeps_nothing(driver, monkeypatch):
    driver.refuse = 1
    monkeypatch.setattr("cupy_backends.cuda.api.driver.check_status", lambda status: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        captures.keep_for_graph(STREAM, Kept())
    assert captures.kept_for_graphs() == 0


def test_a_capture_that_failed_is_named(driver):
    driver.status = 2
    with pytest.raises(RuntimeError, match="the capture of the current stream has failed"):
        captures.keep_for_graph(STREAM, Kept())


@pytest.fixture
def capturing(driver, monkeypatch):
    """A capture on a device without work: allocations are noted, and come from a pool of their own."""
    stub = CudaStub(monkeypatch)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda *_: STREAM)

    def allocate(size):
        memory = cupy.cuda.UnownedMemory(1 << 40, size, None, 0)
        return cupy.cuda.MemoryPointer(memory, 0)

    class Using:
        def __init__(self, allocator):
            self.allocator = allocator

        def __enter__(self):
            self.before, current[0] = current[0], self.allocator

        def __exit__(self, *_):
            current[0] = self.before

    current = [allocate]
    monkeypatch.setattr(cupy.cuda, "get_allocator", lambda: current[0])
    monkeypatch.setattr(cupy.cuda, "using_allocator", Using)
    return SimpleNamespace(stub=stub, allocate=lambda size: current[0](size), driver=driver)


def test_a_call_keeps_what_it_allocates_and_does_not_return(capturing):
    array = capturing.stub.array((4,))

    @on_callers_streams
    def call(given):
        capturing.allocate(16)
        result = cupy.ndarray((64,), np.uint8, capturing.allocate(64))
        capturing.allocate(32)
        return result, 5

    assert call(array)[1] == 5
    (kept,) = captures._kept[1][1]
    assert [memory.mem.size for memory in kept] == [16, 32]
    assert capturing.driver.modes == [captures.RELAXED, 0]


def test_a_call_that_allocates_nothing_keeps_nothing(capturing):
    assert on_callers_streams(lambda given: given)(capturing.stub.array((4,))) is not None
    assert captures.kept_for_graphs() == 0


def test_after_an_error_the_mode_is_as_before_and_what_may_be_captured_is_kept(capturing):
    with pytest.raises(ZeroDivisionError):
        on_callers_streams(lambda given: capturing.allocate(16) and 1 / 0)(capturing.stub.array((4,)))
    assert capturing.driver.modes == [captures.RELAXED, 0]
    assert captures.kept_for_graphs() == 1


def test_what_a_replay_would_read_from_the_host_is_refused(capturing):
    cache = pg.KVCache(pg.CacheConfig(8, 16, 2, 64), "cuda")
    blocks = capturing.stub.array((1, 2 * 16 * 2 * 64), np.float16)
    for call, name in (
        (lambda: pg.copy_blocks(cache, [[0, 1]]), "pairs"),
        (lambda: pg.gather_blocks(cache, [0], out=blocks), "block_ids"),
        (lambda: pg.scatter_blocks(cache, np.array([0]), blocks), "block_ids"),
    ):
        with pytest.raises(pg.UnsupportedError, match=f"{name} must lie on the GPU.*while a CUDA graph is captured"):
            call()
    with pytest.raises(pg.UnsupportedError, match="bind_textures must be called for this cache once before"):
        pg.bind_textures(cache)
    key = capturing.stub.array((1, 2, 64), np.float16)
    slots, positions = capturing.stub.array((1,), np.int64), capturing.stub.array((1,), np.int32)
    with pytest.raises(pg.UnsupportedError, match="rope_append_kv must have uploaded its angles by a call before"):
        pg.rope_append_kv(cache, key, key, slots, positions)
    assert not capturing.stub.launches


def test_legacy_streams_are_not_asked():
    for number in (0, 1):
        assert not captures.is_capturing(SimpleNamespace(ptr=number))  # which has no is_capturing
    assert captures.is_capturing(STREAM)


# --- on a GPU -----------------------------------------------------------------------------------------------------

CASE = DecodeShape((100, 33, 250))


def capture(call):
    """Call once, capture it on a stream of its own, and return the graph, the stream and the result."""
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        call()
        stream.synchronize()
        stream.begin_capture()
        try:
            result = call()
        finally:
            graph = stream.end_capture()
    return graph, stream, result


def disturb(stream):
    """Allocate what fits where temporaries may have been, from the stream's own part of the pool, and write to it."""
    with stream:
        held = [cupy.full(n, 7, np.uint8) for n in [256, 512, 1024, 4096, 65536, 2**20, 2**23] * 4]
    stream.synchronize()
    return held


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["auto", "paged_attention_v2", "paged_attention_mma"])
def test_a_captured_call_without_a_plan_writes_to_no_memory_of_others(kernel):
    case = decode_case(CASE, "cuda")
    out = cupy.empty_like(case.query)
    graph, stream, _ = capture(lambda: pg.paged_attention(*case.arguments, kernel=kernel, out=out))
    held = disturb(stream)
    for _ in range(5):
        out.fill(np.nan)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert_decode_matches_reference(case, out)
    assert all(bool((array == 7).all()) for array in held)


@pytest.mark.gpu
def test_a_captured_prefill_without_a_plan_writes_to_no_memory_of_others():
    case = decode_case(CASE, "cuda")
    starts, out = cupy.arange(4, dtype=np.int32), cupy.empty_like(case.query)
    graph, stream, _ = capture(lambda: pg.paged_prefill(*case.arguments, starts, out=out))
    held = disturb(stream)
    out.fill(np.nan)
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    assert_decode_matches_reference(case, out)
    assert all(bool((array == 7).all()) for array in held)


@pytest.mark.gpu
def test_captured_sampling_with_numbers_for_options_draws_the_same_and_spares_what_others_have():
    logits = cupy.asarray(np.random.default_rng(0).standard_normal((64, 1000)).astype(np.float32))
    tokens = cupy.empty(64, np.int32)
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 5}
    expected = pg.sample(logits, **options).get()
    graph, stream, _ = capture(lambda: pg.sample(logits, **options, out=tokens))
    held = disturb(stream)
    for _ in range(5):
        tokens.fill(-5)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        np.testing.assert_array_equal(tokens.get(), expected)
    assert all(bool((array == 7).all()) for array in held)


@pytest.mark.gpu
def test_what_captures_keep_goes_with_their_graphs():
    case = decode_case(CASE, "cuda")
    out = cupy.empty_like(case.query)
    before = captures.kept_for_graphs()
    graphs = [
        capture(lambda: pg.paged_attention(*case.arguments, out=out))[:2],
        capture(lambda: pg.sample(cupy.zeros((4, 100), np.float32)))[:2],
    ]
    assert captures.kept_for_graphs() == before + 2
    for graph, stream in graphs:
        graph.launch(stream)
        stream.synchronize()
    del graph, stream
    while graphs:
        graphs.pop()
        gc.collect()
        assert waited_for(lambda: captures.kept_for_graphs() == before + len(graphs))


def waited_for(condition, seconds=5.0):
    """Whether a condition holds within some seconds: the driver drops objects on a thread of its own."""
    import time

    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.gpu
def test_a_handle_and_its_workspace_go_with_stream_and_graph():
    from cupaged.engine import products

    a = cupy.ones((64, 64), np.float16)
    graph, stream, found = capture(lambda: product(a, a))
    handle = weakref.ref(products._of_thread.handles[cupy.cuda.runtime.getDevice()][stream])
    assert captures.kept_for_graphs() >= 1
    graph.launch(stream)
    stream.synchronize()
    assert (found == 64).all()
    other = cupy.cuda.Stream(non_blocking=True)
    del stream
    gc.collect()
    assert handle() is None
    found.fill(0)
    cupy.cuda.Device().synchronize()
    graph.launch(other)  # the workspace is still there
    other.synchronize()
    assert (found == 64).all()
    count = captures.kept_for_graphs()
    del graph
    gc.collect()
    assert waited_for(lambda: captures.kept_for_graphs() < count)


@pytest.mark.gpu
def test_uploads_within_a_capture_are_refused_and_leave_it_valid():
    cache = pg.KVCache(pg.CacheConfig(8, 16, 2, 64), "cuda")
    cache.key[0] = 5
    pairs = cupy.asarray([[0, 1]], dtype=np.int32)
    host, refused = pg.HostBlocks(cache.config, 4), []

    def call():
        for upload in (
            lambda: pg.copy_blocks(cache, [[0, 1]]),
            lambda: pg.swap_blocks(cache, host, [[0, 1]]),
        ):
            if cupy.cuda.get_current_stream().is_capturing():
                with pytest.raises(pg.UnsupportedError, match="while a CUDA graph is captured") as caught:
                    upload()
                refused.append(caught)
        pg.copy_blocks(cache, pairs)

    graph, stream, _ = capture(call)
    assert len(refused) == 2
    cache.key[1] = 0
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    assert (cache.key[1] == 5).all()
