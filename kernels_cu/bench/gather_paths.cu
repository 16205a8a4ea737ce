// Read every row of a sequence through its block table, by a path of loads, and do nothing else: what bandwidth does the
// path reach on blocks that lie anywhere?
//
// A thread takes every `threads`-th 16-byte vector, eight at a time; neighbouring threads read one token's heads.
// The words are combined by exclusive or, so that no load can be left out and the result can be tested.
//
// Measured on an H100, block sizes 1 to 256: plain loads 2902 to 2928 GB/s, 93 % of the ceiling; __ldg, no_allocate and
// cp.async within 2 % of them, linear textures too; the array 7 to 13 % less, pitch-linear 12 to 16 % less.
//
// Grid:  a few thread blocks per SM.    Block: (THREADS).
//
// Defines
//   STORAGE      __half, __nv_bfloat16 or float
//   HEAD_DIM     32 to 256, a multiple of 8
//   BLOCK_SIZE   tokens per KV block
//   HEADS        KV heads
//   and those of load_path.cuh, texels of integers only
#include "global_memory.cuh"
#include "load_path.cuh"
#include "paged_kv.cuh"
#include "reduce.cuh"
#include "types.cuh"

constexpr int THREADS = 256;
constexpr int IN_FLIGHT = 8;
constexpr int VEC = kValuesPer16Bytes<STORAGE>;
constexpr int ROW_VECTORS = HEAD_DIM / VEC, TOKEN_VECTORS = HEADS * ROW_VECTORS;
using Rows = CacheRows<STORAGE, HEAD_DIM, BLOCK_SIZE, IN_FLIGHT>;

extern "C" __global__ void __launch_bounds__(THREADS) gather_paths(
    unsigned int* __restrict__ combined,      // [1], combined by exclusive or with what is there
    const STORAGE* __restrict__ key_cache,    // by the strides below
    const int* __restrict__ block_table,      // [ceil(tokens / BLOCK_SIZE)], of one sequence
    const int tokens,
    const int key_block_stride, const long long key_head_stride, const int key_slot_stride,
    const unsigned long long key_texture,
    const unsigned long long* __restrict__ key_textures,   // [TEXTURE_TILES], or null where there is one
    const int tile_bits, const int first_key_texel, const int head_rows) {
  const CachePlace<STORAGE, HEAD_DIM, BLOCK_SIZE> place{
      key_cache, {key_block_stride, key_head_stride, key_slot_stride, 0},
      key_texture, key_textures, tile_bits, first_key_texel, head_rows};
#if LOAD_PATH == LOAD_ASYNC_COPY
  __shared__ uint4 arriving[IN_FLIGHT * THREADS];
  const Rows rows{place, arriving};
#else
  const Rows rows{place};
#endif
  const BlockTable table(block_table, 0, 0);
  const long long threads = static_cast<long long>(gridDim.x) * THREADS;
  const long long vectors = static_cast<long long>(tokens) * TOKEN_VECTORS;
  unsigned int result = 0;
  for (long long first = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x; first < vectors;
       first += threads * IN_FLIGHT) {
    Vector<STORAGE, VEC> vector[IN_FLIGHT];
    int block_id[IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const long long index = first + i * threads;
      block_id[i] = table.block(index < vectors ? static_cast<unsigned>(index / TOKEN_VECTORS) / BLOCK_SIZE : 0);
    }
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const long long index = first + i * threads;
      const int token = static_cast<int>(index / TOKEN_VECTORS), of_token = static_cast<int>(index % TOKEN_VECTORS);
      vector[i] = rows.start(index < vectors, block_id[i], of_token / ROW_VECTORS,
                             static_cast<unsigned>(token) % BLOCK_SIZE, of_token % ROW_VECTORS * VEC, i);
    }
    rows.wait();
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      rows.take(vector[i], i);
      const uint4 bits = reinterpret_cast<const uint4&>(vector[i]);
      result ^= bits.x ^ bits.y ^ bits.z ^ bits.w;
    }
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) result ^= __shfl_xor_sync(kAllLanes, result, distance);
  if (threadIdx.x % kWarpSize == 0) atomicXor(combined, result);
}
