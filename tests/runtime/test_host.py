"""The host build: errors instead of hangs, shuffled schedules, the traffic recorder, and what a user can get wrong."""

import stat
import time

import numpy as np
import pytest

import cupaged as pg
from cupaged.runtime import host, load_kernel
from cupaged.runtime.source import KernelSource
from tests.kit.programs import kernel_from_text

INCLUDES = '#include "global_memory.cuh"\n#include "reduce.cuh"\n'


@pytest.fixture
def program(tmp_path):
    def build(entry, text, **defines):
        return kernel_from_text(tmp_path, INCLUDES + text, entry, "host", defines)

    return build


# --- divergence is an error, not a hang -----------------------------------------------------------------------------


def test_threads_at_different_barriers(program):
    kernel = program(
        "split",
        """extern "C" __global__ void split(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  else
    __syncthreads();
}""",
    )
    message = (r"split: divergence in block \(0, 0, 0\): thread \(0, 0, 0\) waits at the barrier in split.cu:4, "
               r"but thread \(40, 0, 0\) waits at the barrier in split.cu:6")  # fmt: skip
    with pytest.raises(pg.KernelLaunchError, match=message):
        kernel((1,), (64,), out=np.zeros(1, np.int32))


def test_a_thread_that_exits_past_a_barrier(program):
    kernel = program(
        "early",
        """extern "C" __global__ void early(int* out) {
  if (blockIdx.x == 2 && threadIdx.x == 5) return;
  __syncthreads();
}""",
    )
    message = (
        r"block \(2, 0, 0\): thread \(0, 0, 0\) waits at the barrier in early.cu:5, but thread \(5, 0, 0\) has exited"
    )
    with pytest.raises(pg.KernelLaunchError, match=message):
        kernel((4,), (32,), out=np.zeros(1, np.int32))


def test_a_lane_that_never_comes_to_a_shuffle(program):
    kernel = program(
        "lost_lane",
        """extern "C" __global__ void lost_lane(int* out) {
  if (threadIdx.x != 7) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
}""",
    )
    message = r"thread \(0, 0, 0\) waits in the warp operation in lost_lane.cu:4, but thread \(7, 0, 0\) has exited"
    with pytest.raises(pg.KernelLaunchError, match=message):
        kernel((1,), (32,), out=np.zeros(32, np.int32))


def test_lanes_in_different_operations(program):
    kernel = program(
        "mixed",
        """extern "C" __global__ void mixed(int* out) {
  if (threadIdx.x % 2) out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);
  else out[threadIdx.x] = __ballot_sync(kAllLanes, 1);
}""",
    )
    with pytest.raises(pg.KernelLaunchError, match="its warp diverged: lane"):
        kernel((1,), (32,), out=np.zeros(32, np.int32))


def test_a_shuffle_from_a_lane_outside_the_mask(program):
    kernel = program(
        "outsider",
        """extern "C" __global__ void outsider(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1, 20);
}""",
    )
    with pytest.raises(pg.KernelLaunchError, match="a shuffle reads lane 20, which takes no part in it"):
        kernel((1,), (32,), out=np.zeros(32, np.int32))


def test_a_trap_names_its_thread_and_line(program):
    kernel = program(
        "trapped",
        """extern "C" __global__ void trapped(int* out) {
  if (blockIdx.x == 3 && threadIdx.x == 9) __trap();
}""",
    )
    with pytest.raises(pg.KernelLaunchError, match=r"thread \(9, 0, 0\) of block \(3, 0, 0\) at trapped.cu:4: __trap"):
        kernel((8,), (32,), out=np.zeros(1, np.int32))


def test_writing_past_dynamic_shared_memory(program):
    kernel = program(
        "overrun",
        """extern "C" __global__ void overrun(int* out) {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  reinterpret_cast<int*>(dynamic_shared)[threadIdx.x] = 1;
}""",
    )
    kernel((1,), (32,), shared_bytes=128, out=np.zeros(1, np.int32))
    with pytest.raises(pg.KernelLaunchError, match=r"block \(0, 0, 0\) wrote past its 64 bytes of dynamic shared"):
        kernel((1,), (32,), shared_bytes=64, out=np.zeros(1, np.int32))


