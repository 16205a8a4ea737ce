// Tensor cores, one warp at a time: multiply a 16 × 16 tile by a 16 × 8 tile into a 16 × 8 tile of floats (PTX mma.m16n8k16),
// and read tiles from shared memory in the order that it wants them (PTX ldmatrix). sm_80 and later.
//
// Lane l holds of the left tile rows l/4 and l/4 + 8, columns 2(l%4) and its neighbour, and the same 8 columns on; of
// the right tile rows 2(l%4) and its neighbour, and the same 8 rows on, column l/4; of the result rows l/4 and l/4 + 8,
// columns 2(l%4) and its neighbour. Pairs of 16-bit values share a register, the lower index in the lower half.
#ifndef CUPAGED_MMA_CUH   // the host build has included its twin by now
#define CUPAGED_MMA_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

struct LeftTile {
  unsigned int pair[4];   // (row, columns), (row + 8, columns), (row, columns + 8), (row + 8, columns + 8)
};
struct RightTile {
  unsigned int pair[2];   // (rows, column), (rows + 8, column)
};
struct ResultTile {
  float value[4];         // (row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1)
};

__device__ __forceinline__ void multiply_add(ResultTile& sum, const LeftTile& a, const RightTile& b, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum.value[0]), "+f"(sum.value[1]), "+f"(sum.value[2]), "+f"(sum.value[3])
      : "r"(a.pair[0]), "r"(a.pair[1]), "r"(a.pair[2]), "r"(a.pair[3]), "r"(b.pair[0]), "r"(b.pair[1]));
}
__device__ __forceinline__ void multiply_add(ResultTile& sum, const LeftTile& a, const RightTile& b, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum.value[0]), "+f"(sum.value[1]), "+f"(sum.value[2]), "+f"(sum.value[3])
      : "r"(a.pair[0]), "r"(a.pair[1]), "r"(a.pair[2]), "r"(a.pair[3]), "r"(b.pair[0]), "r"(b.pair[1]));
}

// Four 8 × 8 matrices of 16-bit values: lane l names the 16 bytes of row l % 8 of matrix l / 8, and gets of each matrix
// row l/4, columns 2(l%4) and its neighbour.
__device__ __forceinline__ void load_matrices(unsigned int (&pair)[4], const void* row) {
  const unsigned int address = static_cast<unsigned int>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(pair[0]), "=r"(pair[1]), "=r"(pair[2]), "=r"(pair[3])
               : "r"(address)
               : "memory");
}
// The same, each matrix transposed: lane l gets rows 2(l%4) and its neighbour of column l/4.
__device__ __forceinline__ void load_matrices_transposed(unsigned int (&pair)[4], const void* row) {
  const unsigned int address = static_cast<unsigned int>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(pair[0]), "=r"(pair[1]), "=r"(pair[2]), "=r"(pair[3])
               : "r"(address)
               : "memory");
}

// Two floats as a pair of 16-bit values, the first in the lower half.
__device__ __forceinline__ unsigned int pack_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const unsigned int&>(pair);
}
__device__ __forceinline__ unsigned int pack_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const unsigned int&>(pair);
}

#endif
