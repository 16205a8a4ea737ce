// Decode attention on tensor cores: the query heads that share a KV head are the rows of a matrix, and one instruction
// multiplies all of them by the keys, or the weights of all of them by the values, of several tokens.
//
// Adds over v2, whose partitions it takes: there every product costs each query head an instruction of its own and heads
// share a load by fours; here a warp answers up to ROWS heads at once (attention_tile.cuh), so that each byte is read
// once for all of them. The warps of a block take chunks of 16 tokens in turns. Tensor cores want their operands in an
// order that lanes do not load them in: a chunk goes through shared memory, by copies that the warp starts, waits for
// and uses; meanwhile other warps of the SM keep memory busy.
//
// Weights are rounded to the storage type before they meet the values, as in FlashAttention; sums are float32.
//
// Measured: 55 to 95 % of the read ceiling (experiments/results/h100-80gb-hbm3/decode.csv, an H100).
//
// Grid:  (num_seqs * num_kv_heads * tiles, partitions), tile of query heads fastest.    Block: (THREADS).
// Dynamic shared memory: WARPS * sizeof(Chunk).
//
// Defines
//   STORAGE      __half or __nv_bfloat16
//   HEAD_DIM     32 to 256, a multiple of 16
//   BLOCK_SIZE   tokens per KV block, 1 to 256
//   ROWS         query heads in a tile, 8 or 16; those past the group are computed and not written
#include "async_copy.cuh"
#include "attention_tile.cuh"
#include "global_memory.cuh"
#include "paged_chunk.cuh"
#include "paged_kv.cuh"
#include "reduce.cuh"
#include "running_attention.cuh"
#include "softmax.cuh"
#include "token_row.cuh"
#include "types.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / kWarpSize;
constexpr int QUADS = HEAD_DIM / 4;   // groups of 4 dimensions: what a thread merges at once

using Tile = AttentionTile<STORAGE, HEAD_DIM, ROWS>;
using Chunk = PagedChunk<STORAGE, HEAD_DIM, BLOCK_SIZE>;
using Strides = KvStrides<HEAD_DIM>;

extern "C" __global__ void __launch_bounds__(THREADS) paged_attention_mma(
    STORAGE* __restrict__ out,                // [num_seqs, num_heads, HEAD_DIM]; written if there is one partition
    float* __restrict__ lse,                  // [num_seqs, num_heads], or null; likewise
    float* __restrict__ partial_out,          // [num_seqs, num_heads, partitions, HEAD_DIM], else: relative to the maximum
    float* __restrict__ partial_state,        // [num_seqs, num_heads, partitions, 2]: maximum and sum
    const STORAGE* __restrict__ query,        // [num_seqs, num_heads, HEAD_DIM]
    const STORAGE* __restrict__ key_cache,    // by the three strides below
    const STORAGE* __restrict__ value_cache,  // likewise
    const int* __restrict__ block_tables,     // [num_seqs, max_blocks], -1 = unmapped
    const int* __restrict__ seq_lens,         // [num_seqs]
    const float scale, const int num_heads, const int group,   // group: query heads per KV head
    const int max_blocks, const int partition_tokens,
    const int key_block_stride, const long long key_head_stride, const int key_slot_stride,
    const int value_block_stride, const long long value_head_stride, const int value_slot_stride) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  __shared__ float max_of_warp[WARPS][ROWS], sum_of_warp[WARPS][ROWS];
  Chunk* const chunks = reinterpret_cast<Chunk*>(dynamic_shared);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;

  const int tiles = (group + ROWS - 1) / ROWS, tiles_of_seq = num_heads / group * tiles;
  const int tile_of_head = blockIdx.x % tiles, kv_head = blockIdx.x % tiles_of_seq / tiles;
  const long long seq = blockIdx.x / tiles_of_seq;
  const int heads = min(ROWS, group - tile_of_head * ROWS);
  const long long first_row = seq * num_heads + kv_head * group + tile_of_head * ROWS;

  const int partitions = gridDim.y, partition = blockIdx.y;
  const int seq_len = load_global(seq_lens + seq), begin = partition * partition_tokens;
  if (begin >= seq_len && partitions > 1) return;   // the whole block
  const Context<BLOCK_SIZE> context{block_tables + seq * max_blocks, begin + min(partition_tokens, seq_len - begin)};
  const Strides key_strides{key_block_stride, key_head_stride, key_slot_stride, 0};
  const Strides value_strides{value_block_stride, value_head_stride, value_slot_stride, 0};

  Chunk& chunk = chunks[warp];
  int first = begin + warp * CHUNK;                       // token of the chunk
  int block_id = context.block_of(first + lane % CHUNK);  // of token lane % 16, looked up a chunk ahead
  Tile tile;
  tile.start(query + first_row * HEAD_DIM, heads, [](int row) { return row * HEAD_DIM; });
  for (; first < context.end; first += WARPS * CHUNK) {
    chunk.start_copy(key_cache, key_strides, value_cache, value_strides, kv_head, first,
                     [&](int row) { return __shfl_sync(kAllLanes, block_id, row); });
    close_copy_group();
    const unsigned mapped = __ballot_sync(kAllLanes, block_id != kUnmapped);   // bit t: whether token t is there
    block_id = context.block_of(first + WARPS * CHUNK + lane % CHUNK);
    wait_for_copies<0>();
    __syncwarp();   // every lane's copies have arrived
    tile.add(chunk.key, chunk.value, [&](float product, int, int token) {
      return (mapped >> token & 1) != 0 ? saturated(product * (scale * kLog2E)) : minus_infinity();
    });
    __syncwarp();   // the chunk has been read: its memory may be written again
  }

  tile.finish();
#pragma unroll
  for (int half = 0; half < Tile::HALVES; ++half)
    if (lane % 4 == 0) {
      max_of_warp[warp][Tile::row_of(half)] = tile.softmax[half].max;
      sum_of_warp[warp][Tile::row_of(half)] = tile.softmax[half].sum;
    }
  tile.store(chunk.as_result(), 0);
  __syncthreads();
  for (int item = threadIdx.x; item < heads * QUADS; item += THREADS) {
    const int head = item / QUADS, dim = item % QUADS * 4;
    RunningAttention<4> all;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float* sum = chunks[w].as_result() + head * Tile::FLOAT_PITCH + dim;
      all.merge(SoftmaxState{max_of_warp[w][head], sum_of_warp[w][head]},
                reinterpret_cast<const Vector<float, 4>*>(sum)->value);
    }
    const long long row = first_row + head;
    if (partitions == 1) {
      Vector<STORAGE, 4> result;
#pragma unroll
      for (int i = 0; i < 4; ++i) result.value[i] = from_float<STORAGE>(all.sum[i] * all.softmax.normaliser());
      *reinterpret_cast<Vector<STORAGE, 4>*>(out + row * HEAD_DIM + dim) = result;
      if (dim == 0 && lse != nullptr) lse[row] = all.softmax.log_sum_exp();
      continue;
    }
    const long long part = row * partitions + partition;
    *reinterpret_cast<Vector<float, 4>*>(partial_out + part * HEAD_DIM + dim) = {
        {all.sum[0], all.sum[1], all.sum[2], all.sum[3]}};
    if (dim == 0) reinterpret_cast<Vector<float, 2>*>(partial_state)[part] = {{all.softmax.max, all.softmax.sum}};
  }
}