def test_after_an_error_the_next_launch_works(program):
    kernel = program(
        "sometimes",
        """extern "C" __global__ void sometimes(int* out, const int fail) {
  if (fail && threadIdx.x == 0) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}""",
    )
    for fail in (1, 0, 1, 0):
        out = np.zeros(64, np.int32)
        if fail:
            with pytest.raises(pg.KernelLaunchError, match="has exited"):
                kernel((3,), (64,), out=out, fail=fail)
        else:
            kernel((3,), (64,), out=out, fail=fail)
            assert (out == 1).all()


# --- schedules and shared memory ------------------------------------------------------------------------------------

MISSING_BARRIER = """extern "C" __global__ void racy(int* out) {   // [96]
  __shared__ int row[96];
  row[threadIdx.x] = threadIdx.x;
  BARRIER
  out[threadIdx.x] = row[(threadIdx.x + 37) % 96];
}"""


@pytest.mark.parametrize("seed", range(4))
def test_a_missing_barrier_shows(program, seed):
    expected = (np.arange(96) + 37) % 96
    for barrier, right in (("__syncthreads();", True), ("", False)):
        kernel = program("racy", MISSING_BARRIER.replace("BARRIER", barrier))
        out = np.zeros(96, np.int32)
        with host.schedule(seed):
            kernel((1,), (96,), out=out)
        assert np.array_equal(out, expected) == right


def test_shared_memory_starts_as_nan_in_every_block(program):
    kernel = program(
        "unset",
        """extern "C" __global__ void unset(float* out) {   // [blocks, 3]
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  __shared__ float fixed[2];
  float* flexible = reinterpret_cast<float*>(dynamic_shared);
  out[3 * blockIdx.x] = fixed[0];
  out[3 * blockIdx.x + 1] = fixed[1];
  out[3 * blockIdx.x + 2] = flexible[7];
  fixed[0] = fixed[1] = flexible[7] = 1.0f;
}""",
    )
    out = np.zeros((20, 3), np.float32)
    kernel((20,), (1,), shared_bytes=32, out=out)
    assert np.isnan(out).all()


def test_a_seed_changes_the_order_and_repeats_it(program):
    kernel = program(
        "order",
        """extern "C" __global__ void order(int* out, int* next) {   // [threads], [1]
  out[atomicAdd(next, 1)] = threadIdx.x + blockDim.x * blockIdx.x;
}""",
    )

    def run(seed):
        out, following = np.zeros(512, np.int32), np.zeros(1, np.int32)
        with host.schedule(seed):
            kernel((4,), (128,), out=out, next=following)
        return out.tolist()

    monkey = pytest.MonkeyPatch()
    with monkey.context() as context:
        context.setenv("CUPAGED_HOST_THREADS", "1")
        assert run(0) == list(range(512))
        assert run(1) == run(1) != run(2) != run(0)
        assert sorted(run(1)) == list(range(512))


def test_blocks_are_spread_over_the_cores(program, monkeypatch):
    """Every block notes its OS thread by the address of a variable of its own."""
    kernel = program(
        "where",
        """extern "C" __global__ void where(unsigned long long* out) {   // [blocks]
  __shared__ int mine;
  double sink = 0.0;
  for (int i = 0; i < 2000000; ++i) sink += i * 1e-9;
  mine = static_cast<int>(sink);
  out[blockIdx.x] = reinterpret_cast<unsigned long long>(&mine);
}""",
    )
    for workers in (1, 2):
        monkeypatch.setenv("CUPAGED_HOST_THREADS", str(workers))
        out = np.zeros(64, np.uint64)
        kernel((64,), (1,), out=out)
        assert len(set(out.tolist())) == workers


def test_context_switches_are_cheap(program):
    """A million of them within two seconds on any machine: a fifth of a second is usual, swapcontext takes over one."""
    kernel = program(
        "barriers",
        """extern "C" __global__ void barriers(int* out) {
  for (int i = 0; i < 1000; ++i) __syncthreads();
  if (threadIdx.x == 0) atomicAdd(out, 1);
}""",
    ).build()
    out = np.zeros(1, np.int32)
    start = time.perf_counter()
    kernel((1,), (1000,), out=out)
    assert time.perf_counter() - start < 2.0
    assert out[0] == 1


