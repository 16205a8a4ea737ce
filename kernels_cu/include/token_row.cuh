// A token's row of keys or values, read by neighbouring lanes in 16-byte vectors, and the block that holds a token.
#pragma once

#include "global_memory.cuh"
#include "paged_kv.cuh"
#include "reduce.cuh"
#include "types.cuh"

// The tokens of a sequence before `end`, by its row of the block tables.
template <int BlockSize>
struct Context {
  const int* block_table;   // [max_blocks]
  int end;

  // The block that holds a token; none past the end.
  __device__ __forceinline__ int block_of(int token) const {
    return token < end ? load_global(block_table + static_cast<unsigned>(token) / BlockSize) : kUnmapped;
  }
  static __device__ __forceinline__ int slot_of(int token) { return static_cast<unsigned>(token) % BlockSize; }
};

// How many lanes read a row together, as a rule: as few as leave each of them two vectors.
__device__ constexpr int lanes_of_row(int vectors) { return largest_power_of_2(vectors - 1); }

// One lane's share of a row of HeadDim values.
template <typename T, int HeadDim, int Lanes = lanes_of_row(HeadDim / kValuesPer16Bytes<T>)>
struct TokenRow {
  static constexpr int VEC = kValuesPer16Bytes<T>;
  static constexpr int VECTORS = HeadDim / VEC;
  static constexpr int LANES = Lanes;                             // neighbours, the first at a multiple of LANES
  static constexpr int COUNT = (VECTORS + LANES - 1) / LANES;     // vectors in a share
  static constexpr int SHARE = COUNT * VEC;                       // values in a share
  static constexpr int PADDED_DIM = LANES * SHARE;                // values in all shares: a few more than HeadDim for some
  static_assert(HeadDim % VEC == 0 && LANES < VECTORS && LANES <= kWarpSize && PADDED_DIM >= HeadDim, "");

  Vector<T, VEC> vector[COUNT];

  // Which of the row's vectors is the share's i-th, and whether the row has that many.
  static __device__ __forceinline__ int vector_index(int i) { return i * LANES + threadIdx.x % LANES; }
  static __device__ __forceinline__ bool owns(int i) { return VECTORS % LANES == 0 || vector_index(i) < VECTORS; }

  // The dimension of the share's i-th value; HeadDim or more where the row has ended.
  static __device__ __forceinline__ int dimension(int i) { return vector_index(i / VEC) * VEC + i % VEC; }

  // Read the share of a token's row, or zeros where there is none: what is in a slot without a token may be NaN.
  // Where a row's dimensions are no neighbours (values in BHDSX) they are read one by one.
  template <int Pack>
  __device__ __forceinline__ void load(const T* cache, const KvStrides<Pack>& strides, int block_id, int kv_head,
                                       int slot) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int dim = dimension(i * VEC);
      const bool wanted = block_id != kUnmapped && owns(i);
      if constexpr (Pack % VEC == 0) {
        const T* address = cache + strides.offset(block_id, kv_head, slot, dim);
        vector[i] = load_global_if(wanted, reinterpret_cast<const Vector<T, VEC>*>(address));
      } else {
#pragma unroll
        for (int v = 0; v < VEC; ++v)
          vector[i].value[v] = load_global_if(wanted, cache + strides.offset(block_id, kv_head, slot, dim + v));
      }
    }
  }

  // The same from a row that lies by itself, [HeadDim].
  __device__ __forceinline__ void load(const T* row, bool wanted) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int dim = dimension(i * VEC);
      vector[i] = load_global_if(wanted && owns(i), reinterpret_cast<const Vector<T, VEC>*>(row + dim));
    }
  }

  // The share of a query, [HeadDim], times `factor`.
  static __device__ __forceinline__ void load_query(float (&share)[SHARE], const T* query, float factor) {
    TokenRow row;
    row.load(query, true);
#pragma unroll
    for (int i = 0; i < SHARE; ++i) share[i] = row[i] * factor;
  }

  // The share's i-th value.
  __device__ __forceinline__ float operator[](int i) const { return to_float(vector[i / VEC].value[i % VEC]); }

  // This lane's part of the product with a query's row, of which it has the same share.
  __device__ __forceinline__ float part_of_dot(const float (&query)[SHARE]) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < SHARE; ++i) sum += query[i] * (*this)[i];
    return sum;
  }
  // The product; every lane of the row gets it. The whole warp takes part.
  __device__ __forceinline__ float dot(const float (&query)[SHARE]) const {
    return warp_reduce<Sum, 1, LANES>(part_of_dot(query));
  }
};
