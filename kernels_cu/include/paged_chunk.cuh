// 16 tokens of a paged sequence, copied to shared memory for AttentionTile.
#pragma once

#include "async_copy.cuh"
#include "attention_tile.cuh"
#include "paged_kv.cuh"

template <typename T, int HeadDim, int BlockSize>
struct __align__(128) PagedChunk {   // whole lines, so that no sector is torn apart
  static constexpr int VEC = kValuesPer16Bytes<T>;
  static constexpr int VECTORS = HeadDim / VEC;   // in a token's row

  T key[CHUNK * HeadDim], value[CHUNK * HeadDim];

  // Start this warp's copies. `block_of(row)` is the block of the chunk's token `row`, asked for by all lanes together;
  // where it is kUnmapped the row becomes zeros: what lies in a slot without a token may be NaN.
  template <typename BlockOf>
  __device__ __forceinline__ void start_copy(const T* key_cache, const KvStrides<HeadDim>& key_strides,
                                             const T* value_cache, const KvStrides<HeadDim>& value_strides,
                                             int kv_head, int first_token, BlockOf block_of) {
#pragma unroll 4   // no further: the places of all vectors do not fit the registers
    for (int i = 0; i < CHUNK * VECTORS / kWarpSize; ++i) {
      const int index = i * kWarpSize + threadIdx.x % kWarpSize, row = index / VECTORS, vector = index % VECTORS;
      const int slot = static_cast<unsigned>(first_token + row) % BlockSize, dim = vector * VEC;
      const int found = block_of(row), block_id = found == kUnmapped ? 0 : found;
      const int place = AttentionTile<T, HeadDim, 8>::place_of(row, vector);   // the same for any number of rows
      const bool there = found != kUnmapped;
      start_copy_16_once(key + place, key_cache + key_strides.offset(block_id, kv_head, slot, dim), there);
      start_copy_16_once(value + place, value_cache + value_strides.offset(block_id, kv_head, slot, dim), there);
    }
  }

  // Once used, its memory takes 16 rows of a warp's result.
  __device__ __forceinline__ float* as_result() { return reinterpret_cast<float*>(key); }
};
