// Attention over a context, from that over its disjoint parts: each part's output counts by exp(lse - the whole's lse).
// Parts may be stretches of one sequence (split-KV), a shared prefix and its continuations, or what several GPUs hold.
//
// A thread takes a 16-byte vector of the output through all parts. A part over nothing has log-sum-exp -inf and is not
// read. A sink belongs to one part only: as a part of its own it has output 0 and its logit as log-sum-exp.
//
// Not measured by itself: it moves a few bytes beside those of the parts' attention.
//
// Grid:  16-byte vectors of the output.    Block: (THREADS).
//
// Defines
//   STORAGE   __half, __nv_bfloat16 or float
#include "global_memory.cuh"
#include "softmax.cuh"
#include "types.cuh"

constexpr int THREADS = 256;
constexpr int VEC = kValuesPer16Bytes<STORAGE>;
using Share = Vector<STORAGE, VEC>;

// A part's log-sum-exp in units of log 2; -infinity for a part over nothing.
__device__ __forceinline__ float log_sum_exp_2(float lse) {
  return lse == minus_infinity() ? lse : saturated(lse * kLog2E);
}

extern "C" __global__ void __launch_bounds__(THREADS) merge_states(
    STORAGE* __restrict__ out,         // [rows, vectors * VEC]
    float* __restrict__ lse,           // [rows]
    const STORAGE* __restrict__ outs,  // [parts, rows, vectors * VEC]
    const float* __restrict__ lses,    // [parts, rows], natural logarithms
    const int parts, const long long rows, const int vectors) {
  const long long index = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
  if (index >= rows * vectors) return;
  const long long row = index / vectors;

  SoftmaxState softmax;
  for (int part = 0; part < parts; ++part) softmax.max = fmaxf(softmax.max, log_sum_exp_2(load_global(lses + part * rows + row)));

  float sum[VEC] = {};
  for (int part = 0; part < parts; ++part) {
    const float of_part = log_sum_exp_2(load_global(lses + part * rows + row));
    const auto* address = reinterpret_cast<const Share*>(outs) + part * rows * vectors + index;
    const Share value = load_global_if(of_part != minus_infinity(), address);
    const float weight = softmax_weight(of_part, softmax.max);
    softmax.sum += weight;
#pragma unroll
    for (int v = 0; v < VEC; ++v) sum[v] += weight * to_float(value.value[v]);
  }

  Share merged;
#pragma unroll
  for (int v = 0; v < VEC; ++v) merged.value[v] = from_float<STORAGE>(sum[v] * softmax.normaliser());
  reinterpret_cast<Share*>(out)[index] = merged;
  if (index % vectors == 0) lse[row] = softmax.log_sum_exp();
}