# --- copies that run on their own -----------------------------------------------------------------------------------

COPY = """#include "async_copy.cuh"
extern "C" __global__ void copied(float* out, const float* data, const int wanted) {   // [3, 128], [128]
  __shared__ __align__(16) float row[128];
  for (int i = 0; i < 4; ++i) row[4 * threadIdx.x + i] = 7.0f;
  start_copy_16(row + 4 * threadIdx.x, data + 4 * threadIdx.x, wanted != 0);
  close_copy_group();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = row[4 * threadIdx.x + i];   // too early
  if (WRITES) row[4 * threadIdx.x] = 5.0f;                                            // as early
  wait_for_copies<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[128 + 4 * threadIdx.x + i] = row[4 * threadIdx.x + i];
}"""


def copied(program, seed, wanted=1, writes=0):
    """Return what is found before the wait and after it, [2, 32, 4]."""
    kernel, out = program("copied", COPY, WRITES=writes), np.zeros(256, np.float32)
    with host.schedule(seed):
        kernel((1,), (32,), out=out, data=np.arange(128, dtype=np.float32), wanted=wanted)
    return out.reshape(2, 32, 4)


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("seed", range(9))
def test_a_copy_arrives_when_the_seed_says_and_by_the_wait_at_last(program, seed, wanted):
    before, after = copied(program, seed, wanted)
    expected = wanted * np.arange(128).reshape(32, 4)
    np.testing.assert_array_equal(after, expected)
    arrived = (before == expected).all(axis=1)
    assert (arrived | np.isnan(before).all(axis=1)).all()  # the copy or NaN, never what was there before
    assert {0: not arrived.any(), 1: arrived.all(), 2: 0 < arrived.sum() < 32}[seed % 3]


def test_what_is_written_where_a_copy_is_under_way_is_lost_or_stays(program):
    """Either is wrong for whoever relies on the other: three seeds in a row show both."""
    lost = np.arange(0, 128, 4)
    written = [copied(program, seed, writes=1)[1][:, 0] for seed in range(3)]
    np.testing.assert_array_equal(written[0], lost)
    np.testing.assert_array_equal(written[1], 5)
    assert (written[2] == 5).any() and (written[2] == lost)[2:].any()


def test_a_seed_repeats_which_copies_arrive_early(program):
    first, again, other = (copied(program, seed)[0] for seed in (2, 2, 5))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other, equal_nan=True)


# --- the traffic recorder -------------------------------------------------------------------------------------------


def aligned(count, dtype=np.float32):
    from cupaged.kv_cache import aligned_zeros

    return aligned_zeros((count,), np.dtype(dtype))


STRIDED = """
extern "C" __global__ void strided(float* out, const float* data, const int stride) {   // [threads], [threads * stride]
  out[threadIdx.x] = load_global(data + threadIdx.x * stride);
}"""


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (4, 16), (8, 32), (100, 32), (0, 1)])
def test_sectors_of_a_strided_load(program, stride, sectors):
    kernel = program("strided", STRIDED)
    data, out = aligned(32 * 100 + 1), aligned(64)
    with host.record_traffic() as log:
        kernel((1,), (32,), out=out, data=data, stride=stride)
        kernel((3,), (64,), out=out, data=data[: 64 * 8], stride=min(stride, 8))
    assert (log[0].requests, log[0].sectors) == (1, sectors)
    assert log[0].bytes == (4 if stride == 0 else 128)
    assert log[0].sectors_per_request == sectors
    assert log[0].used_fraction == pytest.approx(log[0].bytes / (32 * sectors))
    assert log[1].requests == 3 * 2
    assert [(line.array, line.line) for line in log[0].lines] == [("data", 5)]


def test_misaligned_vectors_take_one_sector_more(program):
    kernel = program(
        "vectors",
        """#include "types.cuh"
extern "C" __global__ void vectors(float* out, const float* data) {   // [32], [4 * 32]
  out[threadIdx.x] = load_global(reinterpret_cast<const Vector<float, 4>*>(data) + threadIdx.x).value[0];
}""",
    )
    data = aligned(4 * 32 + 4)
    with host.record_traffic() as log:
        kernel((1,), (32,), out=aligned(32), data=data[:128])
        kernel((1,), (32,), out=aligned(32), data=data[4:])
    assert [launch.sectors for launch in log] == [16, 17]
    assert [launch.bytes for launch in log] == [512, 512]


