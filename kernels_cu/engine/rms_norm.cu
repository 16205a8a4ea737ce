// RMSNorm (Zhang and Sennrich, arXiv 1910.07467) of float32 rows, written in the type that products take: what took eight
// launches as lines of array arithmetic is one.
//
// A block has a row, in vectors of four, and reads it twice, the second time from a cache.
//
// Measured on an H100 (experiments/results/h100-80gb-hbm3/kernel_profile.csv): 6 us for 64 rows of 4096.
//
// Grid:  (rows).    Block: (THREADS).
//
// Defines
//   STORAGE   __half, __nv_bfloat16 or float, of the result
#include "global_memory.cuh"
#include "reduce.cuh"
#include "types.cuh"

constexpr int THREADS = 128;
constexpr int VEC = 4;

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(
    STORAGE* __restrict__ out,           // [rows, vectors * VEC]
    const float* __restrict__ x,         // [rows, vectors * VEC]
    const float* __restrict__ weight,    // [vectors * VEC]
    const int vectors, const float eps) {
  using Loaded = Vector<float, VEC>;
  __shared__ float scratch[THREADS / kWarpSize];
  const long long row = static_cast<long long>(blockIdx.x) * vectors;
  const auto* values = reinterpret_cast<const Loaded*>(x) + row;

  float squares = 0.0f;
  for (int i = threadIdx.x; i < vectors; i += THREADS) {
    const Loaded value = load_global(values + i);
#pragma unroll
    for (int v = 0; v < VEC; ++v) squares += value[v] * value[v];
  }
  squares = block_reduce<Sum, THREADS / kWarpSize>(squares, scratch);
  const float scale = rsqrtf(squares / static_cast<float>(vectors * VEC) + eps);

  for (int i = threadIdx.x; i < vectors; i += THREADS) {
    const Loaded value = load_global(values + i), factor = load_global(reinterpret_cast<const Loaded*>(weight) + i);
    Vector<STORAGE, VEC> normed;
#pragma unroll
    for (int v = 0; v < VEC; ++v) normed.value[v] = from_float<STORAGE>(value[v] * scale * factor[v]);
    reinterpret_cast<Vector<STORAGE, VEC>*>(out)[row + i] = normed;
  }
}
