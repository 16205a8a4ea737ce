// Attention of new query tokens over a paged context, of any length a sequence in one launch: whole prompts, chunks of
// prompts over what is there already, single tokens of decoding among them.
//
// Adds over the decode kernels: rows enough that arithmetic is the bottleneck. A tile of query rows (a row is a query
// head of the group of a KV head, token by token, so that few tokens fill a tile too) stays with a thread block, and
// walks over tiles of the context that are copied to shared memory through the block table while the tile before is
// worked on (FlashAttention-2, Dao, arXiv 2307.08691). Where rows are many, each warp has rows of its own and takes all
// tokens of a tile (TOKEN_WARPS 1); where they are few, all warps have the same rows and each takes some of the tokens.
// Tiles that no row sees are skipped, and only those that some row sees part of are masked. Blocks take pieces of the
// work from a queue (prefill_plan.cuh), and start to copy the next before they write the result of the last. A context
// cut into parts is merged by whoever is done last, in the parts' order: the same plan gives the same bits.
//
// Measured on an H100 (experiments/results/h100-80gb-hbm3/prefill.csv): 330 to 350 TFLOP/s on long prompts and chunks,
// 198 on many of 512 tokens without shared heads, 92 % of the read ceiling on four tokens over 4k. What it took and what
// did not help: kernels_cu/TUNING.md.
//
// Grid:  any; as many blocks as run at once is fastest.    Block: (THREADS).
// Dynamic shared memory: query rows, then STAGES tiles of keys and values.
//
// Defines
//   STORAGE        __half or __nv_bfloat16
//   HEAD_DIM       32 to 256, a multiple of 16
//   BLOCK_SIZE     tokens per KV block, 1 to 256
//   GROUP          query heads of a KV head
//   ROW_WARPS      warps that share the rows
//   TOKEN_WARPS    warps that share the tokens of a tile, 1 or 4
//   WARP_ROWS      rows of a warp, 16 or 32
//   HELD_STEPS     of the query, tiles of 16 dimensions that stay in registers
//   BLOCKS_PER_SM  that registers must leave room for
//   CAUSAL         0: every query token sees the whole context
//   and those of variants.cuh and launch_overlap.cuh
#include "async_copy.cuh"
#include "launch_overlap.cuh"
#include "paged_tile.cuh"
#include "prefill_mask.cuh"
#include "prefill_plan.cuh"
#include "prefill_tile.cuh"
#include "running_attention.cuh"

constexpr int TILE_TOKENS = 64;
constexpr int STAGES = 2;                       // one is worked on, one is on the way
constexpr int WARPS = ROW_WARPS * TOKEN_WARPS, THREADS = WARPS * kWarpSize;
constexpr int ROWS = ROW_WARPS * WARP_ROWS;
constexpr int WARP_TOKENS = TILE_TOKENS / TOKEN_WARPS;
constexpr int QUADS = HEAD_DIM / 4;             // groups of 4 dimensions: what a thread merges at once
constexpr int MERGED_AT_ONCE = 4;               // parts that a thread reads side by side
constexpr bool TRANSFORMED = SOFTCAP || ALIBI;  // logits are more than scaled products

using Shared = SwizzledRows<STORAGE, HEAD_DIM>;
using Tile = PrefillTile<STORAGE, HEAD_DIM, WARP_ROWS, WARP_TOKENS, HELD_STEPS>;
using Loader = TileLoader<STORAGE, HEAD_DIM, BLOCK_SIZE, TILE_TOKENS, THREADS>;
using Mask = PrefillMask<TILE_TOKENS>;
using Part = RunningAttention<4>;   // attention over some of the context, of 4 neighbouring dimensions of a row

struct Stage {
  STORAGE key[TILE_TOKENS * HEAD_DIM], value[TILE_TOKENS * HEAD_DIM];
};
struct __align__(128) Memory {
  STORAGE query[ROWS * HEAD_DIM];
  Stage stage[STAGES];
};
static_assert(TOKEN_WARPS == 1 || ROW_WARPS == 1, "warps share the rows, or the tokens");
static_assert(TOKEN_WARPS > 1 ? WARPS * ROWS * sizeof(float) <= 2 * TILE_TOKENS * sizeof(STORAGE) : ROWS <= 2 * TILE_TOKENS,
              "a stage that is no longer read has room for a result");

