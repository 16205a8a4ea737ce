// Decode attention for any number of queries in one launch of any size: query_to_seq says whose context a query reads,
// so that several queries can share a sequence, and thread blocks take (query, head) pairs in turns.
//
// Adds over the online kernel: the grid no longer follows from the work. A block strides over pairs, and within a pair
// each of its warps takes every WARPS-th KV block, whose table entry it looks up once, with a running attention of its
// own; the warps' results merge by their log-sum-exp in shared memory. One launch serves a batch, and no more blocks
// start than run at once.
//
// Query heads of a KV head and queries of a sequence each read it for themselves.
//
// Measured: 94 % of the read ceiling on MHA, 5 to 60 % elsewhere (experiments/results/h100-80gb-hbm3/decode.csv, an H100).
// Against a launch a sequence: experiments/results/h100-80gb-hbm3/batching.csv.
//
// Grid:  any number of blocks.    Block: (THREADS).
//
// Defines
//   STORAGE      __half, __nv_bfloat16 or float
//   HEAD_DIM     32 to 256, a multiple of 8
//   BLOCK_SIZE   tokens per KV block, 1 to 256
//   KEY_PACK     neighbouring dimensions of a key: HEAD_DIM, or 16 / sizeof(STORAGE) in BHDSX
//   VALUE_PACK   of a value: HEAD_DIM, or 1 in BHDSX, where values are read one by one
#include "global_memory.cuh"
#include "paged_kv.cuh"
#include "reduce.cuh"
#include "running_attention.cuh"
#include "softmax.cuh"
#include "token_row.cuh"
#include "types.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / kWarpSize;
constexpr int BLOCKS_PER_SM = 4;                  // at least: leaves a thread 128 registers
using Row = TokenRow<STORAGE, HEAD_DIM>;
constexpr int GROUPS = kWarpSize / Row::LANES;    // rows that a warp reads at once
// Keys, and values, that a lane reads before it uses the first: more do not fit the registers.
constexpr int IN_FLIGHT = BLOCK_SIZE > GROUPS ? 2 : 1;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) paged_attention_batched(
    STORAGE* __restrict__ out,                // [num_queries, num_heads, HEAD_DIM]
    float* __restrict__ lse,                  // [num_queries, num_heads], or null
    const STORAGE* __restrict__ query,        // [num_queries, num_heads, HEAD_DIM]
    const int* __restrict__ query_to_seq,     // [num_queries], or null: query i reads sequence i
    const STORAGE* __restrict__ key_cache,    // by the four strides below
    const STORAGE* __restrict__ value_cache,  // likewise
    const int* __restrict__ block_tables,     // [num_seqs, max_blocks], -1 = unmapped
    const int* __restrict__ seq_lens,         // [num_seqs]
    const float scale, const int num_queries, const int num_heads, const int group,   // group: query heads per KV head
    const int max_blocks,
    const int key_block_stride, const long long key_head_stride, const int key_slot_stride, const int key_pack_stride,
    const int value_block_stride, const long long value_head_stride, const int value_slot_stride,
    const int value_pack_stride) {
  __shared__ WarpResults<WARPS, HEAD_DIM> results;
  const KvStrides<KEY_PACK> key_strides{key_block_stride, key_head_stride, key_slot_stride, key_pack_stride};
  const KvStrides<VALUE_PACK> value_strides{value_block_stride, value_head_stride, value_slot_stride, value_pack_stride};
  const int warp = threadIdx.x / kWarpSize, row_in_warp = threadIdx.x % kWarpSize / Row::LANES;

  const long long pairs = static_cast<long long>(num_queries) * num_heads;
  for (long long pair = blockIdx.x; pair < pairs; pair += gridDim.x) {   // head fastest
    const long long index = pair / num_heads;
    const int kv_head = static_cast<int>(pair % num_heads) / group;
    const long long seq = query_to_seq == nullptr ? index : load_global(query_to_seq + index);
    const int* block_table = block_tables + seq * max_blocks;
    const int seq_len = load_global(seq_lens + seq);
    float scaled_query[Row::SHARE];
    Row::load_query(scaled_query, query + pair * HEAD_DIM, scale * kLog2E);

    RunningAttention<Row::SHARE> attention;
    for (int block = warp; block * BLOCK_SIZE < seq_len; block += WARPS) {
      const int block_id = load_global(block_table + block);
      if (block_id == kUnmapped) continue;   // the whole warp
      const int filled = min(BLOCK_SIZE, seq_len - block * BLOCK_SIZE);
      for (int first = 0; first < filled; first += GROUPS * IN_FLIGHT) {
        Row key[IN_FLIGHT], value[IN_FLIGHT];
        float logit[IN_FLIGHT];   // in units of log 2
#pragma unroll
        for (int r = 0; r < IN_FLIGHT; ++r) {
          const int slot = first + row_in_warp + r * GROUPS;
          const int block_of_slot = slot < filled ? block_id : kUnmapped;
          key[r].load(key_cache, key_strides, block_of_slot, kv_head, slot);
          value[r].load(value_cache, value_strides, block_of_slot, kv_head, slot);
        }
#pragma unroll
        for (int r = 0; r < IN_FLIGHT; ++r) {
          const float product = key[r].dot(scaled_query);
          logit[r] = first + row_in_warp + r * GROUPS < filled ? saturated(product) : minus_infinity();
        }
        attention.add(logit, value);
      }
    }

    attention.merge_over_warp<Row::LANES>();
    results.store<Row>(attention);
    __syncthreads();
    results.write(out + pair * HEAD_DIM, lse == nullptr ? nullptr : lse + pair);
    __syncthreads();   // the results have been read: they may be written again
  }
}
