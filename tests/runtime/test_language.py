"""The CUDA language means the same on the host as on the GPU: each test runs the same kernel on both."""

import numpy as np
import pytest

from tests.kit.compare import to_numpy
from tests.kit.programs import kernel_from_text

INCLUDES = '#include "types.cuh"\n#include "reduce.cuh"\n#include "global_memory.cuh"\n'


@pytest.fixture
def program(tmp_path, backend):
    def build(entry, text, **defines):
        return kernel_from_text(tmp_path, INCLUDES + text, entry, backend, defines)

    return build


def test_indices(program, xp):
    kernel = program(
        "indices",
        """
extern "C" __global__ void indices(int* out) {   // [threads of the grid, 12]
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int* row = out + 12 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  const unsigned values[12] = {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z,
                               gridDim.x, gridDim.y, gridDim.z, blockDim.x, blockDim.y, blockDim.z};
  for (int i = 0; i < 12; ++i) row[i] = static_cast<int>(values[i]);
}""",
    )
    grid, block = (3, 2, 2), (5, 3, 2)
    out = xp.full((12 * 30, 12), -1, dtype=xp.int32)
    kernel(grid, block, out=out)
    expected = [(bx, by, bz, tx, ty, tz, *grid, *block)
                for bz in range(2) for by in range(2) for bx in range(3)
                for tz in range(2) for ty in range(3) for tx in range(5)]  # fmt: skip
    np.testing.assert_array_equal(to_numpy(out), expected)


SHUFFLES = """
extern "C" __global__ void shuffles(int* out) {   // [5, 64]
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(kAllLanes, 10 * lane, 3);
  out[64 + lane] = __shfl_xor_sync(kAllLanes, lane, 5);
  out[128 + lane] = __shfl_up_sync(kAllLanes, lane, 2, 8);
  out[192 + lane] = __shfl_down_sync(kAllLanes, lane, 3, 16);
  out[256 + lane] = static_cast<int>(__shfl_xor_sync(kAllLanes, 1000000000000ll + lane, 1) - 1000000000000ll);
}"""