// What threads tell each other.
struct Exchange {
  PrefillWork work[3];                       // this turn's, the next one's, and what some still write the result of
  unsigned int mapped[STAGES][TILE_TOKENS / 32];
  int context[ROWS];
  float slope[ROWS];                         // of ALiBi
  float max[TOKEN_WARPS][WARP_ROWS], sum[TOKEN_WARPS][WARP_ROWS];
  bool last;                                 // whether all other parts are there
};

// A launch's arguments that are the same for every thread.
struct Call {
  STORAGE* out;
  float* lse;
  float *partial_out, *partial_state;
  int num_kv_heads;
  Variants variants;
};

// Copy this warp's query rows; rows that are not there become zeros.
__device__ __forceinline__ void copy_query(STORAGE* to, const STORAGE* query, const PrefillRows& rows, int first,
                                           int count) {
  const int lane = threadIdx.x % kWarpSize, row_of_lane = first + lane % WARP_ROWS;
  const bool there = row_of_lane < count;
  const long long at = there ? rows.index(row_of_lane) : -1;
  const int share = threadIdx.x / kWarpSize % TOKEN_WARPS;
#pragma unroll
  for (int i = 0; i < WARP_ROWS * Shared::VECTORS / kWarpSize; ++i) {
    if (TOKEN_WARPS > 1 && i % TOKEN_WARPS != share) continue;   // the others' turn
    const int index = i * kWarpSize + lane, row = index / Shared::VECTORS, vector = index % Shared::VECTORS;
    const long long from = __shfl_sync(kAllLanes, at, row);
    start_copy_16(to + Shared::place_of(row, vector), query + max(from, 0LL) * HEAD_DIM + vector * Shared::VEC, from >= 0);
  }
}

// Start with a piece's rows: ask for this warp's query rows, and note what they see.
__device__ __forceinline__ void start_rows(const STORAGE* query, const PrefillRows& rows, const PrefillPiece& piece,
                                           const Variants& variants, int first, STORAGE* to, Exchange& exchange) {
  copy_query(to, query, rows, first, piece.rows);
  close_copy_group();
  const int lane = threadIdx.x % kWarpSize;
  if (lane < WARP_ROWS) {
    const int row = min(first + lane, piece.rows - 1);   // of one that is there, so that others ask for no mask
    exchange.context[first + lane] = rows.context_of(row);
    if (ALIBI) exchange.slope[first + lane] = variants.slope_of(rows.head(row));
  }
}

// Write 4 dimensions of a row's attention over its whole context.
__device__ __forceinline__ void write_row(const Call& call, const PrefillRows& rows, int row, int dim, Part all) {
  const long long at = rows.index(row);
  const float factor = call.variants.add_sink(all.softmax, rows.head(row)) * all.softmax.normaliser();
  Vector<STORAGE, 4> result;
#pragma unroll
  for (int i = 0; i < 4; ++i) result.value[i] = from_float<STORAGE>(all.sum[i] * factor);
  *reinterpret_cast<Vector<STORAGE, 4>*>(call.out + at * HEAD_DIM + dim) = result;
  if (dim == 0 && call.lse != nullptr) call.lse[at] = all.softmax.log_sum_exp();
}

// Write this warp's rows, whose attention over the whole context is in its registers: laid in order in `room`.
__device__ __forceinline__ void write_rows(const Call& call, const PrefillRows& rows, int first, int count, Tile& tile,
                                           STORAGE* room) {   // [WARP_ROWS][HEAD_DIM], by place_of
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = 0; half < Tile::HALVES; ++half) {
    const int row = first + Tile::row_of(half);
    const bool there = row < count;
    SoftmaxState& softmax = tile.softmax[half];
    const float factor = call.variants.add_sink(softmax, rows.head(there ? row : 0)) * softmax.normaliser();
#pragma unroll
    for (int i = 0; i < 2 * Tile::STEPS; ++i) {
      const float* value = tile.out[half / 2][i].value + half % 2 * 2;
      *reinterpret_cast<unsigned*>(room + Shared::place_of(Tile::row_of(half), i) + lane % 4 * 2) =
          pack_pair(value[0] * factor, value[1] * factor, STORAGE());
    }
    if (there && lane % 4 == 0 && call.lse != nullptr) call.lse[rows.index(row)] = softmax.log_sum_exp();
  }
  __syncwarp();   // all of the rows are there
  const int row_of_lane = first + lane % WARP_ROWS;
  const long long at = row_of_lane < count ? rows.index(row_of_lane) : -1;
