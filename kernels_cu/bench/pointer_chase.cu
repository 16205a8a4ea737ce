// Follow a chain through a cache, each row telling where the next one lies: how many cycles does one load take that waits
// for the load before it, by a path of loads? The chain's length and order decide which memory answers.
//
// A row begins with the next row's block, head and slot, so that between two loads there is the address and nothing else.
// The first `warm_steps` fetch what is to be found in a cache; the rest is timed.
//
// Measured on an H100, cycles from L1, L2 and memory: plain and __ldg 84, 335, 735; no_allocate 343 from L2 even where L1
// could hold the rows; cp.async 378, 371, 783; textures 138 to 148, 377 to 389, 777 to 789. Going row by row saves nothing.
//
// Grid:  (1).    Block: (1).
//
// Defines
//   HEAD_DIM     floats in a row, 32 to 256, a multiple of 8
//   BLOCK_SIZE   rows of a head per block
//   and those of load_path.cuh
#include "clock.cuh"
#include "load_path.cuh"
#include "paged_kv.cuh"
#include "types.cuh"

struct Position {
  int block_id, kv_head, slot;
};

using Rows = CacheRows<float, HEAD_DIM, BLOCK_SIZE, 1>;

__device__ __forceinline__ Position follow(const Rows& rows, Position at, int steps) {
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    auto next = rows.start(true, at.block_id, at.kv_head, at.slot, 0, 0);
    rows.wait();
    rows.take(next, 0);
    at = {__float_as_int(next[0]), __float_as_int(next[1]), __float_as_int(next[2])};
  }
  return at;
}

extern "C" __global__ void pointer_chase(
    int* __restrict__ end,                  // [3], where the chain led to: block, head, slot
    long long* __restrict__ cycles,         // [1], of the timed steps
    const float* __restrict__ key_cache,    // by the strides below; bits of integers
    const int first_block, const int first_head, const int first_slot, const int warm_steps, const int steps,
    const int key_block_stride, const long long key_head_stride, const int key_slot_stride,
    const unsigned long long key_texture,
    const unsigned long long* __restrict__ key_textures,   // [TEXTURE_TILES], or null where there is one
    const int tile_bits, const int first_key_texel, const int head_rows) {
  const CachePlace<float, HEAD_DIM, BLOCK_SIZE> place{
      key_cache, {key_block_stride, key_head_stride, key_slot_stride, 0},
      key_texture, key_textures, tile_bits, first_key_texel, head_rows};
#if LOAD_PATH == LOAD_ASYNC_COPY
  __shared__ uint4 arriving[1];
  const Rows rows{place, arriving};
#else
  const Rows rows{place};
#endif
  Position at = follow(rows, {first_block, first_head, first_slot}, warm_steps);
  end[0] = at.block_id;   // the clock starts when the warm steps are done
  const long long start = cycles_now();
  at = follow(rows, at, steps);
  end[0] = at.block_id, end[1] = at.kv_head, end[2] = at.slot;
  cycles[0] = cycles_now() - start;
}
