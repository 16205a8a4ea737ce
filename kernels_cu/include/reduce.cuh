// Sums and maxima over a warp, part of a warp, or a whole block.
#pragma once

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Sum {
  static __device__ __forceinline__ float identity() { return 0.0f; }
  static __device__ __forceinline__ float combine(float a, float b) { return a + b; }
};
struct Max {
  static __device__ __forceinline__ float identity() { return __int_as_float(0xff800000); }   // -infinity
  static __device__ __forceinline__ float combine(float a, float b) { return fmaxf(a, b); }
};

// Combine over lanes whose indices differ only in the bits from `Low` up to, not including, `High` (powers of two).
// Every lane of the warp takes part, and every lane gets its group's result.
template <typename Operation, int Low, int High>
__device__ __forceinline__ float warp_reduce(float value) {
#pragma unroll
  for (int distance = High / 2; distance >= Low; distance /= 2)
    value = Operation::combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

// Combine over all Warps * 32 threads of the block; every thread gets the result. Holds one barrier, after which all
// shared memory written before the call is visible. A call must not reuse the `scratch` [Warps] of the call before it.
template <typename Operation, int Warps>
__device__ __forceinline__ float block_reduce(float value, float* scratch) {
  value = warp_reduce<Operation, 1, kWarpSize>(value);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < Warps; ++warp) value = Operation::combine(value, scratch[warp]);
  return value;
}
