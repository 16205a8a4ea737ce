// Share out prefill work on the device, from lengths that the host need not know: cut the rows of each sequence into
// tiles, cut the contexts of those that would outlast all others into parts, and list the pieces, the longest first
// (prefill_plan.cuh). A counting sort by length suffices: the order of pieces as long as each other does not matter.
//
// Measured with paged_prefill, of whose time it is part.
//
// Grid:  1.    Block: (THREADS).
#include "global_memory.cuh"
#include "prefill_plan.cuh"
#include "reduce.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / kWarpSize;
constexpr int BINS = THREADS;   // lengths that are told apart

__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// What every thread must know to cut a sequence into tiles.
struct Cut {
  const int *seq_lens, *query_start;
  int total_tokens, group, rows, tile_tokens, window;
  bool causal;

  __device__ __forceinline__ int start_of(int seq) const {
    return min(max(load_global(query_start + seq), 0), total_tokens);
  }

  // The tiles of a sequence's rows.
  __device__ __forceinline__ int tiles_of(int seq) const {
    const int tokens = start_of(seq + 1) - start_of(seq);
    return divide_up(max(tokens, 0) * group, rows);
  }
  // One of them, over all tokens that some row sees.
  __device__ __forceinline__ PrefillPiece piece_of(int seq, int tile) const {
    PrefillPiece piece = {};
    piece.seq = seq;
    piece.first_token = start_of(seq);
    const int tokens = start_of(seq + 1) - piece.first_token;
    piece.first_row = tile * rows;
    piece.rows = min(rows, tokens * group - piece.first_row);
    piece.seq_len = load_global(seq_lens + seq);
    piece.context = piece.seq_len - tokens + 1;
    const int shortest = piece.context + piece.first_row / group;
    const int longest = piece.context + (piece.first_row + piece.rows - 1) / group;
    piece.begin = max(0, max(0, shortest) - window) / tile_tokens;
    piece.end = max(piece.begin + 1, divide_up(max(0, causal ? longest : piece.seq_len), tile_tokens));   // one at least
    piece.parts = 1;
    return piece;
  }
};

// Have each warp visit sequences of its own, its lanes their tiles.
template <typename Visit>
__device__ __forceinline__ void for_each_piece(const Cut& cut, int num_seqs, Visit visit) {
  for (int seq = threadIdx.x / kWarpSize; seq < num_seqs; seq += WARPS)
    for (int tile = threadIdx.x % kWarpSize, tiles = cut.tiles_of(seq); tile < tiles; tile += kWarpSize)
      visit(cut.piece_of(seq, tile));
}

extern "C" __global__ void __launch_bounds__(THREADS) plan_prefill(
    int* __restrict__ summary,             // [2], how many pieces, and the KV heads of a section
    int* __restrict__ pieces,              // [max_pieces, 12], PrefillPieces, in the order in which they are taken
    const int* __restrict__ seq_lens,      // [num_seqs]
    const int* __restrict__ query_start,   // [num_seqs + 1], the first query token of each sequence, and the end
    const int num_seqs, const int total_tokens, const int num_kv_heads, const int group,
    const int rows, const int tile_tokens,            // of a tile
    const int causal, const int window,
    const int blocks,                                 // thread blocks that run at once
    const float uncut, const float parts_a_share,     // shares of the work up to which a piece is left whole; else cut
    const int min_part,                               // tiles
    const int cached_tokens) {                        // of a head, whose keys and values stay in the L2 cache
  __shared__ unsigned long long total, tokens_read, query_tokens;
  __shared__ int longest, slots, count_of[BINS], sum_of_warp[WARPS];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Cut cut{seq_lens, query_start, total_tokens, group, rows, tile_tokens, window, causal != 0};

  if (threadIdx.x == 0) total = 0, tokens_read = 0, query_tokens = 0, longest = 1, slots = 0;
  count_of[threadIdx.x] = 0;
  __syncthreads();
  for_each_piece(cut, num_seqs, [&](const PrefillPiece& piece) {
    atomicAdd(&total, static_cast<unsigned long long>(piece.tiles()));
    atomicMax(&longest, piece.tiles());
    if (piece.first_row == 0) {
      atomicAdd(&tokens_read, static_cast<unsigned long long>(piece.seq_len));
      atomicAdd(&query_tokens, static_cast<unsigned long long>(piece.seq_len - piece.context + 1));
    }
  });
  __syncthreads();
  if (query_tokens > static_cast<unsigned long long>(total_tokens)) {   // starts that fall: there is no room for more
    if (threadIdx.x == 0) summary[0] = 0, summary[1] = 1;
    return;
  }
  const float share = fmaxf(1.0f, static_cast<float>(total) * num_kv_heads / blocks);
  const auto parts_of = [&](const PrefillPiece& piece) {
    const float shares = piece.tiles() / share;
    const int parts = shares <= uncut ? 1 : static_cast<int>(shares * parts_a_share);
    return max(1, min(parts, piece.tiles() / min_part));
  };
  const auto bin_of = [&](const PrefillPiece& piece) {   // the longest pieces come first
    const int tiles = piece.tiles() / parts_of(piece);
    return BINS - 1 - static_cast<int>(static_cast<long long>(tiles) * (BINS - 1) / longest);
  };

  for_each_piece(cut, num_seqs, [&](const PrefillPiece& piece) { atomicAdd(&count_of[bin_of(piece)], parts_of(piece)); });
  __syncthreads();
  int before = count_of[threadIdx.x];   // pieces in this thread's bin and all before it, then in those before it
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int of_lane = __shfl_up_sync(kAllLanes, before, distance);
    if (lane >= distance) before += of_lane;
  }
  if (lane == kWarpSize - 1) sum_of_warp[warp] = before;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before += sum_of_warp[w];
  if (threadIdx.x == THREADS - 1) {
    const int fitting = static_cast<int>(min(static_cast<unsigned long long>(num_kv_heads),
                                             max(1ULL, cached_tokens / max(1ULL, tokens_read))));
    summary[0] = before;
    summary[1] = divide_up(num_kv_heads, divide_up(num_kv_heads, fitting));   // sections as large as each other
  }
  count_of[threadIdx.x] = before - count_of[threadIdx.x];
  __syncthreads();

  for_each_piece(cut, num_seqs, [&](const PrefillPiece& whole) {
    PrefillPiece piece = whole;
    piece.parts = parts_of(whole);
    const int first = atomicAdd(&count_of[bin_of(whole)], piece.parts), tiles = whole.tiles();
    piece.slot = piece.parts > 1 ? atomicAdd(&slots, piece.parts) : 0;
    for (; piece.part < piece.parts; ++piece.part) {
      piece.begin = whole.begin + static_cast<int>(static_cast<long long>(tiles) * piece.part / piece.parts);
      piece.end = whole.begin + static_cast<int>(static_cast<long long>(tiles) * (piece.part + 1) / piece.parts);
      reinterpret_cast<PrefillPiece*>(pieces)[first + piece.part] = piece;
    }
  });
}
