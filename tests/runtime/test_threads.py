"""What threads share is made once, and nobody's setting undoes another's."""

import threading
import time

import numpy as np
import pytest

import cupaged as pg
from cupaged.ops import swap, textures
from cupaged.runtime import host, kernels_folder, kernels_from, launch, load_kernel, select
from cupaged.runtime.source import KernelSource
from tests.kit.cuda_stub import CudaStub, StubKernel
from tests.kit.programs import kernel_from_text

PLAIN = 'extern "C" __global__ void plain(int* out) { out[0] = 1; }'


def at_once(*calls):
    """Run each call on a thread of its own, all from the same moment on; return what they return."""
    start, answers = threading.Barrier(len(calls)), [None] * len(calls)

    def run(place, call):
        start.wait()
        answers[place] = call()

    threads = [threading.Thread(target=run, args=each) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def slowly(function):
    """Return what does the same after the others had time to come as far."""

    def call(*args, **options):
        time.sleep(0.05)
        return function(*args, **options)

    return call


# --- shared memory of a kernel on the GPU -------------------------------------------------------------------------


class SlowKernel(StubKernel):
    """A kernel on which the smaller of two amounts is set last, if both are being set at once."""

    def __init__(self, small):
        super().__init__([])
        self._small, self._allowed, self._larger_is_set = small, 48 * 1024, threading.Event()

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._allowed

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, value):
        if value == self._small:
            self._larger_is_set.wait(timeout=0.3)
        self._allowed = value
        if value > self._small:
            self._larger_is_set.set()


@pytest.fixture
def stub(monkeypatch):
    pytest.importorskip("cupy", reason="the launch needs CuPy, though no GPU")
    return CudaStub(monkeypatch)


@pytest.fixture
def plain_source(tmp_path):
    return kernel_from_text(tmp_path, PLAIN, "plain", "host").source


def cuda_kernel(source):
    from cupaged.runtime.cuda import CudaKernel

    return CudaKernel(source)


@pytest.mark.parametrize("order", [1, -1])
def test_shared_memory_that_two_threads_raise_ends_at_the_larger(order, stub, plain_source):
    small, large = 64 * 1024, 128 * 1024
    stub.kernel = SlowKernel(small)
    kernel, out = cuda_kernel(plain_source), stub.array((1,), np.int32)
    calls = [lambda size=size: kernel((1,), (32,), shared_bytes=size, out=out) for size in (small, large)]
    at_once(*calls[::order])
    assert stub.kernel.max_dynamic_shared_size_bytes == large
    for call in calls:  # what it was told is what it takes for granted
        call()
        assert stub.kernel.max_dynamic_shared_size_bytes == large


def test_two_kernels_of_the_same_source_share_a_function_and_neither_lowers_its_memory(stub, plain_source):
    """CuPy keeps a module by its file: what one asks for, the other's launches find."""
    first, second, out = cuda_kernel(plain_source), cuda_kernel(plain_source), stub.array((1,), np.int32)
    first((1,), (32,), shared_bytes=128 * 1024, out=out)
    second((1,), (32,), shared_bytes=64 * 1024, out=out)
    assert stub.kernel.max_dynamic_shared_size_bytes == 128 * 1024


def test_static_shared_memory_counts_against_the_limit(stub, plain_source):
    stub.kernel.shared_size_bytes = 1024
    limit = 232448 - 1024
    kernel, out = cuda_kernel(plain_source), stub.array((1,), np.int32)
    kernel((1,), (32,), shared_bytes=limit, out=out)
    with pytest.raises(pg.UnsupportedError, match=f"shared_bytes must be at most {limit} on this device"):
        kernel((1,), (32,), shared_bytes=limit + 1, out=out)


# --- what is made when it is first asked for ------------------------------------------------------------------------


def test_a_kernel_is_loaded_on_the_gpu_once_and_given_out_only_then(monkeypatch, plain_source):
    cupy = pytest.importorskip("cupy", reason="the kernel is CuPy's, though no GPU is needed")
    from cupaged.runtime import cuda

    made = []

    class Kernel:
        loaded = False

        @property
        def num_regs(self):
            time.sleep(0.05)
            self.loaded = True
            return 32

    class Module:
        def __init__(self, path):
            made.append(path)

        def get_function(self, name):
            return Kernel()

    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(cupy, "RawModule", Module)
    monkeypatch.setattr(cuda, "architecture_of", lambda device: "sm_90")
    monkeypatch.setattr(cuda, "cached_cubin", slowly(lambda source, architecture: "file"))
    kernel = cuda.CudaKernel(plain_source)

    def ask_until_there():
        return [kernel.raw_kernel().loaded for _ in range(1000)]

    answers = at_once(*[ask_until_there] * 4)
    assert all(all(each) for each in answers) and len(made) == 1


