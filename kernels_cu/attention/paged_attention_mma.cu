// Decode attention at the speed of memory: every byte of the cache is read once, by copies that are always under way,
// and the tensor cores answer all query heads of a KV head at once.
//
// Adds over v1: the query heads of a KV head are the rows of one tile, so that its keys and values are read once for all
// of them; each warp has a ring of chunks of 16 tokens in shared memory that copies fill while earlier ones are used,
// across the borders of sequences, with no barrier of the block in between; and the work is shared out by chunks, not by
// sequences (decode_plan.cuh). Where several blocks share a (sequence, head tile), the last of them to finish merges
// their results, in the order of the line: the same plan gives the same bits.
//
// Measured (experiments/results/h100-80gb-hbm3/decode.csv, kernels_cu/README.md): 82 to 88 % of the read ceiling of an
// H100 on large batches and long contexts, less on small ones, where the prologue and the merge are not hidden. SMs
// differ in speed and each has an equal stretch: the fast ones wait at the end.
//
// Weights are rounded to the storage type before they meet the values, as in FlashAttention; sums are float32.
//
// Grid:  any number of blocks, the plan's.    Block: (THREADS).
// Dynamic shared memory: WARPS * STAGES * sizeof(Chunk).
//
// Defines
//   STORAGE       __half or __nv_bfloat16
//   HEAD_DIM      32 to 256, a multiple of 16
//   BLOCK_SIZE    tokens per KV block, 1 to 256
//   ROWS          query heads in a tile, 8 or 16: the tensor cores take 16, the rest is zeros and left out where possible
//   STAGES        chunks in a warp's ring
#include "async_copy.cuh"
#include "decode_plan.cuh"
#include "mma.cuh"
#include "paged_kv.cuh"
#include "reduce.cuh"
#include "softmax.cuh"
#include "types.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / kWarpSize;
constexpr int HALVES = ROWS / 8;               // a lane has one query head of each 8 in a tile
constexpr int VEC = kValuesPer16Bytes<STORAGE>;
constexpr int VECTORS = HEAD_DIM / VEC;        // 16-byte vectors in a token's row
constexpr int STEPS = HEAD_DIM / 16;           // tiles of 16 dimensions
constexpr int PITCH = HEAD_DIM + VEC;          // elements between rows in shared memory: no two of 8 rows share a bank

using Strides = KvStrides<HEAD_DIM>;

struct __align__(16) Chunk {
  STORAGE key[CHUNK * PITCH], value[CHUNK * PITCH];
};

// What a warp's copies need to know about one token of a chunk: lane l looks after token l % 16.
struct TokenPlace {
  int block_id, slot;

  __device__ __forceinline__ void look_up(const Cursor& at, const int* block_tables, const int* seq_lens, int max_blocks) {
    const int token = at.chunk * CHUNK + threadIdx.x % CHUNK;
    block_id = kUnmapped;
    slot = static_cast<unsigned>(token) % BLOCK_SIZE;
    if (token < load_global(seq_lens + at.seq))
      block_id = load_global(block_tables + static_cast<long long>(at.seq) * max_blocks +
                             static_cast<unsigned>(token) / BLOCK_SIZE);
  }
};

// Start the copies of a chunk. Rows of tokens that are not there become zeros: what lies in their slots may be NaN.
__device__ __forceinline__ void start_chunk(Chunk& chunk, const TokenPlace& place, int kv_head, const STORAGE* key_cache,
                                            const STORAGE* value_cache, const Strides& key, const Strides& value) {
#pragma unroll
  for (int i = 0; i < CHUNK * VECTORS / kWarpSize; ++i) {
    const int index = i * kWarpSize + threadIdx.x % kWarpSize;
    const int row = index / VECTORS, dim = index % VECTORS * VEC;
    const int block_id = __shfl_sync(kAllLanes, place.block_id, row);
    const int slot = __shfl_sync(kAllLanes, place.slot, row);
    const bool there = block_id != kUnmapped;
    start_copy_16(chunk.key + row * PITCH + dim, key_cache + key.offset(there ? block_id : 0, kv_head, slot, dim), there);
    start_copy_16(chunk.value + row * PITCH + dim, value_cache + value.offset(there ? block_id : 0, kv_head, slot, dim),
                  there);
  }
}