#pragma unroll
  for (int i = 0; i < WARP_ROWS * Shared::VECTORS / kWarpSize; ++i) {
    const int index = i * kWarpSize + lane, row = index / Shared::VECTORS, vector = index % Shared::VECTORS;
    const long long to = __shfl_sync(kAllLanes, at, row);
    if (to >= 0)
      *reinterpret_cast<Vector<STORAGE, 8>*>(call.out + to * HEAD_DIM + vector * Shared::VEC) =
          *reinterpret_cast<const Vector<STORAGE, 8>*>(room + Shared::place_of(row, vector));
  }
}

// Leave this warp's rows of a part of the context.
__device__ __forceinline__ void store_part(const Call& call, long long part, int first, int count, const Tile& tile) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = 0; half < Tile::HALVES; ++half) {
    const int row = first + Tile::row_of(half);
    if (row >= count) continue;
    const long long at = part * ROWS + row;
#pragma unroll
    for (int i = 0; i < 2 * Tile::STEPS; ++i) {
      const float* value = tile.out[half / 2][i].value + half % 2 * 2;
      __stcg(reinterpret_cast<float2*>(call.partial_out + at * HEAD_DIM + i * 8 + lane % 4 * 2),
             make_float2(value[0], value[1]));
    }
    if (lane % 4 == 0)
      __stcg(reinterpret_cast<float2*>(call.partial_state) + at,
             make_float2(tile.softmax[half].max, tile.softmax[half].sum));
  }
}

// Merge the warps' results over their tokens, laid open in `room`, and write the rows, or leave them as a part.
__device__ __forceinline__ void merge_warps(const Call& call, const PrefillRows& rows, const PrefillPiece& piece,
                                            long long part, const Tile& tile, Exchange& exchange,
                                            float* room) {   // [WARPS][ROWS][HEAD_DIM]
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = 0; half < Tile::HALVES; ++half) {
    const int row = Tile::row_of(half);
#pragma unroll
    for (int i = 0; i < 2 * Tile::STEPS; ++i) {
      const float* value = tile.out[half / 2][i].value + half % 2 * 2;
      float* to = room + (warp * ROWS + row) * HEAD_DIM + i * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = make_float2(value[0], value[1]);
    }
    if (lane % 4 == 0) exchange.max[warp][row] = tile.softmax[half].max, exchange.sum[warp][row] = tile.softmax[half].sum;
  }
  __syncthreads();
  for (int item = threadIdx.x; item < piece.rows * QUADS; item += THREADS) {
    const int row = item / QUADS, dim = item % QUADS * 4;
    SoftmaxState softmax[WARPS];
    Vector<float, 4> sum[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      sum[w] = *reinterpret_cast<const Vector<float, 4>*>(room + (w * ROWS + row) * HEAD_DIM + dim);
      softmax[w].max = exchange.max[w][row], softmax[w].sum = exchange.sum[w][row];
    }
    Part all;
    all.merge(softmax, sum);
    if (piece.parts == 1) {
      write_row(call, rows, row, dim, all);
      continue;
    }
    const long long at = part * ROWS + row;
    __stcg(reinterpret_cast<float4*>(call.partial_out + at * HEAD_DIM + dim),
           make_float4(all.sum[0], all.sum[1], all.sum[2], all.sum[3]));
    if (dim == 0) __stcg(reinterpret_cast<float2*>(call.partial_state) + at, make_float2(all.softmax.max, all.softmax.sum));
  }
}

// Merge the parts of a piece's context, in their order.
__device__ __forceinline__ void merge_parts(const Call& call, const PrefillRows& rows, const PrefillPiece& piece,
                                            long long first_part) {
  for (int item = threadIdx.x; item < piece.rows * QUADS; item += THREADS) {
    const int row = item / QUADS, dim = item % QUADS * 4;
    Part all;
    for (int first = 0; first < piece.parts; first += MERGED_AT_ONCE) {
      SoftmaxState softmax[MERGED_AT_ONCE];   // of nothing, past the last part
      float sum[MERGED_AT_ONCE][4] = {};
#pragma unroll
      for (int i = 0; i < MERGED_AT_ONCE; ++i)
        if (first + i < piece.parts) {
          const long long at = (first_part + first + i) * ROWS + row;
          const float2 state = __ldcg(reinterpret_cast<const float2*>(call.partial_state) + at);
          const float4 value = __ldcg(reinterpret_cast<const float4*>(call.partial_out + at * HEAD_DIM + dim));
          softmax[i].max = state.x, softmax[i].sum = state.y;
          sum[i][0] = value.x, sum[i][1] = value.y, sum[i][2] = value.z, sum[i][3] = value.w;
        }
      all.merge(softmax, sum);
    }
    write_row(call, rows, row, dim, all);
  }
}