def test_lanes_that_sit_a_load_out_keep_step(program):
    """Half of the lanes skip every other load; the loads of the rest still form one request each."""
    kernel = program(
        "predicated",
        """
extern "C" __global__ void predicated(float* out, const float* data) {   // [32], [32 * 10]
  float sum = 0.0f;
  for (int i = 0; i < 10; ++i) sum += load_global_if(threadIdx.x % 2 == 0 || i % 2 == 0, data + 32 * i + threadIdx.x);
  out[threadIdx.x] = sum;
}""",
    )
    data, out = aligned(320), aligned(32)
    data[:] = 1
    with host.record_traffic() as log:
        kernel((1,), (32,), out=out, data=data)
    assert (log[0].requests, log[0].sectors, log[0].bytes) == (10, 40, 5 * 128 + 5 * 64)
    np.testing.assert_array_equal(out, np.where(np.arange(32) % 2 == 0, 10, 5))


def test_a_load_that_no_lane_wants_is_no_request(program):
    kernel = program(
        "unwanted",
        """
extern "C" __global__ void unwanted(float* out, const float* data) {
  out[threadIdx.x] = load_global_if(threadIdx.x > 40, data + threadIdx.x);
}""",
    )
    with host.record_traffic() as log:
        kernel((1,), (64,), out=aligned(64), data=aligned(64))
    assert (log[0].requests, log[0].sectors) == (1, 3)


def test_what_a_block_reads_twice_counts_once_per_block(program):
    """Two passes over 100 floats in three-float steps: every request wastes, a cache would not."""
    kernel = program(
        "twice",
        """
extern "C" __global__ void twice(float* out, const float* data) {   // [32], [100]
  float sum = 0.0f;
  for (int pass = 0; pass < 2; ++pass)
    for (int i = 0; i < 3; ++i) sum += load_global(data + 3 * threadIdx.x + i);
  out[threadIdx.x] = sum;
}""",
    )
    with host.record_traffic() as log:
        kernel((5,), (32,), out=aligned(32), data=aligned(100))
    assert (log[0].requests, log[0].sectors, log[0].bytes) == (5 * 6, 5 * 6 * 12, 5 * 6 * 128)
    assert (log[0].block_sectors, log[0].arrays[0].block_bytes) == (5 * 12, 5 * 32 * 3 * 4)
    assert log[0].used_fraction == pytest.approx(1 / 3)
    assert log[0].used_fraction_per_block == 1.0
    assert log[0].of("out").block_sectors == 0


def test_nothing_is_recorded_unless_asked(program):
    kernel = program("strided", STRIDED)
    with host.record_traffic() as log:
        pass
    kernel((1,), (32,), out=aligned(32), data=aligned(32), stride=1)
    assert log == []


def test_every_byte_of_the_cache_is_asked_for_once():
    """The recorder misses no load of the attention kernel: bytes asked for are the bytes of the context."""
    from cupaged.bench.traffic import cache_traffic
    from cupaged.bench.workload import decode_workload

    for layout in ("BSHD", "BHSD", "HBSD", "BS2HD", "BHDSX"):
        work = decode_workload((64, 48), 3, 3, 128, 16, layout=layout, backend="host")
        _, cache = cache_traffic(lambda work=work: pg.paged_attention(*work.arguments, kernel="paged_attention_v1"))
        assert cache.bytes == work.kv_bytes
        assert cache.used_fraction == 1.0


# --- what a user can get wrong ---------------------------------------------------------------------------------------


def test_a_compiler_error_stands_at_the_line_of_the_cu_file(program):
    kernel = program(
        "broken",
        """extern "C" __global__ void broken(int* out) {
  out[0] = undefined_name;
}""",
    )
    with pytest.raises(pg.KernelBuildError, match=r"broken\.cu:4:\d+: error: .*undefined_name"):
        kernel.build()


def test_a_missing_compiler_is_one_clear_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(pg.BackendUnavailableError, match=r"found neither g\+\+ nor clang\+\+ on PATH: install one"):
        host.find_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(pg.BackendUnavailableError, match=r"found no-such-compiler \(from CXX\) not on PATH"):
        host.find_compiler()


