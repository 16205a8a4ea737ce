// Decode attention, one warp per (sequence, query head): no shared memory, no barrier.
//
// Adds over the naive kernel what v1 has too, rows read by neighbouring lanes in 16-byte vectors and sums by shuffles,
// and does without what v1 needs besides: a warp keeps step with itself, so that nothing waits for other warps, and as
// logits are not kept there is no stretch of them to fill. The price: keys are read twice, once for the largest logit
// and once with the values, and a sequence has a single warp per head, which alone cannot keep much memory busy.
//
// Measured: 63 % of the read ceiling on MHA, 1 to 44 % elsewhere: behind v1 everywhere
// (experiments/results/h100-80gb-hbm3/decode.csv, an H100).
//
// Grid:  enough for a warp per (sequence, query head), head fastest.    Block: (THREADS).
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
using Row = TokenRow<STORAGE, HEAD_DIM>;
constexpr int GROUPS = kWarpSize / Row::LANES;   // rows that the warp reads at once
constexpr int IN_FLIGHT = 4;                     // rows that a lane reads before it uses the first
using KeyStrides = KvStrides<KEY_PACK>;
using ValueStrides = KvStrides<VALUE_PACK>;

// The keys of the tokens `first + r * GROUPS`, and their logits in units of log 2; -infinity where there is no block.
__device__ __forceinline__ void compute_logits(float (&logit)[IN_FLIGHT], const float (&query)[Row::SHARE],
                                               const STORAGE* key_cache, const KeyStrides& strides, int kv_head,
                                               const int (&block_id)[IN_FLIGHT], int first) {
  Row key[IN_FLIGHT];
#pragma unroll
  for (int r = 0; r < IN_FLIGHT; ++r)
    key[r].load(key_cache, strides, block_id[r], kv_head, Context<BLOCK_SIZE>::slot_of(first + r * GROUPS));
#pragma unroll
  for (int r = 0; r < IN_FLIGHT; ++r) {
    const float product = key[r].dot(query);
    logit[r] = block_id[r] == kUnmapped ? minus_infinity() : saturated(product);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) paged_attention_warp(
    STORAGE* __restrict__ out,                // [num_seqs, num_heads, HEAD_DIM]
    float* __restrict__ lse,                  // [num_seqs, num_heads], or null
    const STORAGE* __restrict__ query,        // [num_seqs, num_heads, HEAD_DIM]
    const STORAGE* __restrict__ key_cache,    // by the four strides below
    const STORAGE* __restrict__ value_cache,  // likewise
    const int* __restrict__ block_tables,     // [num_seqs, max_blocks], -1 = unmapped
    const int* __restrict__ seq_lens,         // [num_seqs]
    const float scale, const int num_seqs, const int num_heads, const int group,   // group: query heads per KV head
    const int max_blocks,
    const int key_block_stride, const long long key_head_stride, const int key_slot_stride, const int key_pack_stride,
    const int value_block_stride, const long long value_head_stride, const int value_slot_stride,
    const int value_pack_stride) {
  const long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / kWarpSize;
  if (row >= static_cast<long long>(num_seqs) * num_heads) return;   // the whole warp
  const int kv_head = static_cast<int>(row % num_heads) / group;
  const long long seq = row / num_heads;
  const Context<BLOCK_SIZE> context{block_tables + seq * max_blocks, load_global(seq_lens + seq)};
  const KeyStrides key_strides{key_block_stride, key_head_stride, key_slot_stride, key_pack_stride};
  const ValueStrides value_strides{value_block_stride, value_head_stride, value_slot_stride, value_pack_stride};
  float scaled_query[Row::SHARE];
  Row::load_query(scaled_query, query + row * HEAD_DIM, scale * kLog2E);

  // For each step over the context: where the rows are that this lane helps to read.
  const int first_row = threadIdx.x % kWarpSize / Row::LANES;
  int block_id[IN_FLIGHT];
  float logit[IN_FLIGHT];
  const auto look_up = [&](int token) {
#pragma unroll
    for (int r = 0; r < IN_FLIGHT; ++r) block_id[r] = context.block_of(token + r * GROUPS);
  };

  float largest = minus_infinity();
  for (int step = 0; step < context.end; step += GROUPS * IN_FLIGHT) {
    const int token = step + first_row;
    look_up(token);
    compute_logits(logit, scaled_query, key_cache, key_strides, kv_head, block_id, token);
#pragma unroll
    for (int r = 0; r < IN_FLIGHT; ++r) largest = fmaxf(largest, logit[r]);
  }

  RunningAttention<Row::SHARE> attention;
  attention.softmax.max = warp_reduce<Max, Row::LANES, kWarpSize>(largest);
  for (int step = 0; step < context.end; step += GROUPS * IN_FLIGHT) {
    const int token = step + first_row;
    look_up(token);
    Row value[IN_FLIGHT];
#pragma unroll
    for (int r = 0; r < IN_FLIGHT; ++r)
      value[r].load(value_cache, value_strides, block_id[r], kv_head, context.slot_of(token + r * GROUPS));
    compute_logits(logit, scaled_query, key_cache, key_strides, kv_head, block_id, token);
    attention.add(logit, value);   // the maximum is known: no rescaling
  }
  attention.merge_over_warp<Row::LANES>();

  const SoftmaxState& softmax = attention.softmax;
#pragma unroll
  for (int i = 0; i < Row::SHARE; ++i)
    if (first_row == 0 && Row::dimension(i) < HEAD_DIM)
      out[row * HEAD_DIM + Row::dimension(i)] = from_float<STORAGE>(attention.sum[i] * softmax.normaliser());
  if (lse != nullptr && threadIdx.x % kWarpSize == 0) lse[row] = softmax.log_sum_exp();
}