// Turn products into logits.
__device__ __forceinline__ void transform(Tile::Products& product, const Mask& mask, const Exchange& exchange,
                                          int first_row, int first_token, float factor) {
#pragma unroll
  for (int half = 0; half < Tile::HALVES; ++half) {
    const int row = first_row + Tile::row_of(half), context = exchange.context[row];
    const float slope = ALIBI ? exchange.slope[row] : 0.0f;
#pragma unroll
    for (int i = 0; i < Tile::EIGHTS; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& logit = product[half / 2][i].value[half % 2 * 2 + j];
        logit = mask.variants.logit(logit * factor, mask.first + first_token + Tile::token_of(i, j), context, slope);
      }
  }
}

// Leave out tokens that a row does not see.
__device__ __forceinline__ void leave_out(Tile::Products& product, const Mask& mask, const Exchange& exchange,
                                          int first_row, int first_token) {
#pragma unroll
  for (int half = 0; half < Tile::HALVES; ++half) {
    const unsigned long long seen =
        mask.seen_by(exchange.context[first_row + Tile::row_of(half)]) >> (first_token + Tile::token_of(0, 0));
#pragma unroll
    for (int i = 0; i < Tile::EIGHTS; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& logit = product[half / 2][i].value[half % 2 * 2 + j];
        logit = (seen >> (8 * i + j) & 1) != 0 ? logit : minus_infinity();
      }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) paged_prefill(
    STORAGE* __restrict__ out,                // [total_tokens, num_heads, HEAD_DIM]
    float* __restrict__ lse,                  // [total_tokens, num_heads], or null
    float* partial_out,                       // [max_slots, ROWS, HEAD_DIM], work space
    float* partial_state,                     // [max_slots, ROWS, 2], work space: maximum and sum
    unsigned int* arrivals,                   // [1 + max_slots], zeros before and after; [0] is the queue
    const STORAGE* query,                     // [total_tokens, num_heads, HEAD_DIM]
    const STORAGE* __restrict__ key_cache,    // by the strides below
    const STORAGE* __restrict__ value_cache,  // likewise
    const int* block_tables,                  // [num_seqs, max_blocks], -1 = unmapped
    const int* summary,                       // [2], the plan's: how many pieces, and the KV heads of a section
    const int* pieces,                        // [max_pieces, 12], the plan's PrefillPieces
    const float scale, const int num_kv_heads, const int max_blocks,
    const int block_stride, const long long head_stride, const int slot_stride,   // of keys and of values
    const int window, const float softcap,
    const float* alibi_slopes,                // [num_heads], read if ALIBI
    const float* sinks) {                     // [num_heads], read if SINKS
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  __shared__ Exchange exchange;
  Memory& memory = *reinterpret_cast<Memory*>(dynamic_shared);
  const int warp = threadIdx.x / kWarpSize;
  const int warp_row = warp / TOKEN_WARPS * WARP_ROWS, warp_token = warp % TOKEN_WARPS * WARP_TOKENS;
  STORAGE* const warp_query = memory.query + warp_row * HEAD_DIM;
  const Call call{out, lse, partial_out, partial_state, num_kv_heads, {0, window, softcap, alibi_slopes, sinks}};
  const Variants& variants = call.variants;
  wait_for_kernel_before();
  const PrefillQueue queue{reinterpret_cast<const PrefillPiece*>(pieces), load_global(summary), load_global(summary + 1),
                           num_kv_heads};
  const int total = queue.count * num_kv_heads;
  if (static_cast<int>(blockIdx.x) >= total) return;

  const auto loader_of = [&](const PrefillWork& work) {
    const PrefillPiece& piece = work.piece;
    const int shortest = piece.context + piece.first_row / GROUP;
    const int longest = piece.context + (piece.first_row + piece.rows - 1) / GROUP;
    return Loader{work.kv_head * head_stride, block_stride, slot_stride,
                  BlockTable(block_tables, piece.seq, max_blocks), max_blocks,
                  variants.first_token(shortest), CAUSAL ? longest : piece.seq_len, {}};
  };
  int used = 0;   // tiles: the next is in stage used % STAGES, or on its way there
  const auto start_copy = [&](Loader& loader, int tile, int stage, int end) {
    loader.start_copy(key_cache, value_cache, tile, memory.stage[stage].key, memory.stage[stage].value,
                      exchange.mapped[stage]);
    close_copy_group();
    if (tile + 1 < end) loader.look_up(tile + 1);
  };
  const auto rows_of = [&](const PrefillWork& work) { return PrefillRows(work, GROUP, num_kv_heads * GROUP); };
  // Start with a piece: look its first tile up, and copy its rows and that tile.
  const auto start = [&](const PrefillWork& work, int stage) {
    Loader loader = loader_of(work);
    loader.look_up(work.piece.begin);
    start_rows(query, rows_of(work), work.piece, variants, warp_row, warp_query, exchange);
    start_copy(loader, work.piece.begin, stage, work.piece.end);
    return loader;
  };
  if (threadIdx.x == 0) queue.start_copy(exchange.work[0], blockIdx.x);
  wait_for_copies<0>();
  __syncthreads();   // the first piece is there
  Loader loader = start(exchange.work[0], 0);

  Tile tile;
  for (int turn = 0;; turn = (turn + 1) % 3) {
    const PrefillWork& work = exchange.work[turn];
    PrefillWork& next = exchange.work[(turn + 1) % 3];
    if (threadIdx.x == 0) queue.start_copy(next, gridDim.x + atomicInc(arrivals, total - 1));
    const bool busy = warp_row < work.piece.rows;   // whether this warp has rows
    const int begin = work.piece.begin, end = work.piece.end;
    tile.start();
    for (int t = begin; t < end; ++t, ++used) {
      const int stage = used % STAGES;
      wait_for_copies<0>();
      __syncthreads();   // everyone's copies have arrived, and the tile before is no longer read
      if (t + 1 < end) start_copy(loader, t + 1, 1 - stage, end);
      if (!busy) continue;
      if (t == begin) tile.hold(warp_query);
      const Mask mask{variants, t * TILE_TOKENS, exchange.mapped[stage]};
      const int shortest = exchange.context[warp_row], longest = exchange.context[warp_row + WARP_ROWS - 1];
      if (mask.nothing_seen(shortest, longest)) continue;
      Tile::Products product;
      tile.multiply(product, warp_query, memory.stage[stage].key + warp_token * HEAD_DIM);
      const bool find_largest = tile.wants_logits();
      float factor = scale * kLog2E;
      if (TRANSFORMED || factor <= 0.0f || find_largest) {   // only a positive factor can wait: it keeps the order
        transform(product, mask, exchange, warp_row, warp_token, factor);
        factor = 1.0f;
      }
      if (!mask.all_seen(shortest, longest)) leave_out(product, mask, exchange, warp_row, warp_token);
      tile.add(product, factor, find_largest, memory.stage[stage].value + warp_token * HEAD_DIM);
    }
    __syncthreads();   // all tiles have been read

    // The next piece's first tile and its rows are on their way while this one's result is written.
    const bool more = next.kv_head >= 0;
    if (!more) start_kernel_after();
    if (more) loader = start(next, used % STAGES);
    const PrefillPiece& piece = work.piece;
    const PrefillRows rows = rows_of(work);
    const long long first_part = static_cast<long long>(piece.slot) * num_kv_heads + work.kv_head * piece.parts;
    Stage& room = memory.stage[(used + 1) % STAGES];   // not the one that is filled now
    tile.finish();
    if constexpr (TOKEN_WARPS > 1) {
      merge_warps(call, rows, piece, first_part + piece.part, tile, exchange, reinterpret_cast<float*>(&room));
    } else if (piece.parts > 1) {
      store_part(call, first_part + piece.part, warp_row, piece.rows, tile);
    } else if (busy) {
      write_rows(call, rows, warp_row, piece.rows, tile, reinterpret_cast<STORAGE*>(&room) + warp_row * HEAD_DIM);
    }
    if (piece.parts > 1) {
      __syncthreads();   // this part is there
      if (threadIdx.x == 0) {   // its fences stand for the whole block: others need not wait for their copies
        const unsigned others = static_cast<unsigned>(piece.parts - 1);
        fence_device();
        exchange.last = atomicInc(arrivals + 1 + first_part, others) == others;   // back to 0 for the next launch
        fence_device();
      }
      __syncthreads();
      if (exchange.last) merge_parts(call, rows, piece, first_part);
    }
    if (!more) return;
  }
}