def test_cxx_is_honoured(monkeypatch, tmp_path):
    wrapper = tmp_path / "my-compiler"
    command, _ = host.find_compiler()
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec {command[0]} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"{wrapper} -DEXTRA=1")
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path / "cache"))
    kernel = kernel_from_text(tmp_path, 'extern "C" __global__ void one(int* out) { out[0] = EXTRA; }', "one", "host")
    out = np.zeros(1, np.int32)
    kernel((1,), (1,), out=out)
    assert out[0] == 1
    assert "one.cpp" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("g++ '-O2", r"CXX must be .* as a shell reads them; got \"g\+\+ '-O2\" \(No closing quotation\)"),
        ('g++ "', r"CXX must be .*; got 'g\+\+ \"' \(No closing quotation\)"),
        ("g++ \\", r"CXX must be .* \(No escaped character\)"),
        ("  ", r"CXX must name a C\+\+20 compiler; got '  '"),
        ("''", r"found '' \(from CXX\) not on PATH"),
        ("/", r"found / \(from CXX\) not on PATH"),
        ("false", r"false \(from CXX\) does not answer --version \(.*exit status 1"),
        ("./no-program", r"no-program \(from CXX\) does not answer --version \(.*Exec format error"),
    ],
)
def test_a_bad_cxx_is_one_sentence_that_names_it(named, message, monkeypatch, tmp_path):
    (tmp_path / "no-program").write_bytes(b"\0\1\2")
    (tmp_path / "no-program").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", named)
    with pytest.raises(pg.BackendUnavailableError, match=message) as error:
        host.find_compiler()
    assert "\n" not in str(error.value)


def compiler_that(does, folder, monkeypatch):
    """Let CXX name a script that answers --version and else does this; the scheduler is there before."""
    host._scheduler(host.sanitizing())
    (folder / "my-compiler").write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo mine\n{does}\n')
    (folder / "my-compiler").chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CXX", "./my-compiler")


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("exit 0", "ended with status 0, and made no file"),
        ("kill -9 $$", "ended with status -9"),
        ("echo 'error writing: No space left on device' >&2; exit 1", "no room in .*CUPAGED_CACHE_DIR"),
    ],
)
def test_a_compiler_that_makes_nothing_is_a_build_error(does, message, program, monkeypatch, tmp_path):
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path / "cache"))
    compiler_that(does, tmp_path, monkeypatch)
    kernel = program("unmade", 'extern "C" __global__ void unmade(int* out) {}')
    with pytest.raises(pg.KernelBuildError, match=message):
        kernel.build()
    assert list((tmp_path / "cache" / "host").iterdir()) == []


def test_a_compiler_that_went_away_is_one_sentence(program, monkeypatch, tmp_path):
    compiler_that("exit 0", tmp_path, monkeypatch)
    kernel = program("gone", 'extern "C" __global__ void gone(int* out) {}')
    host.find_compiler()
    (tmp_path / "my-compiler").write_bytes(b"\0\1\2")
    with pytest.raises(pg.KernelBuildError, match="my-compiler could not build gone: .*Exec format error"):
        kernel.build()
    (tmp_path / "my-compiler").unlink()
    with pytest.raises(pg.BackendUnavailableError, match=r"found ./my-compiler \(from CXX\) not on PATH"):
        kernel.build()


def test_a_compiler_can_be_named_from_where_one_stands(program, monkeypatch, tmp_path):
    command, _ = host.find_compiler()
    compiler_that(f'exec {command[0]} "$@"', tmp_path, monkeypatch)
    out = np.zeros(1, np.int32)
    kernel = program("near_by", 'extern "C" __global__ void near_by(int* out) { out[0] = 3; }')
    kernel((1,), (1,), out=out)
    assert out[0] == 3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_damaged_library_is_built_anew(share, monkeypatch, tmp_path):
    """Empty, cut in the middle, or of the right size with other bytes in it: none is loaded."""
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path / "cache"))
    text = 'extern "C" __global__ void one(int* out) { out[0] = 1; }'
    kernel = kernel_from_text(tmp_path, text, "one", "host").build()
    (library,) = (tmp_path / "cache" / "host").glob("one-*.so")
    good = library.read_bytes()
    damaged = good[: int(share * len(good))] if share < 1 else good[:-4096] + bytes(4096)
    library.unlink()  # the one that is loaded stays whole
    library.write_bytes(damaged)
    library.chmod(0o600)
    out = np.zeros(1, np.int32)
    host.HostKernel(kernel.source)((1,), (1,), out=out)
    assert out[0] == 1
    (library,) = (tmp_path / "cache" / "host").glob("one-*.so")
    assert library.read_bytes() == good


