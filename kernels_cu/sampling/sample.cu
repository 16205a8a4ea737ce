// Choose each sequence's next token from its logits: temperature, top-k and top-p in one launch, without sorting.
//
// What a sort would give is a threshold: the logit of the last token that may be drawn. It is searched for from its
// highest bits down, two bits a pass over the row, which lies in the L2 cache after the first: a token takes part if at
// least k tokens, or a share p of the probability, have its logit or more without it. Tokens that tie with the last one
// are drawn from too. Weights are whole numbers, of 44 bits below the largest, so that sums are the same in any order:
// the seed alone says which token is drawn, whatever the schedule, the batch and the block.
//
// Measured on an H100 (experiments/results/h100-80gb-hbm3/kernel_profile.csv): 0.3 ms for 64 sequences of 32,768
// logits that are all alike, with top-k and top-p: reading them would take a hundredth of it.
//
// Grid:  (num_seqs).    Block: 32 * WARPS.
//
// Defines
//   STORAGE   __half, __nv_bfloat16 or float
//   WARPS   1 to 32
#include "global_memory.cuh"
#include "reduce.cuh"
#include "types.cuh"

using Count = unsigned long long;

constexpr unsigned kMinusInfinity = 0x007fffffu, kInfinity = 0xff800000u, kNaN = 0xffffffffu;   // beside what `ordered` gives
constexpr float kOne = 17592186044416.0f;   // 2^44, the weight of the most likely token
constexpr float kLog2E = 1.4426950408889634f;
constexpr int LOADS = 8;   // of a thread, under way at once
constexpr int BITS = 2, CANDIDATES = (1 << BITS) - 1;   // of the threshold, found in a pass

