// Decode attention, one thread block per (sequence, query head): the logits of a stretch of the context go to shared
// memory, the block agrees on their maximum and sum, then the same threads weigh the values.
//
// Adds over a naive kernel: each token's row is read by neighbouring lanes in 16-byte loads, several rows in flight;
// the softmax is block-wide. The logits of a context may outgrow shared memory, so the context is taken in stretches
// of `stretch_tokens` that share one running softmax: there is no longest context.
//
// Measured (experiments/results/h100-80gb-hbm3/decode.csv): 95 % of the ceiling of an H100 on bfloat16 MHA, 7 to 68 %
// where heads share. Lost on the way there: 16 lanes a row, one vector each, spent as long on look-ups, addresses and
// shuffles as on memory; 64-bit strides added to that; a loop over slots whose trip count differs between lanes made the
// warp split and load twice.
//
// The query heads that share a KV head (GQA) each read it for themselves, mostly from L2: the rungs above share it. So
// do several query tokens of a sequence: each has a row of thread blocks and a context of its own.
//
// Grid:  (rows * num_heads), head fastest; rows = num_seqs * query_tokens.    Block: (THREADS).
// Dynamic shared memory: max(stretch_tokens, WARPS * HEAD_DIM) floats.
//
// Defines
//   STORAGE        __half, __nv_bfloat16 or float
//   HEAD_DIM       32 to 256, a multiple of 8
//   BLOCK_SIZE     tokens per KV block, 1 to 256
//   KEY_PACK       neighbouring dimensions of a key: HEAD_DIM, or 16 / sizeof(STORAGE) in BHDSX
//   VALUE_COLUMNS  1 where a value's neighbours in memory are the next tokens (BHDSX), else 0
//   and those of variants.cuh
#include "global_memory.cuh"
#include "paged_kv.cuh"
#include "reduce.cuh"
#include "softmax.cuh"
#include "token_row.cuh"
#include "types.cuh"
#include "variants.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / kWarpSize;
constexpr int BLOCKS_PER_SM = 4;          // at least: leaves a thread 128 registers
constexpr int VEC = kValuesPer16Bytes<STORAGE>;
constexpr int VECTORS = HEAD_DIM / VEC;   // 16-byte vectors in a token's row

__device__ constexpr int at_most(int n, int limit) { return n < limit ? n : limit; }
// The largest power of two, `width` at most, that divides n.
__device__ constexpr int widest_divisor(int n, int width) { return n % width == 0 ? width : widest_divisor(n, width / 2); }

// A row is read by ROW_LANES neighbouring lanes, each taking every ROW_LANES-th vector: few lanes, so that the look-up
// of a block, the address and the sum over lanes are shared by several vectors.
constexpr int ROW_LANES = VECTORS % 8 == 0 && VECTORS >= 16 ? 8 : VECTORS >= 8 ? 4 : 2;
constexpr int GROUPS = THREADS / ROW_LANES;   // rows that the block reads at once
using Row = TokenRow<STORAGE, HEAD_DIM, ROW_LANES>;
// Vectors of keys, and of values, that a lane reads before it uses the first: fewer where its share of a row takes many
// registers. They are whole rows, as many as are shared out among lanes without a rest.
constexpr int VECTORS_IN_FLIGHT = Row::SHARE <= 24 ? 16 : 8;
constexpr int IN_FLIGHT = largest_power_of_2(VECTORS_IN_FLIGHT / Row::COUNT);   // rows
using Products = ScatteredSums<ROW_LANES, IN_FLIGHT>;
static_assert(IN_FLIGHT == Products::PADDED, "");

using KeyStrides = KvStrides<KEY_PACK>;
using ValueStrides = KvStrides<VALUE_COLUMNS ? 1 : HEAD_DIM>;

