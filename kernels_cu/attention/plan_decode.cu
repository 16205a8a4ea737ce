// Share out decode work on the device, from lengths that the host need not know: choose how finely to cut sequences,
// and write the list of pieces (decode_plan.cuh).
//
// How finely: every warp tries one number of parts for the longest sequence, and with it a largest piece, and estimates
// when the last thread block is done. Memory is the bottleneck, so blocks that have less company run faster, up to
// `alone_speed` times; merging parts costs time at the end. Times are in chunks that a block reads with all others busy.
//
// Grid:  1.    Block: (THREADS).
//
// Defines
//   CHUNK_TOKENS  tokens in a chunk, 16 or 32
#include "decode_plan.cuh"
#include "reduce.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / kWarpSize;
constexpr int SORTED_SEQS = 2048;        // of more sequences the order no longer matters, but sorting them would take long

// Sum over this thread and all before it in the block.
__device__ __forceinline__ int inclusive_sum(int value, int* sum_of_warp) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += before;
  }
  if (lane == kWarpSize - 1) sum_of_warp[warp] = value;
  __syncthreads();
  for (int w = 0; w < warp; ++w) value += sum_of_warp[w];
  __syncthreads();
  return value;
}

__device__ __forceinline__ int warp_sum(int value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// Numbers of parts that are tried for the longest sequence: 1 to 16, then wider and wider apart, to 128.
__device__ __forceinline__ int candidate(int warp) {
  return warp < 16 ? warp + 1 : warp < 24 ? 16 + 4 * (warp - 15) : 48 + 10 * (warp - 23);
}

extern "C" __global__ void __launch_bounds__(THREADS) plan_decode(
    int* __restrict__ summary,           // [2], how many pieces, and the chunks of the largest
    int* __restrict__ pieces,            // [max_pieces, 8], Pieces, in the order in which they are taken
    int* __restrict__ ranges,            // [num_seqs, 2], work space: chunks of each sequence, first and end
    int* __restrict__ order,             // [num_seqs], work space: sequences, the largest pieces first
    int* __restrict__ offsets,           // [num_seqs + 1, 2], work space: pieces, and slots, before each in that order
    const int* __restrict__ seq_lens,    // [num_seqs]
    const int num_seqs, const int tiles,            // tiles: head tiles of a sequence
    const int query_tokens, const int window, const int prefix,   // prefix: tokens of a sequence that are read elsewhere
    const int blocks, const int min_piece, const int max_slots,
    const float alone_speed,             // of a block without company
    const float merge_chunks, const float piece_chunks) {   // what merging costs, and what a further piece
  __shared__ int sum_of_warp[WARPS], longest, largest, pieces_so_far, slots_so_far;
  __shared__ unsigned long long total;
  __shared__ float estimate[WARPS];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (threadIdx.x == 0) total = 0, longest = 0;
  __syncthreads();
  for (int seq = threadIdx.x; seq < num_seqs; seq += THREADS) {
    const ChunkRange range = chunks_of(load_global(seq_lens + seq), query_tokens, window, prefix);
    ranges[2 * seq] = range.first, ranges[2 * seq + 1] = range.end;
    atomicAdd(&total, static_cast<unsigned long long>(range.end - range.first) * tiles);
    atomicMax(&longest, range.end - range.first);
  }
  __syncthreads();
  const auto chunks_in = [&](int seq) { return ranges[2 * seq + 1] - ranges[2 * seq]; };

  {
    const int piece = divide_up(longest, candidate(warp));
    int count = 0, slots = 0;
    for (int seq = lane; seq < num_seqs; seq += kWarpSize) {
      const int parts = divide_up(chunks_in(seq), piece);
      count += parts * tiles;
      slots += parts > 1 ? parts * tiles : 0;
    }
    count = warp_sum(count), slots = warp_sum(slots);
    const float share = static_cast<float>(total) / blocks, mean = static_cast<float>(total) / count;
    const float last_wave = static_cast<float>(count % blocks) / blocks;   // how many blocks have a piece at the end
    const float merging = slots > 0 ? merge_chunks * (1 + candidate(warp) / 64.0f) : 0.0f;
    // If all pieces run at once, each may run alone in the end; else the largest keep pace with the others till then.
    const float reading = count <= blocks ? fmaxf(share, piece / alone_speed)
                                          : share + fmaxf(0.0f, piece - share) / alone_speed;
    float time = reading + merging + (count - 1) / blocks * piece_chunks;
    if (count > blocks && last_wave > 0) time += mean * fmaxf(0.0f, 1 / alone_speed - last_wave);
    if (count < blocks) time += 0.03f * share * (1 - last_wave);           // more blocks end more nearly together
    if (slots > max_slots || piece < min(longest, min_piece)) time = -minus_infinity();
    if (lane == 0) estimate[warp] = time;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int best = 0;
    for (int w = 1; w < WARPS; ++w)
      if (estimate[w] < estimate[best]) best = w;
    largest = divide_up(longest, candidate(best));
  }
  __syncthreads();

  const auto parts_of = [&](int seq) { return divide_up(chunks_in(seq), largest); };
  const auto size_of = [&](int seq) { return divide_up(chunks_in(seq), parts_of(seq)); };
  for (int seq = threadIdx.x; seq < num_seqs; seq += THREADS) {
    int place = seq;
    if (num_seqs <= SORTED_SEQS) {
      place = 0;
      const int mine = size_of(seq);
      for (int other = 0; other < num_seqs; ++other) {
        const int its = size_of(other);
        place += its > mine || (its == mine && other < seq);
      }
    }
    order[place] = seq;
  }
  __syncthreads();

  int pieces_before = 0, slots_before = 0;
  for (int first = 0; first < num_seqs; first += THREADS) {
    const int place = first + threadIdx.x;
    int count = 0, slots = 0;
    if (place < num_seqs) {
      const int seq = order[place], parts = parts_of(seq);
      count = parts * tiles;
      slots = parts > 1 ? parts * tiles : 0;
    }
    const int count_sum = pieces_before + inclusive_sum(count, sum_of_warp);
    const int slots_sum = slots_before + inclusive_sum(slots, sum_of_warp);
    if (place < num_seqs) offsets[2 * place + 2] = count_sum, offsets[2 * place + 3] = slots_sum;
    if (threadIdx.x == THREADS - 1) pieces_so_far = count_sum, slots_so_far = slots_sum;
    __syncthreads();
    pieces_before = pieces_so_far, slots_before = slots_so_far;
    __syncthreads();
  }
  if (threadIdx.x == 0) offsets[0] = offsets[1] = 0, summary[0] = pieces_before, summary[1] = largest;
  __syncthreads();

  for (int i = threadIdx.x; i < pieces_before; i += THREADS) {
    int low = 0, high = num_seqs;   // the last place whose pieces begin at or before this one
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (offsets[2 * middle] <= i) low = middle;
      else high = middle;
    }
    const int seq = order[low], parts = parts_of(seq), within = i - offsets[2 * low];
    const int first = ranges[2 * seq], chunks = chunks_in(seq);
    Piece piece = {};
    piece.seq = seq, piece.tile = within % tiles, piece.parts = parts, piece.part = within / tiles;
    piece.begin = first + static_cast<int>(static_cast<long long>(chunks) * piece.part / parts);
    piece.end = first + static_cast<int>(static_cast<long long>(chunks) * (piece.part + 1) / parts);
    piece.slot = offsets[2 * low + 1] + piece.tile * parts;
    reinterpret_cast<Piece*>(pieces)[i] = piece;
  }
}