// A whole number that is larger where the float is; x is not NaN.
__device__ __forceinline__ unsigned ordered(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The row as a warp sees it: its own stretch, neighbouring lanes at neighbouring tokens.
struct Row {
  const STORAGE* logits;
  int begin, end;
  float largest, scale;

  template <typename Visit>
  __device__ __forceinline__ void visit(Visit&& at_token) const {
    for (int i = begin + threadIdx.x % kWarpSize; i < end; i += LOADS * kWarpSize) {
      STORAGE x[LOADS];   // all asked for before the first is looked at
#pragma unroll
      for (int n = 0; n < LOADS; ++n) x[n] = load_global_if(i + n * kWarpSize < end, logits + i + n * kWarpSize);
#pragma unroll
      for (int n = 0; n < LOADS; ++n)
        if (i + n * kWarpSize < end) at_token(to_float(x[n]), i + n * kWarpSize);
    }
  }

  __device__ __forceinline__ Count weight(float x) const {
    if (ordered(x) <= kMinusInfinity) return 0;
    return static_cast<Count>(exp2f(fminf((x - largest) * scale, 0.0f)) * kOne);
  }
};

__device__ __forceinline__ Count warp_sum(Count value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Sums over the block, of which each warp's part stays readable until the next but one. One barrier: two scratches take
// turns, so that no warp writes what another still reads.
struct BlockSum {
  Count (*scratch)[CANDIDATES][WARPS];   // [2], shared
  int turn;

  template <int N>
  __device__ __forceinline__ void operator()(Count (&sums)[N]) {
    turn ^= 1;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Count sum = warp_sum(sums[n]);
      if (threadIdx.x % kWarpSize == 0) scratch[turn][n][threadIdx.x / kWarpSize] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      sums[n] = 0;
      for (int warp = 0; warp < WARPS; ++warp) sums[n] += scratch[turn][n][warp];
    }
  }

  __device__ __forceinline__ Count of_warp(int warp) const { return scratch[turn][0][warp]; }
};

// The largest threshold at or above which all tokens together measure `target` or more.
template <typename Measure>
__device__ __forceinline__ unsigned find_threshold(const Row& row, Count target, BlockSum& block_sum, Measure measure) {
  unsigned threshold = 0;
  for (int shift = 32 - BITS; shift >= 0; shift -= BITS) {
    Count sums[CANDIDATES] = {};
    row.visit([&](float x, int) {
      const unsigned key = ordered(x);
      if (key < threshold) return;
      const Count size = measure(x);
#pragma unroll
      for (unsigned c = 0; c < CANDIDATES; ++c) sums[c] += key >= (threshold | (c + 1) << shift) ? size : 0;
    });
    block_sum(sums);
    unsigned bits = 0;
#pragma unroll
    for (unsigned c = 0; c < CANDIDATES; ++c) bits += sums[c] >= target;
    threshold |= bits << shift;
  }
  return threshold;
}

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): neighbouring seeds give independent numbers.
__device__ __forceinline__ Count random_bits(Count seed) {
  Count z = seed + 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// The upper half of a product of 128 bits: a number from 0 to below `n`, as `bits` are from 0 to below 2^64.
__device__ __forceinline__ Count scaled_down(Count bits, Count n) {
  const Count low_low = (bits & 0xffffffffu) * (n & 0xffffffffu), high_low = (bits >> 32) * (n & 0xffffffffu);
  const Count low_high = (bits & 0xffffffffu) * (n >> 32), high_high = (bits >> 32) * (n >> 32);
  const Count middle = (low_low >> 32) + (high_low & 0xffffffffu) + (low_high & 0xffffffffu);
  return high_high + (high_low >> 32) + (low_high >> 32) + (middle >> 32);
}

// Whether a row's parameters are what the kernel takes. NaN is not.
__device__ __forceinline__ bool are_in_range(float temperature, int top_k, float top_p) {
  return 0.0f <= temperature && temperature <= 3.4028235e38f && top_k >= 0 && 0.0f < top_p && top_p <= 1.0f;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) sample(
    int* __restrict__ tokens,                      // [num_seqs]; -1 where a logit is NaN or infinity, no logit is finite, or
                                                   // a parameter of the row is out of its range
    const STORAGE* __restrict__ logits,              // [num_seqs, vocab_size]
    const float* __restrict__ temperature,         // [num_seqs], 0 or more; 0 takes the most likely token, of equals the first
    const int* __restrict__ top_k,                 // [num_seqs], 0 or more; 0 takes all tokens
    const float* __restrict__ top_p,               // [num_seqs], above 0, to 1; 1 takes all
    const unsigned long long* __restrict__ seeds,  // [num_seqs]
    const int vocab_size) {
  __shared__ Count scratch[2][CANDIDATES][WARPS];
  __shared__ Count best_of_warp[WARPS];
  const int seq = blockIdx.x, lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int stretch = (vocab_size + WARPS * kWarpSize - 1) / (WARPS * kWarpSize) * kWarpSize;
  Row row{logits + static_cast<long long>(seq) * vocab_size, min(warp * stretch, vocab_size),
          min((warp + 1) * stretch, vocab_size), 0.0f, 0.0f};

  Count best = 0;   // the logit, and of equal ones the first token
  row.visit([&](float x, int i) {
    const unsigned key = isnan(x) ? kNaN : ordered(x);   // NaN of either sign is larger than any number
    best = max(best, static_cast<Count>(key) << 32 | (0xffffffffu - static_cast<unsigned>(i)));
  });
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    best = max(best, __shfl_xor_sync(kAllLanes, best, distance));
  if (lane == 0) best_of_warp[warp] = best;
  __syncthreads();
  for (int other = 0; other < WARPS; ++other) best = max(best, best_of_warp[other]);
  const int most_likely = static_cast<int>(0xffffffffu - static_cast<unsigned>(best));
  const unsigned largest_key = static_cast<unsigned>(best >> 32);
  const bool has_token = largest_key > kMinusInfinity && largest_key < kInfinity &&
                         are_in_range(temperature[seq], top_k[seq], top_p[seq]);
  if (temperature[seq] == 0.0f || !has_token) {
    if (threadIdx.x == 0) tokens[seq] = has_token ? most_likely : -1;
    return;
  }
  row.largest = to_float(load_global(row.logits + most_likely));
  row.scale = kLog2E / temperature[seq];

  BlockSum block_sum{scratch, 0};
  unsigned threshold = 0;
  if (top_k[seq] > 0 && top_k[seq] < vocab_size)
    threshold = find_threshold(row, static_cast<Count>(top_k[seq]), block_sum, [](float) { return Count{1}; });
  const auto weight = [&](float x) { return ordered(x) >= threshold ? row.weight(x) : 0; };
  if (top_p[seq] < 1.0f) {
    Count total[1] = {};
    row.visit([&](float x, int) { total[0] += weight(x); });
    block_sum(total);
    const double share = static_cast<double>(top_p[seq]) * static_cast<double>(total[0]);
    const Count target = max(static_cast<Count>(ceil(share)), Count{1});
    threshold = max(threshold, find_threshold(row, target, block_sum, weight));
  }

  Count total[1] = {};
  row.visit([&](float x, int) { total[0] += weight(x); });
  block_sum(total);
  Count rest = scaled_down(random_bits(seeds[seq]), total[0]);
  int drawn = 0;
  for (; rest >= block_sum.of_warp(drawn); ++drawn) rest -= block_sum.of_warp(drawn);
  if (warp != drawn) return;
  for (int base = row.begin;; base += kWarpSize) {
    const int i = base + lane;
    const Count own = i < row.end ? weight(to_float(load_global(row.logits + i))) : 0;
    Count up_to = own;   // the sum of this lane's weight and those before it
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const Count before = __shfl_up_sync(kAllLanes, up_to, distance);
      up_to += lane >= distance ? before : 0;
    }
    const unsigned passed = __ballot_sync(kAllLanes, rest < up_to);
    if (passed) {
      if (lane == __ffs(static_cast<int>(passed)) - 1) tokens[seq] = i;
      return;
    }
    rest -= __shfl_sync(kAllLanes, up_to, kWarpSize - 1);
  }
}
