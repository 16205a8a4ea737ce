// Decode attention by paged_attention_online's algorithm, its keys and values coming by a path that a define chooses: a
// load of global memory, a copy to shared memory, or a texture bound in one of three ways. What differs in time is the
// path (python experiments/texture_vs_global.py).
//
// The study document reads K and V through textures in vectors of four channels, x = block * block_size + token,
// y = head * D + dim; TEXTURE_ARRAY has these coordinates. In memory that textures share with the cache, a row's
// dimensions are neighbours and must lie along x: TEXTURE_PITCH takes y = block, x = place within it. The document's
// kernel takes a softmax for each 4-wide slice of a head, a relative error of 0.78; here all of a row's vectors meet
// before the softmax.
//
// As rows of halves arrive 8 values to a texel of integers, each costs one conversion, as after any load; texels of
// floats (TEXEL_FLOATS) save these, and fetch twice as often for the same bytes.
//
// Measured on an H100 (experiments/results/h100-80gb-hbm3/texture_vs_global.csv), float16, 537 MB, over LOAD_PLAIN,
// which reads at 94 to 96 % of the ceiling: linear textures and the array 0.99 to 1.00, pitch-linear 0.88 (0.66 in
// HBSD, whose heads lie far apart), no_allocate 1.00, cp.async 0.96 to 0.97; texels of floats 0.97 to 0.98 (linear),
// 0.90 to 0.92 (array), 0.87 (pitch-linear; 0.39 in HBSD). Nsight Compute counts the same sectors and the same bytes
// from memory for all.
//
// Grid:  (num_seqs * num_heads), head fastest.    Block: (THREADS).
//
// Defines
//   STORAGE      __half, __nv_bfloat16 or float
//   HEAD_DIM     32 to 256, a multiple of 8
//   BLOCK_SIZE   tokens per KV block, 1 to 256
//   and those of load_path.cuh
#include "load_path.cuh"
#include "paged_kv.cuh"
#include "reduce.cuh"
#include "running_attention.cuh"
#include "softmax.cuh"
#include "token_row.cuh"
#include "types.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / kWarpSize;
constexpr int BLOCKS_PER_SM = 4;                // at least: leaves a thread 128 registers
using Row = TokenRow<Loaded<STORAGE>, HEAD_DIM>;
constexpr int GROUPS = THREADS / Row::LANES;    // rows that the block reads at once
constexpr int IN_FLIGHT = 4;                    // keys, and values, that a lane reads before it uses the first
using Place = CachePlace<STORAGE, HEAD_DIM, BLOCK_SIZE>;
using Rows = CacheRows<STORAGE, HEAD_DIM, BLOCK_SIZE, IN_FLIGHT * Row::COUNT>;

// Start to read a lane's shares of the rows of a token and of every GROUPS-th after it.
__device__ __forceinline__ void start_rows(Row (&row)[IN_FLIGHT], const Rows& rows, const int (&block_id)[IN_FLIGHT],
                                           int kv_head, int token) {
#pragma unroll
  for (int r = 0; r < IN_FLIGHT; ++r)
#pragma unroll
    for (int i = 0; i < Row::COUNT; ++i) {
      const bool wanted = block_id[r] != kUnmapped && Row::owns(i);
      const int slot = Context<BLOCK_SIZE>::slot_of(token + r * GROUPS);
      row[r].vector[i] =
          rows.start(wanted, block_id[r], kv_head, slot, Row::dimension(i * Row::VEC), r * Row::COUNT + i);
    }
}

__device__ __forceinline__ void take_rows(Row (&row)[IN_FLIGHT], const Rows& rows) {
#pragma unroll
  for (int r = 0; r < IN_FLIGHT; ++r)
#pragma unroll
    for (int i = 0; i < Row::COUNT; ++i) rows.take(row[r].vector[i], r * Row::COUNT + i);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) paged_attention_texture(
    STORAGE* __restrict__ out,                // [num_seqs, num_heads, HEAD_DIM]
    float* __restrict__ lse,                  // [num_seqs, num_heads], or null
    const STORAGE* __restrict__ query,        // [num_seqs, num_heads, HEAD_DIM]
    const STORAGE* __restrict__ key_cache,    // by the strides below
    const STORAGE* __restrict__ value_cache,  // likewise
    const int* __restrict__ block_tables,     // [num_seqs, max_blocks], -1 = unmapped
    const int* __restrict__ seq_lens,         // [num_seqs]
    const float scale, const int num_heads, const int group,   // group: query heads per KV head
    const int max_blocks,
    const int key_block_stride, const long long key_head_stride, const int key_slot_stride,
    const int value_block_stride, const long long value_head_stride, const int value_slot_stride,
    const unsigned long long key_texture, const unsigned long long value_texture,   // 0 for paths without them
    const unsigned long long* __restrict__ key_textures,     // [TEXTURE_TILES], or null where there is one
    const unsigned long long* __restrict__ value_textures,   // likewise
    const int tile_bits, const int first_key_texel, const int first_value_texel, const int head_rows) {
  __shared__ WarpResults<WARPS, HEAD_DIM> results;
  const int kv_head = blockIdx.x % num_heads / group;
  const long long row = blockIdx.x, seq = blockIdx.x / num_heads;
  const Context<BLOCK_SIZE> context{block_tables + seq * max_blocks, load_global(seq_lens + seq)};
  const Place keys{key_cache, {key_block_stride, key_head_stride, key_slot_stride, 0},
                   key_texture, key_textures, tile_bits, first_key_texel, head_rows};
  const Place values{value_cache, {value_block_stride, value_head_stride, value_slot_stride, 0},
                     value_texture, value_textures, tile_bits, first_value_texel, head_rows};
#if LOAD_PATH == LOAD_ASYNC_COPY
  __shared__ uint4 arriving[2][IN_FLIGHT * Row::COUNT * THREADS];
  const Rows key_rows{keys, arriving[0]}, value_rows{values, arriving[1]};
#else
  const Rows key_rows{keys}, value_rows{values};
#endif
  float scaled_query[Row::SHARE];
#pragma unroll
  for (int i = 0; i < Row::SHARE; ++i) {
    const bool wanted = Row::dimension(i) < HEAD_DIM;
    scaled_query[i] = to_float(load_global_if(wanted, query + row * HEAD_DIM + Row::dimension(i))) * scale * kLog2E;
  }

  RunningAttention<Row::SHARE> attention;
  for (int first = 0; first < context.end; first += GROUPS * IN_FLIGHT) {
    const int token = first + threadIdx.x / Row::LANES;   // and every GROUPS-th after it
    int block_id[IN_FLIGHT];
    Row key[IN_FLIGHT], value[IN_FLIGHT];
#pragma unroll
    for (int r = 0; r < IN_FLIGHT; ++r) block_id[r] = context.block_of(token + r * GROUPS);
    start_rows(key, key_rows, block_id, kv_head, token);
    start_rows(value, value_rows, block_id, kv_head, token);
    value_rows.wait();
    take_rows(key, key_rows);
    take_rows(value, value_rows);
    float logit[IN_FLIGHT];   // in units of log 2
#pragma unroll
    for (int r = 0; r < IN_FLIGHT; ++r) {
      const float product = key[r].dot(scaled_query);
      logit[r] = block_id[r] == kUnmapped ? minus_infinity() : saturated(product);
    }
    attention.add(logit, value);
  }

  attention.merge_over_warp<Row::LANES>();
  results.store<Row>(attention);
  __syncthreads();
  results.write(out + row * HEAD_DIM, lse == nullptr ? nullptr : lse + row);
}