def test_a_cache_that_is_removed_while_the_process_lives_is_filled_again(monkeypatch, tmp_path):
    import shutil

    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("first", "second"):
        text = f'extern "C" __global__ void {name}(int* out) {{ __syncthreads(); out[0] += 1; }}'
        kernel, out = kernel_from_text(tmp_path, text, name, "host"), np.zeros(1, np.int32)
        kernel((1,), (1,), out=out)
        shutil.rmtree(tmp_path / "cache")
        kernel((1,), (1,), out=out)
        assert out[0] == 2


def test_a_folder_that_nothing_can_be_loaded_from_is_one_sentence(program, monkeypatch):
    kernel = program("unloaded", 'extern "C" __global__ void unloaded(int* out) {}')

    def refuse(path, mode):
        raise OSError(f"{path}: failed to map segment from shared object")  # what a noexec mount answers

    host._scheduler(False)
    monkeypatch.setattr(host.ctypes, "CDLL", refuse)
    with pytest.raises(pg.KernelBuildError, match=r"cannot be loaded .*noexec, let CUPAGED_CACHE_DIR") as error:
        kernel.build()
    assert "\n" not in str(error.value)


def test_a_kernel_is_built_once_and_again_when_a_header_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path / "cache"))
    text = '#include "added.cuh"\nextern "C" __global__ void add(int* out) { out[0] += ADD; }'
    include = tmp_path / "kernels" / "include"
    include.mkdir(parents=True)

    def built():
        return sorted(path.name for path in (tmp_path / "cache" / "host").glob("add-*.so"))

    out = np.zeros(1, np.int32)
    for value, expected, count in ((5, 5, 1), (5, 10, 1), (7, 17, 2)):
        (include / "added.cuh").write_text(f"constexpr int ADD = {value};\n")
        kernel_from_text(tmp_path, text, "add", "host")((1,), (1,), out=out)
        assert (out[0], len(built())) == (expected, count)


def test_the_cache_belongs_to_its_owner_alone(monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(folder))
    kernel = kernel_from_text(tmp_path, 'extern "C" __global__ void one(int* out) { out[0] = 1; }', "one", "host")
    kernel.build()
    assert stat.S_IMODE((folder / "host").stat().st_mode) == 0o700
    (folder / "host").chmod(0o777)
    again = kernel_from_text(tmp_path, 'extern "C" __global__ void two(int* out) { out[0] = 2; }', "two", "host")
    with pytest.raises(PermissionError, match=r"writable by nobody else .* mode 777"):
        again.build()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"data": np.zeros(64, np.float64)}, TypeError, "argument data must have dtype float32; got float64"),
        (
            {"data": np.zeros(128, np.float32)[::2]},
            ValueError,
            r"argument data must be C-contiguous; got shape \(64,\)",
        ),
        ({"data": [1.0]}, TypeError, "argument data must be a NumPy array on the host backend; got builtins.list"),
        ({"stride": 1.0}, TypeError, r"argument stride must be an integer \(int\); got float 1.0"),
        ({"stride": np.timedelta64(1)}, TypeError, r"argument stride must be a number \(int\), not a span of time"),
        (
            {"stride": 2**31},
            ValueError,
            r"argument stride must lie in \[-2147483648, 2147483647\] \(int\); got 2147483648",
        ),
        ({"stride": None}, TypeError, "argument stride must be an integer"),
    ],
)
def test_arguments_are_refused_by_name(program, changed, error, message):
    kernel = program("strided", STRIDED)
    arguments = {"out": np.zeros(64, np.float32), "data": np.zeros(64, np.float32), "stride": 1}
    with pytest.raises(error, match=message):
        kernel((1,), (32,), **{**arguments, **changed})