// The tokens whose logits are in shared memory at one time.
struct Stretch {
  BlockTable table;         // this sequence's row
  int begin, end;           // tokens; begins with a KV block
  int first;                // what lies before this token takes no part
  int kv_head;

  __device__ __forceinline__ bool holds(int token) const { return token < end && (!WINDOW || token >= first); }
  // The block that holds a token; none outside the stretch.
  __device__ __forceinline__ int block_of(int token) const {
    return holds(token) ? table.block(static_cast<unsigned>(token) / BLOCK_SIZE) : kUnmapped;
  }
  static __device__ __forceinline__ int slot_of(int token) { return static_cast<unsigned>(token) % BLOCK_SIZE; }
};

// A lane's shares of a token's row and of every GROUPS-th after it, all on their way at once.
struct RowsInFlight {
  Row row[IN_FLIGHT];
  int block_id[IN_FLIGHT];

  template <typename Strides>
  __device__ __forceinline__ void load(const STORAGE* cache, const Strides& strides, const Stretch& stretch, int token) {
#pragma unroll
    for (int r = 0; r < IN_FLIGHT; ++r) block_id[r] = stretch.block_of(token + r * GROUPS);
#pragma unroll
    for (int r = 0; r < IN_FLIGHT; ++r)
      row[r].load(cache, strides, block_id[r], stretch.kv_head, Stretch::slot_of(token + r * GROUPS));
  }
};

// What turns the product of query and key into a logit.
struct QueryPlace {
  Variants variants;
  int context;   // tokens up to the query's own
  float slope;   // of its head
};

// Logits of the stretch, in units of log 2, to shared memory; returns the largest that this thread saw.
__device__ __forceinline__ float compute_logits(float* logits,         // [stretch_tokens]
                                                const float (&query)[Row::SHARE],   // this lane's share, scaled
                                                const STORAGE* key_cache, const KeyStrides& strides,
                                                const Stretch& stretch, const QueryPlace& place) {
  float largest = minus_infinity();
  for (int first = stretch.begin; first < stretch.end; first += GROUPS * IN_FLIGHT) {
    RowsInFlight key;
    const int token = first + threadIdx.x / ROW_LANES;
    key.load(key_cache, strides, stretch, token);
    float part[IN_FLIGHT];   // of the products
    unsigned mapped = 0;     // bit r: whether row r is a token's
#pragma unroll
    for (int r = 0; r < IN_FLIGHT; ++r) {
      part[r] = key.row[r].part_of_dot(query);
      if (key.block_id[r] != kUnmapped) mapped |= 1u << r;
    }
    const Products products(part);   // each lane of a row makes the logits of some of the rows in flight
#pragma unroll
    for (int i = 0; i < Products::KEPT; ++i) {
      const int r = Products::index(i), token_of_mine = token + r * GROUPS;
      const float if_mapped = place.variants.logit(products.kept[i], token_of_mine, place.context, place.slope);
      const float logit = (mapped >> r & 1) != 0 ? if_mapped : minus_infinity();
      if (Products::is_first() && token_of_mine < stretch.end) logits[token_of_mine - stretch.begin] = logit;
      largest = fmaxf(largest, logit);
    }
  }
  return largest;
}

// Logits become weights in place; returns the sum of those that this thread computed.
__device__ __forceinline__ float exponentiate(float* logits, int count, float max) {
  float sum = 0.0f;
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const float weight = softmax_weight(logits[i], max);
    logits[i] = weight;
    sum += weight;
  }
  return sum;
}

#if !VALUE_COLUMNS

