// Decode attention as the textbook writes it: the largest logit, the sum of exponentials, the weighted values, each in a
// pass of its own over the context. The first rung of the ladder: right for every shape, and slow.
//
// A thread block takes a (sequence, query head), a thread a token, whose key it reads number by number and alone: the
// lanes of a warp read as many rows at once, each a few bytes of it. A logit is computed three times, once a pass, as
// nothing is kept. In the last pass the threads change roles: the weights of THREADS tokens go to shared memory, then
// each thread sums a dimension of their values.
//
// Measured: 0 to 9 % of the read ceiling, on MHA at best (experiments/results/h100-80gb-hbm3/decode.csv, an H100).
//
// Grid:  (num_seqs * num_heads), head fastest.    Block: (THREADS).
//
// Defines
//   STORAGE      __half, __nv_bfloat16 or float
//   HEAD_DIM     32 to 256, a multiple of 8
//   BLOCK_SIZE   tokens per KV block, 1 to 256
//   KEY_PACK     neighbouring dimensions of a key: HEAD_DIM, or 16 / sizeof(STORAGE) in BHDSX
//   VALUE_PACK   of a value: HEAD_DIM, or 1 in BHDSX
#include "global_memory.cuh"
#include "paged_kv.cuh"
#include "reduce.cuh"
#include "softmax.cuh"
#include "token_row.cuh"
#include "types.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / kWarpSize;
constexpr int DIMS = (HEAD_DIM + THREADS - 1) / THREADS;   // dimensions that a thread sums

// A query head and the keys that it meets.
struct Logits {
  Context<BLOCK_SIZE> context;
  const STORAGE* query;       // [HEAD_DIM]
  const STORAGE* key_cache;
  KvStrides<KEY_PACK> strides;
  int kv_head;
  float scale;

  // In units of log 2; -infinity for a token without a block.
  __device__ __forceinline__ float of(int token) const {
    const int block_id = context.block_of(token);
    if (block_id == kUnmapped) return minus_infinity();
    float logit = 0.0f;
    for (int dim = 0; dim < HEAD_DIM; ++dim) {
      const long long offset = strides.offset(block_id, kv_head, context.slot_of(token), dim);
      logit += to_float(load_global(query + dim)) * to_float(load_global(key_cache + offset));
    }
    return saturated(logit * (scale * kLog2E));
  }
};

extern "C" __global__ void __launch_bounds__(THREADS) paged_attention_naive(
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
  __shared__ float max_of_warp[WARPS], sum_of_warp[WARPS], weights[THREADS];
  const int kv_head = blockIdx.x % num_heads / group;
  const long long seq = blockIdx.x / num_heads;
  const int seq_len = load_global(seq_lens + seq);
  const Context<BLOCK_SIZE> context{block_tables + seq * max_blocks, seq_len};
  const STORAGE* query_row = query + static_cast<long long>(blockIdx.x) * HEAD_DIM;
  const KvStrides<KEY_PACK> key_strides{key_block_stride, key_head_stride, key_slot_stride, key_pack_stride};
  const KvStrides<VALUE_PACK> strides{value_block_stride, value_head_stride, value_slot_stride, value_pack_stride};
  const Logits logits{context, query_row, key_cache, key_strides, kv_head, scale};

  SoftmaxState softmax;
  float largest = minus_infinity();
  for (int token = threadIdx.x; token < seq_len; token += THREADS) largest = fmaxf(largest, logits.of(token));
  softmax.max = block_reduce<Max, WARPS>(largest, max_of_warp);

  float sum = 0.0f;
  for (int token = threadIdx.x; token < seq_len; token += THREADS) sum += softmax_weight(logits.of(token), softmax.max);
  softmax.sum = block_reduce<Sum, WARPS>(sum, sum_of_warp);

  float weighted[DIMS] = {};
  for (int first = 0; first < seq_len; first += THREADS) {
    weights[threadIdx.x] = softmax_weight(logits.of(first + threadIdx.x), softmax.max);
    __syncthreads();
    for (int token = first; token < min(seq_len, first + THREADS); ++token) {
      const int block_id = context.block_of(token);
      if (block_id == kUnmapped) continue;
      for (int i = 0; i < DIMS; ++i) {
        const int dim = i * THREADS + threadIdx.x;
        const long long offset = strides.offset(block_id, kv_head, context.slot_of(token), dim);
        weighted[i] += weights[token - first] * to_float(load_global_if(dim < HEAD_DIM, value_cache + offset));
      }
    }
    __syncthreads();   // the weights have been read: they may be written again
  }

  STORAGE* out_row = out + static_cast<long long>(blockIdx.x) * HEAD_DIM;
  for (int i = 0; i < DIMS; ++i) {
    const int dim = i * THREADS + threadIdx.x;
    if (dim < HEAD_DIM) out_row[dim] = from_float<STORAGE>(weighted[i] * softmax.normaliser());
  }
  if (lse != nullptr && threadIdx.x == 0) lse[blockIdx.x] = softmax.log_sum_exp();
}
