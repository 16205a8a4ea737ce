// Decode attention with the context cut into partitions, each a thread block's: a long sequence, or a few short ones,
// then fill the whole GPU. The second version of the PagedAttention paper's kernels (arXiv 2309.06180); the same cut is
// Flash-Decoding's.
//
// Adds over the online kernel: partitions of a sequence run side by side, each leaving its maximum, sum and weighted
// values in work space, which merge_partitions.cu merges; and a block serves up to HEADS query heads of a KV head, whose
// keys and values it then loads once for all of them. Where one partition covers the context the result is written at
// once. The host chooses the partitions from shapes alone and knows no length: those past a sequence's end stop at once.
// Of a sliding window only what the query sees is cut up. Query tokens of a sequence have thread blocks of their own.
//
// Measured: 37 to 92 % of the read ceiling; 72 % on one sequence of 128k, where v1 has 7
// (experiments/results/h100-80gb-hbm3/decode.csv, an H100).
//
// Grid:  (rows * num_kv_heads * tiles, partitions), tile of query heads fastest; rows = num_seqs * query_tokens.
// Block: (THREADS).
//
// Defines
//   STORAGE      __half, __nv_bfloat16 or float
//   HEAD_DIM     32 to 256, a multiple of 8
//   BLOCK_SIZE   tokens per KV block, 1 to 256
//   KEY_PACK     neighbouring dimensions of a key: HEAD_DIM, or 16 / sizeof(STORAGE) in BHDSX
//   VALUE_PACK   of a value: HEAD_DIM, or 1 in BHDSX, where values are read one by one
//   HEADS        query heads that share a load, 1 to 4; those past the group are computed and not written
//   and those of variants.cuh
#include "global_memory.cuh"
#include "paged_kv.cuh"
#include "reduce.cuh"
#include "running_attention.cuh"
#include "softmax.cuh"
#include "token_row.cuh"
#include "types.cuh"
#include "variants.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / kWarpSize;
constexpr int BLOCKS_PER_SM = HEADS <= 2 ? 4 : 3;   // at least: leaves a thread 128 or 168 registers
using Row = TokenRow<STORAGE, HEAD_DIM>;
constexpr int GROUPS = THREADS / Row::LANES;        // rows that the block reads at once
// Keys, and values, that a lane reads before it uses the first: more do not fit the registers.
constexpr int IN_FLIGHT = HEADS == 1 && VALUE_PACK == HEAD_DIM ? 4 : 2;

// The queries of a tile, scaled, zeros past the group and past HEAD_DIM: too many to keep in registers.
struct __align__(16) QueryTile {
  float value[HEADS][Row::PADDED_DIM];

  __device__ __forceinline__ void load(const STORAGE* first_head,   // [heads, HEAD_DIM]
                                       int heads, float factor) {
    for (int i = threadIdx.x; i < HEADS * Row::PADDED_DIM; i += THREADS) {
      const int head = i / Row::PADDED_DIM, dim = i % Row::PADDED_DIM;
      const bool there = head < heads && dim < HEAD_DIM;
      value[head][dim] = to_float(load_global_if(there, first_head + head * HEAD_DIM + dim)) * factor;
    }
  }
};

// Products of every head of the tile with IN_FLIGHT tokens, a head's side by side, shared out among the lanes of a row.
using Products = ScatteredSums<Row::LANES, HEADS * IN_FLIGHT>;
// Which of them this lane's i-th is of; HEADS or more for none.
__device__ __forceinline__ int head_of(int i) { return Products::index(i) / IN_FLIGHT; }
__device__ __forceinline__ int token_in_flight(int i) { return Products::index(i) % IN_FLIGHT; }

