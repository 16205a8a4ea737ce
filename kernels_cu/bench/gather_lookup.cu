// Read rows through a block table and do nothing else: what does a look-up cost where it is made for every element, as
// in a kernel that computes each address from scratch, for every 16-byte vector, or once for a row?
//
// UNIT elements share a look-up. 1 and VEC: a thread takes a unit, looks its block up and loads it. ROW: a warp takes 32
// rows, each lane looks up one of them, and shuffles tell it to the lanes that read the row. The elements are combined by
// exclusive or, so that no load can be left out and the result can be tested.
//
// Measured: at block size 16, a look-up for every element costs 8.5 %, for every vector 0.2 %, for every row 1.0 %
// (experiments/results/h100-80gb-hbm3/paging_overhead.csv).
//
// Grid:  a few thread blocks per SM.    Block: (a multiple of 32).
//
// Defines
//   ROW          elements of 2 bytes in a token's row, a multiple of 256
//   BLOCK_SIZE   tokens per block
//   UNIT         elements that share a look-up: 1, 8 or ROW
#include "global_memory.cuh"
#include "paged_kv.cuh"
#include "reduce.cuh"
#include "types.cuh"

constexpr int VEC = kValuesPer16Bytes<unsigned short>;
static_assert(ROW % (kWarpSize * VEC) == 0, "a warp reads a row in whole 16-byte vectors");
static_assert(UNIT == 1 || UNIT == VEC || UNIT == ROW, "a look-up serves an element, a 16-byte vector or a row");

// A token's row of `data`.
__device__ __forceinline__ const unsigned short* row_of(const unsigned short* data, int block_id, int token) {
  const KvStrides<ROW> strides{BLOCK_SIZE * ROW, 0, ROW, 0};
  return data + strides.offset(block_id, 0, static_cast<unsigned>(token) % BLOCK_SIZE, 0);
}

template <int N>
__device__ __forceinline__ unsigned int fold(const Vector<unsigned short, N>& vector) {
  unsigned int result = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) result ^= vector.value[i];
  return result;
}

#if UNIT < ROW

// A thread takes every `threads`-th unit, eight of them in flight.
__device__ __forceinline__ unsigned int gather(const unsigned short* data, const BlockTable& table, int tokens,
                                               long long thread, long long threads) {
  constexpr int IN_FLIGHT = 8, UNITS = ROW / UNIT;
  unsigned int result = 0;
  for (long long first = thread; first < static_cast<long long>(tokens) * UNITS; first += threads * IN_FLIGHT) {
    Vector<unsigned short, UNIT> value[IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const long long unit = first + i * threads;
      const int token = static_cast<int>(unit / UNITS);
      const int block_id = token < tokens ? table.block(static_cast<unsigned>(token) / BLOCK_SIZE) : kUnmapped;
      const unsigned short* address = row_of(data, block_id, token) + unit % UNITS * UNIT;
      value[i] = load_global_if(block_id != kUnmapped, reinterpret_cast<const Vector<unsigned short, UNIT>*>(address));
    }
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) result ^= fold(value[i]);
  }
  return result;
}

#else

// A warp takes 32 rows at a time; its lanes read a row together.
__device__ __forceinline__ unsigned int gather(const unsigned short* data, const BlockTable& table, int tokens,
                                               long long thread, long long threads) {
  constexpr int VECTORS = ROW / (kWarpSize * VEC);                  // a lane's, of a row
  constexpr int ROWS = VECTORS < 8 && 8 % VECTORS == 0 ? 8 / VECTORS : 1;   // in flight
  const int lane = threadIdx.x % kWarpSize;
  unsigned int result = 0;
  for (long long base = thread - lane; base < tokens; base += threads) {
    const int mine = static_cast<int>(base) + lane;
    const int found = mine < tokens ? table.block(static_cast<unsigned>(mine) / BLOCK_SIZE) : kUnmapped;
    for (int row = 0; row < kWarpSize; row += ROWS) {
      Vector<unsigned short, VEC> value[ROWS * VECTORS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const int block_id = __shfl_sync(kAllLanes, found, row + r);
        const auto* vectors = reinterpret_cast<const Vector<unsigned short, VEC>*>(
            row_of(data, block_id, static_cast<int>(base) + row + r));
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
          value[r * VECTORS + i] = load_global_if(block_id != kUnmapped, vectors + i * kWarpSize + lane);
      }
#pragma unroll
      for (int i = 0; i < ROWS * VECTORS; ++i) result ^= fold(value[i]);
    }
  }
  return result;
}

#endif

extern "C" __global__ void gather_lookup(
    unsigned int* __restrict__ combined,          // [1], combined by exclusive or with what is there
    const unsigned short* __restrict__ data,      // [num_blocks, BLOCK_SIZE, ROW]
    const int* __restrict__ block_table,          // [ceil(tokens / BLOCK_SIZE)], of one sequence, -1 = unmapped
    const int tokens) {
  const BlockTable table(block_table, 0, 0);
  const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
  const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  unsigned int result = gather(data, table, tokens, thread, threads);
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) result ^= __shfl_xor_sync(kAllLanes, result, distance);
  if (threadIdx.x % kWarpSize == 0) atomicXor(combined, result);
}