def test_a_read_only_array_is_not_written(program):
    kernel = program("strided", STRIDED)
    out = np.zeros(32, np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="argument out is written, but it is read-only"):
        kernel((1,), (32,), out=out, data=np.zeros(32, np.float32), stride=1)


def test_names_and_extents_are_checked(program):
    kernel = program("strided", STRIDED)
    good = {"out": np.zeros(32, np.float32), "data": np.zeros(32, np.float32), "stride": 1}
    with pytest.raises(TypeError, match=r"missing arguments \['stride'\], unknown arguments \['strid'\]"):
        kernel((1,), (32,), out=good["out"], data=good["data"], strid=1)
    for grid, block in (((0,), (32,)), ((1,), (1025,)), ((1, 1, 1, 1), (32,)), ((1,), (32, 33)), ((1, 65536), (1,))):
        with pytest.raises(ValueError, match="(grid|block) must"):
            kernel(grid, block, **good)
    with pytest.raises(pg.UnsupportedError, match="shared_bytes must be at most 232448"):
        kernel((1,), (32,), shared_bytes=232449, **good)
    with pytest.raises(ValueError, match="seed must lie in"), host.schedule(-1):
        pass


def test_worker_count_is_checked(program, monkeypatch):
    kernel = program("strided", STRIDED)
    monkeypatch.setenv("CUPAGED_HOST_THREADS", "many")
    with pytest.raises(ValueError, match="CUPAGED_HOST_THREADS must be an integer from 1 to 1024; got 'many'"):
        kernel((1,), (32,), out=np.zeros(32, np.float32), data=np.zeros(32, np.float32), stride=1)


def test_a_file_that_is_not_there():
    with pytest.raises(pg.KernelBuildError, match="there is no kernel file .*nothing.cu"):
        load_kernel("attention/nothing.cu", "nothing", backend="host")


def test_loading_again_gives_the_same_kernel():
    first, second = (load_kernel("bench/read_stream.cu", "read_stream", backend="host") for _ in range(2))
    assert first is second
    assert isinstance(first.source, KernelSource)


# --- libraries of several kernels in one process ---------------------------------------------------------------------


def test_shared_memory_in_a_helper_belongs_to_its_own_kernel(program):
    """The same helper in two kernels, with shared memory of different sizes: neither finds the other's."""
    text = """__device__ inline int* scratch() { __shared__ int row[N]; return row; }
extern "C" __global__ void helper(int* out) {   // [N]
  for (int i = threadIdx.x; i < N; i += 32) scratch()[i] = i;
  __syncthreads();
  for (int i = threadIdx.x; i < N; i += 32) out[i] = scratch()[N - 1 - i];
}"""
    for size in (4, 4000, 4):
        out = np.zeros(size, np.int32)
        program("helper", text, N=size)((3,), (32,), out=out)
        np.testing.assert_array_equal(out, np.arange(size)[::-1])


@pytest.mark.parametrize("name", ["sync", "getpid"])
def test_a_kernel_may_have_the_name_of_a_library_function(program, name):
    out = np.zeros(1, np.int32)
    program(name, f'extern "C" __global__ void {name}(int* out) {{ out[0] = 42; }}')((1,), (1,), out=out)
    assert out[0] == 42


def test_loads_in_a_header_that_includes_the_loads_are_recorded(tmp_path):
    text = (
        '#include "outer.cuh"\nextern "C" __global__ void nested(float* out, const float* data) { *out = first(data); }'
    )
    kernel_from_text(tmp_path, text.replace("nested", "unused"), "unused", "host")
    include = tmp_path / "kernels" / "include"
    (include / "outer.cuh").write_text(
        '#pragma once\n#include "global_memory.cuh"\n'
        "__device__ inline float first(const float* data) { return load_global(data); }\n"
    )
    with host.record_traffic() as log:
        kernel_from_text(tmp_path, text, "nested", "host")((1,), (1,), out=aligned(1), data=aligned(1))
    assert (log[0].requests, log[0].bytes) == (1, 4)