// A vector of a query is read once for all tokens.
__device__ __forceinline__ Products multiply(const QueryTile& query, const Row (&key)[IN_FLIGHT]) {
  float part[HEADS * IN_FLIGHT] = {};
#pragma unroll
  for (int i = 0; i < Row::COUNT; ++i)
#pragma unroll
    for (int head = 0; head < HEADS; ++head) {
      const float* query_vector = query.value[head] + Row::dimension(i * Row::VEC);
#pragma unroll
      for (int v = 0; v < Row::VEC; ++v)
#pragma unroll
        for (int r = 0; r < IN_FLIGHT; ++r) part[head * IN_FLIGHT + r] += query_vector[v] * key[r][i * Row::VEC + v];
    }
  return Products(part);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) paged_attention_v2(
    STORAGE* __restrict__ out,                // [rows, num_heads, HEAD_DIM]; written if there is one partition
    float* __restrict__ lse,                  // [rows, num_heads], or null; likewise
    float* __restrict__ partial_out,          // [rows, num_heads, partitions, HEAD_DIM], else: relative to the maximum
    float* __restrict__ partial_state,        // [rows, num_heads, partitions, 2]: maximum and sum
    const STORAGE* __restrict__ query,        // [rows, num_heads, HEAD_DIM], a sequence's query tokens in order
    const STORAGE* __restrict__ key_cache,    // by the four strides below
    const STORAGE* __restrict__ value_cache,  // likewise
    const int* __restrict__ block_tables,     // [num_seqs, max_blocks], -1 = unmapped
    const int* __restrict__ seq_lens,         // [num_seqs]
    const float scale, const int num_heads, const int group,   // group: query heads per KV head
    const int max_blocks, const int partition_tokens,
    const int key_block_stride, const long long key_head_stride, const int key_slot_stride, const int key_pack_stride,
    const int value_block_stride, const long long value_head_stride, const int value_slot_stride,
    const int value_pack_stride,
    const int query_tokens, const int window, const float softcap,   // see variants.cuh
    const float* __restrict__ alibi_slopes,   // [num_heads]
    const float* __restrict__ sinks) {        // [num_heads]
  __shared__ QueryTile query_tile;
  __shared__ WarpResults<WARPS, HEAD_DIM> results[HEADS];
  const int tiles = (group + HEADS - 1) / HEADS, tiles_of_row = num_heads / group * tiles;
  const int tile = blockIdx.x % tiles, kv_head = blockIdx.x % tiles_of_row / tiles;
  const long long query_row = blockIdx.x / tiles_of_row;
  const long long seq = QUERY_TOKENS ? static_cast<int>(query_row) / query_tokens : query_row;
  const int heads = min(HEADS, group - tile * HEADS), first_head = kv_head * group + tile * HEADS;
  const long long first_row = query_row * num_heads + first_head;

  const Variants variants{query_tokens, window, softcap, alibi_slopes, sinks};
  const int seen = variants.context_of(load_global(seq_lens + seq), static_cast<int>(query_row - seq * query_tokens));
  const int partitions = gridDim.y, partition = blockIdx.y;
  const int begin = variants.first_token(seen) + partition * partition_tokens;
  if (begin >= seen && partitions > 1) return;   // the whole block
  const Context<BLOCK_SIZE> context{block_tables + seq * max_blocks, begin + min(partition_tokens, seen - begin)};
  const KvStrides<KEY_PACK> key_strides{key_block_stride, key_head_stride, key_slot_stride, key_pack_stride};
  const KvStrides<VALUE_PACK> value_strides{value_block_stride, value_head_stride, value_slot_stride, value_pack_stride};

  int token = begin + threadIdx.x / Row::LANES;   // and every GROUPS-th after it
  int next_block_id[IN_FLIGHT];                   // looked up a step ahead
#pragma unroll
  for (int r = 0; r < IN_FLIGHT; ++r) next_block_id[r] = context.block_of(token + r * GROUPS);
  query_tile.load(query + first_row * HEAD_DIM, heads, scale * kLog2E);
  __syncthreads();
  float slope[Products::KEPT];
#pragma unroll
  for (int i = 0; i < Products::KEPT; ++i) slope[i] = variants.slope_of(first_head + min(head_of(i), heads - 1));

  RunningAttention<Row::SHARE> attention[HEADS];
  for (int first = begin; first < context.end; first += GROUPS * IN_FLIGHT, token += GROUPS * IN_FLIGHT) {
    int block_id[IN_FLIGHT];
    Row key[IN_FLIGHT], value[IN_FLIGHT];
#pragma unroll
    for (int r = 0; r < IN_FLIGHT; ++r) {
      block_id[r] = next_block_id[r];
      const int slot = context.slot_of(token + r * GROUPS);
      key[r].load(key_cache, key_strides, block_id[r], kv_head, slot);
      value[r].load(value_cache, value_strides, block_id[r], kv_head, slot);
    }
#pragma unroll
    for (int r = 0; r < IN_FLIGHT; ++r) next_block_id[r] = context.block_of(token + (IN_FLIGHT + r) * GROUPS);
    Products shared_out = multiply(query_tile, key);   // each lane makes logits of some, in units of log 2
#pragma unroll
    for (int i = 0; i < Products::KEPT; ++i)
      shared_out.kept[i] = variants.logit(shared_out.kept[i], token + token_in_flight(i) * GROUPS, seen, slope[i]);
#pragma unroll
    for (int head = 0; head < HEADS; ++head) {
      float logit[IN_FLIGHT];
#pragma unroll
      for (int r = 0; r < IN_FLIGHT; ++r) {
        logit[r] = shared_out.gathered(head * IN_FLIGHT + r);
        if (block_id[r] == kUnmapped) logit[r] = minus_infinity();
      }
      attention[head].add(logit, value);
    }
  }

#pragma unroll
  for (int head = 0; head < HEADS; ++head) {
    attention[head].merge_over_warp<Row::LANES>();
    results[head].store<Row>(attention[head]);
  }
  __syncthreads();
  for (int head = 0; head < heads; ++head) {
    const long long row = first_row + head;
    SoftmaxState softmax = results[head].merged_softmax();
    if (partitions == 1) {
      variants.add_sink(softmax, first_head + head);
      results[head].write(out + row * HEAD_DIM, lse == nullptr ? nullptr : lse + row, softmax);
      continue;
    }
    const long long part = row * partitions + partition;
    for (int dim = threadIdx.x; dim < HEAD_DIM; dim += THREADS)
      partial_out[part * HEAD_DIM + dim] = results[head].merged_sum(dim, softmax.max);
    if (threadIdx.x == 0) {
      partial_state[2 * part] = softmax.max;
      partial_state[2 * part + 1] = softmax.sum;
    }
  }
}