def test_shuffles(program, xp):
    out = xp.zeros((5, 64), dtype=xp.int32)
    program("shuffles", SHUFFLES)((1,), (64,), out=out)
    lane = np.arange(64)
    np.testing.assert_array_equal(
        to_numpy(out),
        [
            10 * (3 + lane // 32 * 32),
            lane ^ 5,
            np.where(lane % 8 >= 2, lane - 2, lane),
            np.where(lane % 16 + 3 < 16, lane + 3, lane),
            lane ^ 1,
        ],
    )


def test_votes_and_partial_masks(program, xp):
    kernel = program(
        "votes",
        """
extern "C" __global__ void votes(unsigned int* out) {   // [5, 32]
  const int lane = threadIdx.x;
  out[lane] = __ballot_sync(kAllLanes, lane % 3 == 0);
  out[32 + lane] = __any_sync(kAllLanes, lane == 31);
  out[64 + lane] = __all_sync(kAllLanes, lane < 31);
  if (lane < 8) out[96 + lane] = __ballot_sync(0xffu, lane > 4);
  else out[96 + lane] = __shfl_sync(0xffffff00u, lane, 20);
  __syncwarp();
  out[128 + lane] = __popc(out[lane]);
}""",
    )
    out = xp.zeros((5, 32), dtype=xp.uint32)
    kernel((1,), (32,), out=out)
    ballot = sum(1 << lane for lane in range(0, 32, 3))
    np.testing.assert_array_equal(
        to_numpy(out), [[ballot] * 32, [1] * 32, [0] * 32, [0b11100000] * 8 + [20] * 24, [11] * 32]
    )


def test_block_votes_and_reductions(program, xp):
    kernel = program(
        "reductions",
        """
extern "C" __global__ void reductions(float* out) {   // [4, 128]
  __shared__ float sums[4], maxima[4];
  const int t = threadIdx.x;
  out[t] = block_reduce<Sum, 4>(static_cast<float>(t), sums);
  out[128 + t] = block_reduce<Max, 4>(static_cast<float>((t * 37) % 128), maxima);
  out[256 + t] = warp_reduce<Sum, 8, 32>(static_cast<float>(t % 32));
  out[384 + t] = static_cast<float>(__syncthreads_count(t % 5 == 0));
}""",
    )
    out = xp.zeros((4, 128), dtype=xp.float32)
    kernel((1,), (128,), out=out)
    lane = np.arange(128) % 32
    np.testing.assert_array_equal(to_numpy(out), [[128 * 127 / 2] * 128, [127] * 128, 4 * (lane % 8) + 48, [26] * 128])


def test_shared_memory_static_and_dynamic(program, xp):
    kernel = program(
        "reversal",
        """
extern "C" __global__ void reversal(int* data) {   // [blocks, 96]
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  __shared__ int fixed[96];
  int* flexible = reinterpret_cast<int*>(dynamic_shared);
  int* row = data + 96 * blockIdx.x;
  fixed[threadIdx.x] = row[threadIdx.x];
  __syncthreads();
  flexible[threadIdx.x] = fixed[95 - threadIdx.x];
  __syncthreads();
  row[95 - threadIdx.x] = flexible[95 - threadIdx.x] + 1000 * blockIdx.x;
}""",
    )
    data = xp.arange(5 * 96, dtype=xp.int32).reshape(5, 96)
    expected = to_numpy(data)[:, ::-1] + 1000 * np.arange(5)[:, None]
    kernel((5,), (96,), shared_bytes=96 * 4, data=data)
    np.testing.assert_array_equal(to_numpy(data), expected)


def test_more_than_48_kib_of_shared_memory(program, xp):
    kernel = program(
        "large",
        """
extern "C" __global__ void large(int* out, const int words) {   // [1]
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  int* data = reinterpret_cast<int*>(dynamic_shared);
  for (int i = threadIdx.x; i < words; i += blockDim.x) data[i] = i;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = data[words - 1];
}""",
    )
    for kib in (40, 64, 90, 50):
        out = xp.zeros(1, dtype=xp.int32)
        kernel((1,), (64,), shared_bytes=kib * 1024, out=out, words=kib * 256)
        assert int(out[0]) == kib * 256 - 1


def test_atomics(program, xp):
    kernel = program(
        "atomics",
        """
extern "C" __global__ void atomics(int* counts, float* total, unsigned int* ticket) {   // [6], [1], [1]
  atomicAdd(counts, 1);
  atomicMax(counts + 1, static_cast<int>(threadIdx.x));
  atomicMin(counts + 2, -static_cast<int>(blockIdx.x));
  atomicOr(counts + 3, 1 << (threadIdx.x % 8));
  atomicXor(counts + 4, 3);
  if (atomicCAS(counts + 5, 0, 1) == 0) atomicExch(counts + 5, 2);
  atomicAdd(total, 0.5f);
  atomicInc(ticket, 99u);
}""",
    )
    counts, total, ticket = xp.zeros(6, xp.int32), xp.zeros(1, xp.float32), xp.zeros(1, xp.uint32)
    kernel((50,), (64,), counts=counts, total=total, ticket=ticket)
    np.testing.assert_array_equal(to_numpy(counts), [3200, 63, -49, 255, 0, 2])
    assert float(total[0]) == 1600
    assert int(ticket[0]) == 3200 % 100


def test_last_block_to_finish(program, xp):
    """The pattern of a reduce in the same launch: a fence, a ticket, and the last block reads what all others wrote."""
    kernel = program(
        "last_block",
        """
extern "C" __global__ void last_block(int* partial, unsigned int* ticket, int* total) {   // [blocks], [1], [1]
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = blockIdx.x + 1;
    __threadfence();
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  int sum = 0;
  for (int i = threadIdx.x; i < gridDim.x; i += 32) sum += *const_cast<volatile int*>(partial + i);
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (threadIdx.x == 0) *total = sum;
}""",
    )
    partial, ticket, total = xp.zeros(200, xp.int32), xp.zeros(1, xp.uint32), xp.zeros(1, xp.int32)
    for _ in range(3):
        kernel((200,), (32,), partial=partial, ticket=ticket, total=total)
        assert int(total[0]) == 200 * 201 // 2


HALF_KERNEL = """
extern "C" __global__ void round_trip(STORAGE* rounded, float* widened, const float* values, const STORAGE* stored,
                                      const int count) {   // [count] each
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  rounded[i] = from_float<STORAGE>(values[i]);
  widened[i] = to_float(stored[i]);
}"""


@pytest.mark.parametrize(("c_type", "name"), [("__half", "float16"), ("__nv_bfloat16", "bfloat16")])
def test_every_16_bit_value_and_every_rounding(program, xp, c_type, name):
    """All 65,536 values widen as NumPy widens them; floats at, next to and between them round as NumPy rounds."""
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    stored = np.arange(65536, dtype=np.uint16).view(dtype)
    exact = stored.astype(np.float32)
    finite = np.sort(exact[np.isfinite(exact)])
    halfway = (finite[1:].astype(np.float64) + finite[:-1]) / 2
    middle = halfway.astype(np.float32)
    candidates = np.concatenate([exact, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf),
                                 np.float32([3e38, -3e38, 1e-45, 65519.996, 65520, np.inf])])  # fmt: skip
    values = np.resize(candidates, 65536 * 5).astype(np.float32)
    kernel = program("round_trip", HALF_KERNEL, STORAGE=c_type)
    count = values.size
    rounded = xp.zeros(count, dtype=dtype)
    widened = xp.zeros(count, dtype=xp.float32)
    kernel((-(-count // 256),), (256,), rounded=rounded, widened=widened, values=xp.asarray(values),
           stored=xp.asarray(np.resize(stored, count)), count=count)  # fmt: skip
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(dtype)
    nan = np.isnan(values)
    np.testing.assert_array_equal(to_numpy(rounded).view(np.uint16)[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(to_numpy(rounded)[nan].astype(np.float32)).all()
    np.testing.assert_array_equal(to_numpy(widened)[:65536], exact)


@pytest.mark.parametrize(("in_flight", "blocks", "streaming"), [(2, 3, 0), (4, 1, 1), (8, 100, 0)])
def test_copying_a_whole_array_and_no_more(in_flight, blocks, streaming, xp, backend):
    """The kernel that measures the copy ceiling copies every word, in any shape, and none behind the last."""
    from cupaged.runtime import load_kernel

    source = xp.asarray(np.random.default_rng(0).integers(1, 2**32, size=4 * 5010, dtype=np.uint32))
    target = xp.zeros_like(source)
    load_kernel("bench/copy_stream.cu", "copy_stream", {"IN_FLIGHT": in_flight, "STREAMING": streaming}, backend)(
        (blocks,), (64,), **{"to": target, "from": source}, vectors=5003
    )
    np.testing.assert_array_equal(to_numpy(target[: 4 * 5003]), to_numpy(source[: 4 * 5003]))
    assert not to_numpy(target[4 * 5003 :]).any()


def test_reading_a_whole_array(xp, backend):
    """The kernel that measures the read ceiling reads every word."""
    from cupaged.runtime import load_kernel

    data = xp.asarray(np.random.default_rng(0).integers(0, 2**32, size=4 * 5003, dtype=np.uint32))
    combined = xp.zeros(1, dtype=xp.uint32)
    load_kernel("bench/read_stream.cu", "read_stream", backend=backend)(
        (3,), (64,), combined=combined, data=data, vectors=5003
    )
    assert int(combined[0]) == int(np.bitwise_xor.reduce(to_numpy(data)))
