// Rows of 16-byte vectors in shared memory, one behind the other: vectors of a row change places so that 8 neighbouring
// rows' vectors of one index lie in different banks, without padding. A row that began within a 32-byte sector would tear
// sectors of global memory apart, and each be fetched twice.
#pragma once

#include "types.cuh"

template <typename T, int HeadDim>
struct SwizzledRows {
  static constexpr int VEC = kValuesPer16Bytes<T>;
  static constexpr int VECTORS = HeadDim / VEC;
  static constexpr int SWAPS = VECTORS % 8 == 0 ? 8 : VECTORS % 4 == 0 ? 4 : 2;   // vectors that may change places

  static __device__ __forceinline__ int swap_of(int row) { return row / (8 / SWAPS) % SWAPS; }

  // Where a row has its vector `index`, in elements.
  static __device__ __forceinline__ int place_of(int row, int index) { return row * HeadDim + (index ^ swap_of(row)) * VEC; }

  // A lane's way through 8-row matrices: it stands at a row and, of each two vectors, at one. Where it looks is known to
  // the compiler but for a few addresses: vectors that change places among as many.
  struct Walk {
    const T* start[SWAPS / 2];

    __device__ __forceinline__ Walk(const T* rows, int row, int of_two) {
#pragma unroll
      for (int two = 0; two < SWAPS / 2; ++two) start[two] = rows + row * HeadDim + ((2 * two) ^ of_two ^ swap_of(row)) * VEC;
    }
    // `rows_on`, a multiple of 8, rows down; of vectors 2 * two and 2 * two + 1.
    __device__ __forceinline__ const T* at(int rows_on, int two) const {
      return start[two % (SWAPS / 2)] + (rows_on * HeadDim + two / (SWAPS / 2) * SWAPS * VEC);
    }
  };
};