// Weighted sum of values whose dimensions are neighbours: a group of lanes takes a token, each lane some dimensions.
struct Accumulator {
  float sum[Row::SHARE] = {};

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (float& value : sum) value *= factor;
  }

  __device__ __forceinline__ void add(const float* weights,   // [stretch_tokens]
                                      const STORAGE* value_cache, const ValueStrides& strides, const Stretch& stretch) {
    for (int first = stretch.begin; first < stretch.end; first += GROUPS * IN_FLIGHT) {
      RowsInFlight value;
      const int token = first + threadIdx.x / ROW_LANES;
      value.load(value_cache, strides, stretch, token);
#pragma unroll
      for (int r = 0; r < IN_FLIGHT; ++r) {
        const float weight = value.block_id[r] == kUnmapped ? 0.0f : weights[token + r * GROUPS - stretch.begin];
#pragma unroll
        for (int i = 0; i < Row::SHARE; ++i) sum[i] += weight * value.row[r][i];
      }
    }
  }

  // The warp's sum of every dimension, to shared memory.
  __device__ __forceinline__ void store(float* warp_sum) {   // [HEAD_DIM]
#pragma unroll
    for (int i = 0; i < Row::SHARE; ++i) {
      const float total = warp_reduce<Sum, ROW_LANES, kWarpSize>(sum[i]);
      if (Row::owns(i / VEC) && threadIdx.x % kWarpSize < ROW_LANES) warp_sum[Row::dimension(i)] = total;
    }
  }
};

#else

// Weighted sum of values whose tokens are neighbours: a warp takes a KV block; two lanes share a dimension and read
// vectors of its slots, together one whole 32-byte sector.
struct Accumulator {
  static constexpr int SLOTS = widest_divisor(BLOCK_SIZE, VEC);      // slots in one load
  static constexpr int SLOT_LANES = at_most(2, BLOCK_SIZE / SLOTS);
  static constexpr int ROWS = kWarpSize / SLOT_LANES;                // dimensions that a warp reads at once
  static constexpr int DIMS = (HEAD_DIM + ROWS - 1) / ROWS;          // dimensions that a lane sums
  float sum[DIMS] = {};

  static __device__ __forceinline__ int dimension(int i) { return i * ROWS + threadIdx.x % kWarpSize / SLOT_LANES; }

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (float& value : sum) value *= factor;
  }

  __device__ __forceinline__ void add(const float* weights,   // [stretch_tokens]
                                      const STORAGE* value_cache, const ValueStrides& strides, const Stretch& stretch) {
    const int warp = threadIdx.x / kWarpSize;
    for (int first = stretch.begin + warp * BLOCK_SIZE; first < stretch.end; first += WARPS * BLOCK_SIZE) {
      const int block_id = stretch.block_of(WINDOW ? max(first, stretch.first) : first);
      const int filled = block_id == kUnmapped ? 0 : min(BLOCK_SIZE, stretch.end - first);
      for (int row = 0; row < filled; row += SLOT_LANES * SLOTS) {   // as often for every lane of the warp
        const int slot = row + threadIdx.x % SLOT_LANES * SLOTS;
#pragma unroll
        for (int i = 0; i < DIMS; ++i) {
          const long long offset = strides.offset(block_id, stretch.kv_head, slot, dimension(i));
          const auto* address = reinterpret_cast<const Vector<STORAGE, SLOTS>*>(value_cache + offset);
          const auto value = load_global_if(slot < filled && dimension(i) < HEAD_DIM, address);
#pragma unroll
          for (int s = 0; s < SLOTS; ++s)   // a slot that holds no token of the stretch holds anything, even NaN
            if (slot + s < filled && (!WINDOW || first + slot + s >= stretch.first))
              sum[i] += weights[first - stretch.begin + slot + s] * to_float(value.value[s]);
        }
      }
    }
  }

  __device__ __forceinline__ void store(float* warp_sum) {   // [HEAD_DIM]
#pragma unroll
    for (int i = 0; i < DIMS; ++i) {
      const float total = warp_reduce<Sum, 1, SLOT_LANES>(sum[i]);
      if (dimension(i) < HEAD_DIM && threadIdx.x % SLOT_LANES == 0) warp_sum[dimension(i)] = total;
    }
  }
};

