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

// The largest power of 2 up to a limit, 1 at least.
__device__ constexpr int largest_power_of_2(int limit) {
  int power = 1;
  while (2 * power <= limit) power *= 2;
  return power;
}

// Sums over each `Lanes` neighbours of a warp, `Count` of them, shared out: as every lane has a part of every sum, it hands
// half of its parts over in each step and keeps the other half. For 8 sums over 8 lanes, 7 shuffles instead of 24.
template <int Lanes, int Count>
struct ScatteredSums {
  static_assert(Lanes == largest_power_of_2(Lanes) && Lanes <= kWarpSize, "");
  static constexpr int PADDED = Count == 1 ? 1 : 2 * largest_power_of_2(Count - 1);   // with zeros, to a power of 2
  static constexpr int KEPT = PADDED > Lanes ? PADDED / Lanes : 1;     // sums that a lane keeps
  static constexpr int COPIES = Lanes > PADDED ? Lanes / PADDED : 1;   // neighbours that keep the same
  float kept[KEPT];

  // Every lane of the warp takes part, with its part of each sum.
  __device__ __forceinline__ explicit ScatteredSums(const float (&part)[Count]) {
    float value[PADDED] = {};
#pragma unroll
    for (int i = 0; i < Count; ++i) value[i] = part[i];
    int left = PADDED;
#pragma unroll
    for (int distance = Lanes / 2; distance > 0; distance /= 2) {
      if (left == 1) {
        value[0] += __shfl_xor_sync(kAllLanes, value[0], distance);
        continue;
      }
      left /= 2;
      const bool upper = (threadIdx.x & distance) != 0;
#pragma unroll
      for (int i = 0; i < left; ++i) {
        const float own = upper ? value[i + left] : value[i], handed = upper ? value[i] : value[i + left];
        value[i] = own + __shfl_xor_sync(kAllLanes, handed, distance);
      }
    }
#pragma unroll
    for (int i = 0; i < KEPT; ++i) kept[i] = value[i];
  }

  // Which of the sums this lane's i-th is; `Count` or more for none.
  static __device__ __forceinline__ int index(int i) { return threadIdx.x % Lanes / COPIES * KEPT + i; }
  // Whether this lane is the first that keeps its sums.
  static __device__ __forceinline__ bool is_first() { return threadIdx.x % COPIES == 0; }
  // The n-th, from the lane that keeps it. Every lane of the warp takes part.
  __device__ __forceinline__ float gathered(int n) const {
    return __shfl_sync(kAllLanes, kept[n % KEPT], n / KEPT * COPIES, Lanes);
  }
};

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
