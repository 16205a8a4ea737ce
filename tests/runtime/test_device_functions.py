"""Functions that several kernels share, by themselves: the same on the host and on the GPU."""

import numpy as np
import pytest

from tests.kit.compare import to_numpy
from tests.kit.programs import kernel_from_text

SUMS = """
#include "reduce.cuh"
using Sums = ScatteredSums<LANES, COUNT>;
extern "C" __global__ void scattered_sums(const float* parts,   // [32, COUNT]
                                          float* kept,          // [32, Sums::KEPT]
                                          int* index,           // likewise: which of the sums it is
                                          int* first,           // [32]
                                          float* gathered) {    // [32, COUNT]
  float part[COUNT];
  for (int n = 0; n < COUNT; ++n) part[n] = parts[threadIdx.x * COUNT + n];
  const Sums sums(part);
  for (int i = 0; i < Sums::KEPT; ++i) {
    kept[threadIdx.x * Sums::KEPT + i] = sums.kept[i];
    index[threadIdx.x * Sums::KEPT + i] = Sums::index(i);
  }
  first[threadIdx.x] = Sums::is_first();
  for (int n = 0; n < COUNT; ++n) gathered[threadIdx.x * COUNT + n] = sums.gathered(n);
}"""


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 8, 16])
def test_scattered_sums(lanes, count, tmp_path, backend, xp):
    """Every sum is kept by one group of neighbours, and every lane can ask for any of its own group's."""
    kernel = kernel_from_text(tmp_path, SUMS, "scattered_sums", backend, {"LANES": lanes, "COUNT": count})
    parts = np.random.default_rng(0).integers(-99, 99, (32, count)).astype(np.float32)  # whose sums are exact
    kept_by_lane = max(1, 2 ** int(np.ceil(np.log2(count))) // lanes)
    kept, index, first, gathered = (
        xp.full(shape, -1, dtype=dtype)
        for shape, dtype in (((32, kept_by_lane), np.float32), ((32, kept_by_lane), np.int32), (32, np.int32),
                             ((32, count), np.float32))
    )  # fmt: skip
    kernel((1,), (32,), parts=xp.asarray(parts), kept=kept, index=index, first=first, gathered=gathered)
    kept, index, first, gathered = (to_numpy(array) for array in (kept, index, first, gathered))
    sums = np.repeat(parts.reshape(32 // lanes, lanes, count).sum(axis=1), lanes, axis=0)  # of a lane's group
    np.testing.assert_array_equal(gathered, sums)
    for lane in range(32):
        own = index[lane] < count
        np.testing.assert_array_equal(kept[lane][own], sums[lane][index[lane][own]])
    for group in range(0, 32, lanes):
        written = [n for lane in range(group, group + lanes) if first[lane] for n in index[lane] if n < count]
        assert sorted(written) == list(range(count))


SOFT_CAP = """
#include "soft_cap.cuh"
extern "C" __global__ void capped(const float* values, float* out, const float cap, const int count) {   // [count]
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = soft_capped(values[i], cap);
}"""


@pytest.mark.parametrize("cap", [1e-30, 0.5, 50.0, 1e4, 1e30])
def test_a_soft_cap_is_right_to_units_in_the_last_place(cap, tmp_path, backend, xp):
    """From far below the cap, where it hardly changes a logit, to far above it, and on both sides of where its two
    formulas meet."""
    ratios = np.concatenate([np.logspace(-7, 2, 60_001), np.linspace(0.5, 0.7, 20_001), [0.0, 1e8]])
    values = (cap * np.concatenate([ratios, -ratios])).astype(np.float32)
    out = xp.zeros(values.size, dtype=xp.float32)
    kernel = kernel_from_text(tmp_path, SOFT_CAP, "capped", backend)
    kernel((-(-values.size // 256),), (256,), values=xp.asarray(values), out=out, cap=cap, count=values.size)
    cap = float(np.float32(cap))
    expected = cap * np.tanh(values.astype(np.float64) / cap)
    units = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    assert (np.abs(to_numpy(out) - expected) <= 4 * units).all()


def test_a_soft_cap_of_what_is_no_number(tmp_path, backend, xp):
    values = np.float32([np.inf, -np.inf, np.nan])
    out = xp.zeros(3, dtype=xp.float32)
    kernel = kernel_from_text(tmp_path, SOFT_CAP, "capped", backend)
    kernel((1,), (32,), values=xp.asarray(values), out=out, cap=3.0, count=3)
    np.testing.assert_array_equal(to_numpy(out), [3, -3, np.nan])