// A warp's running attention of a tile of query heads: this lane has heads l/4 and, of 16, l/4 + 8.
struct TileState {
  ResultTile out[2 * STEPS];
  SoftmaxState softmax[HALVES];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (ResultTile& tile : out) tile = {};
#pragma unroll
    for (SoftmaxState& state : softmax) state = SoftmaxState();
  }

  // Take in a chunk; bit t of `mapped` says whether its token t takes part.
  __device__ __forceinline__ void add(const Chunk& chunk, const LeftTile (&query)[STEPS], float scale, unsigned mapped) {
    const int lane = threadIdx.x % kWarpSize;
    ResultTile logit[2] = {};   // [16 heads, 8 tokens] each
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      unsigned int key[4];      // tokens 0-7 and 8-15, each as two tiles of 8 dimensions
      load_matrices(key, chunk.key + (lane / 16 * 8 + lane % 8) * PITCH + step * 16 + lane / 8 % 2 * 8);
      multiply_add(logit[0], query[step], RightTile{key[0], key[1]}, STORAGE());
      multiply_add(logit[1], query[step], RightTile{key[2], key[3]}, STORAGE());
    }
    LeftTile weight = {};       // [16 heads, 16 tokens]
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {   // heads l/4, then l/4 + 8
      float value[4];
      float largest = minus_infinity();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = i / 2 * 8 + lane % 4 * 2 + i % 2;
        value[i] = (mapped >> token & 1) != 0 ? logit[i / 2].value[2 * half + i % 2] * scale : minus_infinity();
        largest = fmaxf(largest, value[i]);
      }
      const float factor = softmax[half].raise(warp_reduce<Max, 1, 4>(largest));
#pragma unroll
      for (ResultTile& tile : out) tile.value[2 * half] *= factor, tile.value[2 * half + 1] *= factor;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        value[i] = softmax_weight(value[i], softmax[half].max);
        softmax[half].sum += value[i];       // this lane's tokens only, until `finish`
      }
      weight.pair[half] = pack_pair(value[0], value[1], STORAGE());
      weight.pair[half + 2] = pack_pair(value[2], value[3], STORAGE());
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      unsigned int pair[4];     // dimensions 0-7 and 8-15 of the step, each as two tiles of 8 tokens
      load_matrices_transposed(pair, chunk.value + (lane / 8 % 2 * 8 + lane % 8) * PITCH + step * 16 + lane / 16 * 8);
      multiply_add(out[2 * step], weight, RightTile{pair[0], pair[1]}, STORAGE());
      multiply_add(out[2 * step + 1], weight, RightTile{pair[2], pair[3]}, STORAGE());
    }
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < HALVES; ++half) softmax[half].sum = warp_reduce<Sum, 1, 4>(softmax[half].sum);
  }
};

// What the warps of a block agree on when a segment of the line is done.
struct Exchange {
  float max[WARPS][ROWS], sum[WARPS][ROWS];
  float out[2][ROWS][HEAD_DIM];   // of warps 0 and 2, of warps 1 and 3
  bool last;
};

// Read the query heads of a tile, as the left operand; rows past the group are zeros.
__device__ __forceinline__ void load_query(LeftTile (&tile)[STEPS], const STORAGE* first_head, int rows) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i % 2 * 8, dim = step * 16 + i / 2 * 8 + lane % 4 * 2;
      tile[step].pair[i] =
          load_global_if(row < rows, reinterpret_cast<const unsigned int*>(first_head + row * HEAD_DIM + dim));
    }
}

// Scale each warp's result to the block's maximum and add them up in shared memory, two warps at a time.
__device__ __forceinline__ void combine_warps(Exchange& exchange, TileState& state) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  state.finish();
#pragma unroll
  for (int half = 0; half < HALVES; ++half)
    if (lane % 4 == 0) {
      exchange.max[warp][lane / 4 + 8 * half] = state.softmax[half].max;
      exchange.sum[warp][lane / 4 + 8 * half] = state.softmax[half].sum;
    }
  __syncthreads();
#pragma unroll
  for (int turn = 0; turn < WARPS / 2; ++turn) {
    if (warp / 2 == turn) {
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        const int row = lane / 4 + 8 * half;
        float max = exchange.max[0][row];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) max = fmaxf(max, exchange.max[w][row]);
        const float factor = softmax_weight(state.softmax[half].max, max);
#pragma unroll
        for (int tile = 0; tile < 2 * STEPS; ++tile)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& sum = exchange.out[warp % 2][row][tile * 8 + lane % 4 * 2 + i];
            const float value = state.out[tile].value[2 * half + i] * factor;
            sum = turn == 0 ? value : sum + value;
          }
      }
    }
    __syncthreads();
  }
}

// The block's softmax of a row, from its warps'.
__device__ __forceinline__ SoftmaxState state_of(const Exchange& exchange, int row) {
  SoftmaxState all;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) {
    all.raise(exchange.max[warp][row]);
    all.sum += exchange.sum[warp][row] * softmax_weight(exchange.max[warp][row], all.max);
  }
  return all;
}

