// A 16-byte vector of a token's row, stored to a cache: at once where a layout keeps it together, else one element at a
// time (values in BHDSX).
#pragma once

#include "paged_kv.cuh"
#include "types.cuh"

template <typename T, int Pack>
__device__ __forceinline__ void store_vector(T* cache, const KvStrides<Pack>& strides, int block_id, int kv_head, int slot,
                                             int dim, const Vector<T, kValuesPer16Bytes<T>>& vector) {
  constexpr int VEC = kValuesPer16Bytes<T>;
  if constexpr (Pack % VEC == 0) {
    *reinterpret_cast<Vector<T, VEC>*>(cache + strides.offset(block_id, kv_head, slot, dim)) = vector;
  } else {
#pragma unroll
    for (int v = 0; v < VEC; ++v) cache[strides.offset(block_id, kv_head, slot, dim + v)] = vector.value[v];
  }
}