def test_a_header_in_angle_brackets_is_noticed_too(tmp_path):
    include = tmp_path / "kernels" / "include"
    include.mkdir(parents=True)
    text = '#include <mine.cuh>\nextern "C" __global__ void angles(int* out) { out[0] = MINE; }'
    for value in (11, 22):
        (include / "mine.cuh").write_text(f"constexpr int MINE = {value};\n")
        out = np.zeros(1, np.int32)
        kernel_from_text(tmp_path, text, "angles", "host")((1,), (1,), out=out)
        assert out[0] == value


def test_a_kernel_that_was_edited_after_it_was_loaded_is_refused(tmp_path):
    kernel = kernel_from_text(tmp_path, 'extern "C" __global__ void edited(int* out) {}', "edited", "host")
    kernel.source.path.write_text('extern "C" __global__ void edited(int* out, int more, int still_more) {}')
    with pytest.raises(pg.KernelBuildError, match="was edited after it was loaded: load the kernel again"):
        kernel((1,), (1,), out=np.zeros(1, np.int32))


def test_interleaved_arrays_are_one_to_the_recorder():
    from cupaged.bench.workload import decode_workload

    work = decode_workload((40,), 2, 2, 64, 16, layout="BS2HD", backend="host")
    with host.record_traffic() as log:
        pg.paged_attention(*work.arguments, kernel="paged_attention_v1")
    assert "key_cache+value_cache" in {line.array for line in log[0].lines}
    assert log[0].of("key_cache", "value_cache").bytes == work.kv_bytes


def test_types_may_share_memory_as_on_the_gpu(program):
    kernel = program(
        "pun",
        """extern "C" __global__ void pun(int* out, float* same) {
  out[0] = 1;
  same[0] = 2.0f;
  out[1] = out[0];
}""",
    )
    memory = np.zeros(2, np.int32)
    kernel((1,), (1,), out=memory, same=memory.view(np.float32))
    assert memory[1] == 0x40000000


def test_shuffles_from_lanes_that_do_not_exist(program):
    kernel = program(
        "outside",
        """extern "C" __global__ void outside(int* out) {
  out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, -1);
}""",
    )
    with pytest.raises(pg.KernelLaunchError, match="a shuffle reads lane -"):
        kernel((1,), (32,), out=np.zeros(32, np.int32))


def test_large_blocks_on_many_threads(program, monkeypatch):
    monkeypatch.setenv("CUPAGED_HOST_THREADS", "1024")
    kernel = program(
        "many",
        """extern "C" __global__ void many(int* out) {
  __syncthreads();
  atomicAdd(out, 1);
}""",
    )
    out = np.zeros(1, np.int32)
    kernel((100,), (1024,), out=out)
    assert out[0] == 100 * 1024


def test_a_large_local_array_fits_the_stack(program):
    kernel = program(
        "deep",
        """extern "C" __global__ void deep(int* out) {   // CUDA gives a thread up to 512 KiB
  volatile char local[400 * 1024];
  for (int i = 0; i < 400 * 1024; i += 1024) local[i] = 1;
  out[threadIdx.x] = local[0] + local[399 * 1024];
}""",
    )
    out = np.zeros(64, np.int32)
    kernel((1,), (64,), out=out)
    assert (out == 2).all()


def test_relative_folders_work(tmp_path, monkeypatch):
    import shutil

    from cupaged.runtime import kernels_folder

    shutil.copytree(kernels_folder(), tmp_path / "my_kernels")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUPAGED_CACHE_DIR", "my_cache")
    monkeypatch.setenv("CUPAGED_KERNELS", "my_kernels")
    data, combined = np.arange(8, dtype=np.uint32), np.zeros(1, np.uint32)
    kernel = load_kernel("bench/read_stream.cu", "read_stream", backend="host")
    kernel((1,), (32,), combined=combined, data=data, vectors=2)
    assert combined[0] == np.bitwise_xor.reduce(data)
    assert list((tmp_path / "my_cache" / "host").glob("read_stream-*.so"))


def test_the_sanitizers_without_their_library_are_refused(program, monkeypatch):
    monkeypatch.setenv("CUPAGED_HOST_SANITIZE", "1")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    with pytest.raises(pg.BackendUnavailableError, match="CUPAGED_HOST_SANITIZE needs the sanitizer's library"):
        program("unbuilt", 'extern "C" __global__ void unbuilt(int* out) {}').build()
