// SwiGLU (Shazeer, arXiv 2002.05202): silu(gate) * up, of gates and ups that one product left side by side in a row.
//
// A thread has a 16-byte vector of the result. Nothing is rounded in between.
//
// Measured on an H100 (experiments/results/h100-80gb-hbm3/kernel_profile.csv): 7 us for 64 rows of 2 * 16384.
//
// Grid:  16-byte vectors of the result.    Block: (THREADS).
//
// Defines
//   STORAGE   __half, __nv_bfloat16 or float
#include "global_memory.cuh"
#include "types.cuh"

constexpr int THREADS = 256;
constexpr int VEC = kValuesPer16Bytes<STORAGE>;
using Share = Vector<STORAGE, VEC>;

extern "C" __global__ void __launch_bounds__(THREADS) swiglu(
    STORAGE* __restrict__ out,             // [rows, vectors * VEC]
    const STORAGE* __restrict__ gate_up,   // [rows, 2, vectors * VEC]
    const long long rows, const int vectors) {
  const long long index = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
  if (index >= rows * vectors) return;
  const long long row = index / vectors, column = index % vectors;
  const auto* gates = reinterpret_cast<const Share*>(gate_up) + 2 * row * vectors + column;
  const Share gate = load_global(gates), up = load_global(gates + vectors);

  Share result;
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    const float x = to_float(gate[v]);
    result.value[v] = from_float<STORAGE>(x / (1.0f + expf(-x)) * to_float(up[v]));
  }
  reinterpret_cast<Share*>(out)[index] = result;
}