def test_a_kernel_is_built_on_the_host_once(monkeypatch, plain_source):
    kernel, built, build = host.HostKernel(plain_source), [], host._build
    host._scheduler(host.sanitizing())
    monkeypatch.setattr(host, "_build", slowly(lambda *args: built.append(1) or build(*args)))
    at_once(*[kernel.build] * 4)
    assert len(built) == 1


def test_a_build_that_fails_can_be_tried_again(tmp_path):
    kernel = kernel_from_text(tmp_path, 'extern "C" __global__ void broken(int* out) { out = 1; }', "broken", "host")
    for _ in range(2):
        with pytest.raises(pg.KernelBuildError, match="broken"):
            kernel.build()


def test_a_kernel_that_two_ask_for_is_the_same_object(monkeypatch):
    monkeypatch.setattr(select, "_loaded", {})
    monkeypatch.setattr(KernelSource, "read", slowly(KernelSource.read))
    loaded = at_once(*[lambda: load_kernel("bench/read_stream.cu", "read_stream", backend="host")] * 4)
    assert len(set(map(id, loaded))) == 1


def test_calls_are_remembered_in_one_place(monkeypatch):
    monkeypatch.setattr(launch, "_remembered", {})
    monkeypatch.setattr(launch, "CheckedCalls", slowly(launch.CheckedCalls))
    found = at_once(*[lambda: launch.remembered("some_function", "host")] * 4)
    assert len(set(map(id, found))) == 1 and launch.remembered("some_function", "host") is found[0]


def test_textures_that_two_ask_for_are_the_same(monkeypatch):
    cache = pg.KVCache(pg.CacheConfig(num_blocks=2, block_size=16, num_kv_heads=1, head_dim=64), backend="host")
    monkeypatch.setattr(textures, "TextureView", slowly(textures.TextureView))
    views = at_once(*[lambda: textures.bind_textures(cache)] * 4)
    assert len(set(map(id, views))) == 1 and list(cache.textures.values()) == views[:1]


def test_a_folder_of_kernels_holds_for_the_thread_that_chose_it(tmp_path):
    (tmp_path / "include").mkdir()
    own, inside = kernels_folder(), threading.Barrier(2, timeout=60)

    def choose():
        with kernels_from(tmp_path) as chosen:
            inside.wait()
            seen = kernels_folder()
            inside.wait()
        return seen == chosen, kernels_folder() == own

    def look():
        inside.wait()
        seen = kernels_folder()
        inside.wait()
        return seen == own

    assert at_once(choose, look) == [(True, True), True]


# --- swaps of one cache -------------------------------------------------------------------------------------------


def test_threads_that_swap_blocks_of_one_cache_get_their_own_blocks(monkeypatch):
    config = pg.CacheConfig(num_blocks=8, block_size=16, num_kv_heads=1, head_dim=64, dtype="float32")
    cache, cpu = pg.KVCache(config, backend="host"), pg.HostBlocks(config, 8, pinned=False)
    for block in range(8):
        cache.key[block], cache.value[block] = block + 1, -block - 1
    pg.swap_blocks(cache, cpu, [(7, 7)])
    monkeypatch.setattr(swap._Mover, "_use_link", slowly(swap._Mover._use_link))
    at_once(*[lambda block=block: pg.swap_blocks(cache, cpu, [(block, 7 - block)]) for block in range(4)])
    back = pg.KVCache(config, backend="host")
    pg.swap_blocks(cpu, back, [(7 - block, block) for block in range(4)])
    for block in range(4):
        assert (back.key[block] == block + 1).all() and (back.value[block] == -block - 1).all()


def test_threads_that_swap_first_share_the_buffers(monkeypatch):
    config = pg.CacheConfig(num_blocks=8, block_size=16, num_kv_heads=1, head_dim=64, dtype="float32")
    cache, cpu, made, make = pg.KVCache(config, backend="host"), pg.HostBlocks(config, 8, pinned=False), [], swap._Mover
    monkeypatch.setattr(swap, "_Mover", slowly(lambda caches: made.append(make(caches)) or made[-1]))
    at_once(*[lambda block=block: pg.swap_blocks(cache, cpu, [(block, block)]) for block in range(4)])
    assert made == [cache.mover]