#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) paged_attention_v1(
    STORAGE* __restrict__ out,                // [rows, num_heads, HEAD_DIM]
    float* __restrict__ lse,                  // [rows, num_heads], or null
    const STORAGE* __restrict__ query,        // [rows, num_heads, HEAD_DIM], a sequence's query tokens in order
    const STORAGE* __restrict__ key_cache,    // by the four strides below
    const STORAGE* __restrict__ value_cache,  // likewise
    const int* __restrict__ block_tables,     // [num_seqs, max_blocks], -1 = unmapped
    const int* __restrict__ seq_lens,         // [num_seqs]
    const float scale, const int num_heads, const int group,   // group: query heads per KV head
    const int max_blocks,
    const int stretch_tokens,                 // a multiple of BLOCK_SIZE
    const int key_block_stride, const long long key_head_stride, const int key_slot_stride, const int key_pack_stride,
    const int value_block_stride, const long long value_head_stride, const int value_slot_stride,
    const int value_pack_stride,
    const int query_tokens, const int window, const float softcap,   // see variants.cuh
    const float* __restrict__ alibi_slopes,   // [num_heads]
    const float* __restrict__ sinks) {        // [num_heads]
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  float* logits = reinterpret_cast<float*>(dynamic_shared);   // [stretch_tokens], then [WARPS][HEAD_DIM]
  __shared__ float max_of_warp[WARPS], sum_of_warp[WARPS];

  const int head = blockIdx.x % num_heads;
  const long long row = blockIdx.x / num_heads;
  const long long seq = QUERY_TOKENS ? static_cast<int>(row) / query_tokens : row;
  const Variants variants{query_tokens, window, softcap, alibi_slopes, sinks};
  const int context = variants.context_of(load_global(seq_lens + seq), static_cast<int>(row - seq * query_tokens));
  const int first_token = variants.first_token(context);
  const KeyStrides key_strides{key_block_stride, key_head_stride, key_slot_stride, key_pack_stride};
  const ValueStrides value_strides{value_block_stride, value_head_stride, value_slot_stride, value_pack_stride};

  // This lane's share of the query, with the softmax's scale and the change to base 2 folded in.
  float scaled_query[Row::SHARE];
  Row::load_query(scaled_query, query + (row * num_heads + head) * HEAD_DIM, scale * kLog2E);

  const QueryPlace place{variants, context, variants.slope_of(head)};
  SoftmaxState softmax;
  Accumulator accumulator;
  for (int begin = first_token - first_token % BLOCK_SIZE; begin < context; begin += stretch_tokens) {
    const BlockTable table(block_tables, seq, max_blocks);
    const int end = min(context, begin + stretch_tokens);
    const Stretch stretch{table, begin, end, first_token, head / group};
    const float largest = compute_logits(logits, scaled_query, key_cache, key_strides, stretch, place);
    accumulator.scale(softmax.raise(block_reduce<Max, WARPS>(largest, max_of_warp)));
    const float sum = exponentiate(logits, end - begin, softmax.max);
    softmax.sum += block_reduce<Sum, WARPS>(sum, sum_of_warp);
    accumulator.add(logits, value_cache, value_strides, stretch);
    __syncthreads();   // the weights have been read: their memory may be written again
  }

  accumulator.scale(variants.add_sink(softmax, head));
  float* sums = logits;   // [WARPS][HEAD_DIM]
  accumulator.store(sums + threadIdx.x / kWarpSize * HEAD_DIM);
  __syncthreads();
  STORAGE* out_row = out + (row * num_heads + head) * HEAD_DIM;
  for (int dim = threadIdx.x; dim < HEAD_DIM; dim += THREADS) {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += sums[warp * HEAD_DIM + dim];
    out_row[dim] = from_float<STORAGE>(total * softmax.normaliser());
  }
  if (lse != nullptr && threadIdx.x == 0) lse[row * num_heads + head] = softmax.log_sum_exp();
}