// Merge the parts that blocks left of a tile, in their order. All loads of a pass are independent of each other.
__device__ __forceinline__ void merge_parts(STORAGE* out,                 // [rows, HEAD_DIM]
                                            float* lse,                   // [rows], or null
                                            const float* partial_out,     // [blocks, 2, ROWS, HEAD_DIM]
                                            const float* partial_state,   // [blocks, 2, ROWS, 2]
                                            int first_block, int last_block, int rows) {
  for (int i = threadIdx.x * 4; i < rows * HEAD_DIM; i += THREADS * 4) {
    const int row = i / HEAD_DIM;
    const auto part_of = [=](int block) { return 2ll * block + (block == first_block); };
    SoftmaxState all;
#pragma unroll 8
    for (int block = first_block; block <= last_block; ++block)
      all.max = fmaxf(all.max, __ldcg(partial_state + (part_of(block) * ROWS + row) * 2));
    float sum[4] = {};
#pragma unroll 8
    for (int block = first_block; block <= last_block; ++block) {
      const float2 state = __ldcg(reinterpret_cast<const float2*>(partial_state) + part_of(block) * ROWS + row);
      const float4 value = __ldcg(reinterpret_cast<const float4*>(partial_out + part_of(block) * ROWS * HEAD_DIM + i));
      const float weight = softmax_weight(state.x, all.max);
      all.sum += state.y * weight;
      sum[0] += value.x * weight, sum[1] += value.y * weight, sum[2] += value.z * weight, sum[3] += value.w * weight;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) out[i + j] = from_float<STORAGE>(sum[j] * all.normaliser());
    if (lse != nullptr && i % HEAD_DIM == 0) lse[row] = all.log_sum_exp();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) paged_attention_mma(
    STORAGE* __restrict__ out,                // [num_seqs, num_heads, HEAD_DIM]
    float* __restrict__ lse,                  // [num_seqs, num_heads], or null
    float* partial_out,                       // [gridDim.x, 2, ROWS, HEAD_DIM], work space
    float* partial_state,                     // [gridDim.x, 2, ROWS, 2], work space: maximum and sum
    unsigned int* arrivals,                   // [gridDim.x], zeros before and after
    const STORAGE* __restrict__ query,        // [num_seqs, num_heads, HEAD_DIM]
    const STORAGE* __restrict__ key_cache,    // by the strides below
    const STORAGE* __restrict__ value_cache,  // likewise
    const int* __restrict__ block_tables,     // [num_seqs, max_blocks], -1 = unmapped
    const int* __restrict__ seq_lens,         // [num_seqs]
    const int* __restrict__ offsets,          // [num_seqs + 1], the plan's
    const int* __restrict__ first_seq,        // [gridDim.x], the plan's
    const float scale, const int num_seqs, const int num_kv_heads, const int group, const int max_blocks,
    const int key_block_stride, const long long key_head_stride, const int key_slot_stride,
    const int value_block_stride, const long long value_head_stride, const int value_slot_stride) {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  __shared__ Exchange exchange;
  const int warp = threadIdx.x / kWarpSize;
  Chunk* ring = reinterpret_cast<Chunk*>(dynamic_shared) + warp * STAGES;
  const Strides key_strides{key_block_stride, key_head_stride, key_slot_stride, 0};
  const Strides value_strides{value_block_stride, value_head_stride, value_slot_stride, 0};
  const int tiles_per_kv_head = (group + ROWS - 1) / ROWS;
  const DecodePlan plan{offsets, num_seqs, num_kv_heads * tiles_per_kv_head};
  const int total = plan.total();

  // Sequences of length 0 are in nobody's share.
  const int num_heads = num_kv_heads * group;
  for (int seq = blockIdx.x; seq < num_seqs; seq += gridDim.x)
    if (load_global(seq_lens + seq) == 0)
      for (int i = threadIdx.x; i < num_heads * HEAD_DIM; i += THREADS) {
        out[static_cast<long long>(seq) * num_heads * HEAD_DIM + i] = from_float<STORAGE>(0.0f);
        if (lse != nullptr && i < num_heads) lse[static_cast<long long>(seq) * num_heads + i] = minus_infinity();
      }

  const int blocks = DecodePlan::sharing_blocks(gridDim.x, total);
  if (blockIdx.x >= blocks) return;
  const int begin = DecodePlan::first_of(blockIdx.x, blocks, total);
  const int end = DecodePlan::first_of(blockIdx.x + 1, blocks, total);

  // Fill the ring, all but one place; the table entries of the chunk after that are on their way.
  Cursor segment, use, load;
  segment.start(plan, begin, load_global(first_seq + blockIdx.x));
  use = segment;
  use.advance(plan, warp);
  load = use;
  TokenPlace place = {kUnmapped, 0};
  if (load.line < end) place.look_up(load, block_tables, seq_lens, max_blocks);
  unsigned mapped[STAGES];
  int stage = 0;
  const auto load_next = [&](unsigned& mapped_here, Chunk& chunk) {
    mapped_here = __ballot_sync(kAllLanes, place.block_id != kUnmapped);
    if (load.line < end) {
      start_chunk(chunk, place, load.tile / tiles_per_kv_head, key_cache, value_cache, key_strides, value_strides);
      load.advance(plan, WARPS);
      if (load.line < end) place.look_up(load, block_tables, seq_lens, max_blocks);
    }
    close_copy_group();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) load_next(mapped[i], ring[i]);

  TileState state;
  LeftTile query_tile[STEPS];
  while (segment.line < end) {
    const int first_row = segment.tile % tiles_per_kv_head * ROWS;
    const int rows = min(ROWS, group - first_row);
    const int first_head = segment.tile / tiles_per_kv_head * group + first_row;
    const int segment_end = min(end, segment.line + segment.chunks - segment.chunk);
    const long long head_row = static_cast<long long>(segment.seq) * num_heads + first_head;
    load_query(query_tile, query + head_row * HEAD_DIM, rows);
    state.clear();
    for (; use.line < segment_end; use.advance(plan, WARPS)) {
      wait_for_copies<STAGES - 2>();
      __syncwarp();                       // every lane's copies have arrived, and the chunk before is no longer read
      const int free_stage = stage == 0 ? STAGES - 1 : stage - 1;
      unsigned mapped_here = 0;
#pragma unroll
      for (int i = 0; i < STAGES; ++i) mapped_here = i == stage ? mapped[i] : mapped_here;
      unsigned mapped_next = 0;
      load_next(mapped_next, ring[free_stage]);
#pragma unroll
      for (int i = 0; i < STAGES; ++i) mapped[i] = i == free_stage ? mapped_next : mapped[i];
      state.add(ring[stage], query_tile, scale * kLog2E, mapped_here);
      stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    combine_warps(exchange, state);

    // Alone with this tile: write the result. Else leave a part, and merge all of them if they are all there.
    const int tile_begin = segment.line - segment.chunk, tile_end = tile_begin + segment.chunks;
    const int first_block = DecodePlan::block_of(tile_begin, blocks, total);
    const int last_block = DecodePlan::block_of(tile_end - 1, blocks, total);
    if (first_block == last_block) {
      for (int i = threadIdx.x; i < rows * HEAD_DIM; i += THREADS) {
        const int row = i / HEAD_DIM, dim = i % HEAD_DIM;
        const float sum = exchange.out[0][row][dim] + exchange.out[1][row][dim];
        out[head_row * HEAD_DIM + i] = from_float<STORAGE>(sum * state_of(exchange, row).normaliser());
      }
      if (lse != nullptr && threadIdx.x < rows) lse[head_row + threadIdx.x] = state_of(exchange, threadIdx.x).log_sum_exp();
    } else {
      const long long part = 2ll * blockIdx.x + (blockIdx.x == first_block);
      for (int i = threadIdx.x; i < rows * HEAD_DIM; i += THREADS)
        partial_out[part * ROWS * HEAD_DIM + i] =
            exchange.out[0][i / HEAD_DIM][i % HEAD_DIM] + exchange.out[1][i / HEAD_DIM][i % HEAD_DIM];
      if (threadIdx.x < rows) {
        const SoftmaxState mine = state_of(exchange, threadIdx.x);
        partial_state[(part * ROWS + threadIdx.x) * 2] = mine.max;
        partial_state[(part * ROWS + threadIdx.x) * 2 + 1] = mine.sum;
      }
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        const unsigned others = static_cast<unsigned>(last_block - first_block);
        exchange.last = atomicInc(arrivals + first_block, others) == others;   // back to 0 for the next launch
      }
      __syncthreads();
      if (exchange.last) {
        __threadfence();
        merge_parts(out + head_row * HEAD_DIM, lse == nullptr ? nullptr : lse + head_row, partial_out, partial_state,
                    first_block, last_block, rows);
      }
    }
    segment.advance(plan, segment_end - segment.line);
    __syncthreads();   // the exchange may be written again
  }
}
