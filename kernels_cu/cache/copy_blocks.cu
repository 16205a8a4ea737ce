// Copy whole blocks: within a cache (copy-on-write), to an array where they lie one behind the other (gather), or back
// from one (scatter). Which it is, the lists of ids and the strides say: a block's memory is a number of runs, of the
// same distance from each other (one run a KV head in HBSD, else one).
//
// A thread moves VECTORS vectors of 16 bytes, all on their way before the first is stored.
//
// Measured on an H100 (experiments/results/h100-80gb-hbm3/cache_ops.csv), from 64 MB on: 92 to 96 % of a copy's
// speed, in any layout.
//
// Grid:  (blocks * runs * chunks, arrays), chunk fastest; a chunk is THREADS * VECTORS vectors.    Block: (THREADS).
#include "global_memory.cuh"
#include "types.cuh"

constexpr int THREADS = 256;
constexpr int VECTORS = 4;
using Bytes16 = Vector<int, 4>;

// An array of blocks: keys, or values, or both. Strides count vectors.
struct Blocks {
  const int* ids;   // [blocks], id_stride apart, or null: block i is the i-th
  int id_stride;
  long long block_stride, run_stride;

  __device__ __forceinline__ long long start(int block, int run) const {
    const long long id = ids == nullptr ? block : load_global(ids + static_cast<long long>(block) * id_stride);
    return id * block_stride + run * run_stride;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS) copy_blocks(
    int* first_to, int* second_to,                 // of each array; the second is null if there is one
    const int* first_from, const int* second_from,
    const int* __restrict__ to_ids,                // [blocks], id_stride apart, or null
    const int* __restrict__ from_ids,              // [blocks], id_stride apart, or null
    const int id_stride,
    const long long to_block_stride, const long long to_run_stride,
    const long long from_block_stride, const long long from_run_stride,
    const int runs, const long long run_vectors, const int chunks) {
  const int chunk = blockIdx.x % chunks, piece = blockIdx.x / chunks, run = piece % runs, block = piece / runs;
  const Blocks to{to_ids, id_stride, to_block_stride, to_run_stride};
  const Blocks from{from_ids, id_stride, from_block_stride, from_run_stride};
  auto* target = reinterpret_cast<Bytes16*>(blockIdx.y == 0 ? first_to : second_to) + to.start(block, run);
  const auto* source = reinterpret_cast<const Bytes16*>(blockIdx.y == 0 ? first_from : second_from) + from.start(block, run);
  const long long first = static_cast<long long>(chunk) * THREADS * VECTORS + threadIdx.x;
  Bytes16 vector[VECTORS];
#pragma unroll
  for (int i = 0; i < VECTORS; ++i)
    vector[i] = load_global_if(first + i * THREADS < run_vectors, source + first + i * THREADS);
#pragma unroll
  for (int i = 0; i < VECTORS; ++i)
    if (first + i * THREADS < run_vectors) target[first + i * THREADS] = vector[i];
}
