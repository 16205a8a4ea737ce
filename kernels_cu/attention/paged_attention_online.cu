// Decode attention in one streaming pass: key and value of a token are read together, and a running maximum and sum
// stand in for the pass that would find them first.
//
// Adds over the rungs before: no logit is kept or computed twice, and nothing grows with the context. Lanes that read a
// row together keep a running attention of their own, over every token that falls to them, and rescale what they summed
// when their maximum grows; only at the end do they meet, by shuffles within a warp, then, over the block's one barrier,
// in shared memory. The algorithm: Milakov and Gimelshein, arXiv 1805.02867; Rabe and Staats, arXiv 2112.05682.
//
// Each query head still reads its KV head for itself, and a sequence has one thread block per head, however long it is.
//
// Measured: 94 % of the read ceiling on MHA, 6 to 66 % elsewhere: within 5 points of v1
// (experiments/results/h100-80gb-hbm3/decode.csv, an H100).
//
// Grid:  (num_seqs * num_heads), head fastest.    Block: (THREADS).
//
// Defines
//   STORAGE      __half, __nv_bfloat16 or float
//   HEAD_DIM     32 to 256, a multiple of 8
//   BLOCK_SIZE   tokens per KV block, 1 to 256
//   KEY_PACK     neighbouring dimensions of a key: HEAD_DIM, or 16 / sizeof(STORAGE) in BHDSX
//   VALUE_PACK   of a value: HEAD_DIM, or 1 in BHDSX, where values are read one by one
#include "paged_kv.cuh"
#include "reduce.cuh"
#include "running_attention.cuh"
#include "softmax.cuh"
#include "token_row.cuh"
#include "types.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / kWarpSize;
constexpr int BLOCKS_PER_SM = 4;                // at least: leaves a thread 128 registers
using Row = TokenRow<STORAGE, HEAD_DIM>;
constexpr int GROUPS = THREADS / Row::LANES;    // rows that the block reads at once
// Keys, and values, that a lane reads before it uses the first: more do not fit the registers.
constexpr int IN_FLIGHT = VALUE_PACK == HEAD_DIM ? 4 : 2;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) paged_attention_online(
    STORAGE* __restrict__ out,                // [num_seqs, num_heads, HEAD_DIM]
    float* __restrict__ lse,                  // [num_seqs, num_heads], or null
    const STORAGE* __restrict__ query,        // [num_seqs, num_heads, HEAD_DIM]
    const STORAGE* __restrict__ key_cache,    // by the four strides below
    const STORAGE* __restrict__ value_cache,  // likewise
    const int* __restrict__ block_tables,     // [num_seqs, max_blocks], -1 = unmapped
    const int* __restrict__ seq_lens,         // [num_seqs]
    const float scale, const int num_heads, const int group,   // group: query heads per KV head
    const int max_blocks,
    const int key_block_stride, const long long key_head_stride, const int key_slot_stride, const int key_pack_stride,
    const int value_block_stride, const long long value_head_stride, const int value_slot_stride,
    const int value_pack_stride) {
  __shared__ WarpResults<WARPS, HEAD_DIM> results;
  const int kv_head = blockIdx.x % num_heads / group;
  const long long row = blockIdx.x, seq = blockIdx.x / num_heads;
  const Context<BLOCK_SIZE> context{block_tables + seq * max_blocks, load_global(seq_lens + seq)};
  const KvStrides<KEY_PACK> key_strides{key_block_stride, key_head_stride, key_slot_stride, key_pack_stride};
  const KvStrides<VALUE_PACK> value_strides{value_block_stride, value_head_stride, value_slot_stride, value_pack_stride};
  float scaled_query[Row::SHARE];
  Row::load_query(scaled_query, query + row * HEAD_DIM, scale * kLog2E);

  RunningAttention<Row::SHARE> attention;
  for (int first = 0; first < context.end; first += GROUPS * IN_FLIGHT) {
    const int token = first + threadIdx.x / Row::LANES;   // and every GROUPS-th after it
    int block_id[IN_FLIGHT];
    Row key[IN_FLIGHT], value[IN_FLIGHT];
#pragma unroll
    for (int r = 0; r < IN_FLIGHT; ++r) block_id[r] = context.block_of(token + r * GROUPS);
#pragma unroll
    for (int r = 0; r < IN_FLIGHT; ++r) {
      const int slot = context.slot_of(token + r * GROUPS);
      key[r].load(key_cache, key_strides, block_id[r], kv_head, slot);
      value[r].load(value_cache, value_strides, block_id[r], kv_head, slot);
    }
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
