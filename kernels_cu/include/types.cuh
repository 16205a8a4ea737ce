// Storage types and the float that all arithmetic runs in; vectors that one instruction moves; indices.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) { return value; }
template <>
__device__ __forceinline__ __half from_float<__half>(float value) { return __float2half(value); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16(value); }

__device__ __forceinline__ bool in_range(int index, int count) { return 0 <= index && index < count; }

// N neighbouring values, aligned so that they travel in one instruction.
template <typename T, int N>
struct __align__(sizeof(T) * N) Vector {
  static_assert((N & (N - 1)) == 0 && sizeof(T) * N <= 16, "one instruction moves 1, 2, 4, 8 or 16 bytes");
  T value[N];

  __device__ __forceinline__ const T& operator[](int i) const { return value[i]; }
};

// How many values of type T fill the widest load, 16 bytes.
template <typename T>
constexpr int kValuesPer16Bytes = 16 / static_cast<int>(sizeof(T));
