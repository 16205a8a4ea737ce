// Merge the attention that paged_attention_v2 or _mma found over the partitions of each context into one.
//
// Lanes that read a row of sums together take every GROUPS-th partition, several in flight, then meet as in the online
// kernel. Partitions past the end of the context were never written and are not read.
//
// Measured: not measured yet.
//
// Grid:  (num_seqs * num_heads), head fastest.    Block: (THREADS).
//
// Defines
//   STORAGE      __half, __nv_bfloat16 or float
//   HEAD_DIM     32 to 256, a multiple of 8
#include "global_memory.cuh"
#include "reduce.cuh"
#include "running_attention.cuh"
#include "softmax.cuh"
#include "token_row.cuh"
#include "types.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / kWarpSize;
using Row = TokenRow<float, HEAD_DIM>;
constexpr int GROUPS = THREADS / Row::LANES;   // partitions that the block reads at once
constexpr int IN_FLIGHT = 4;                   // partitions that a lane reads before it uses the first

extern "C" __global__ void __launch_bounds__(THREADS) merge_partitions(
    STORAGE* __restrict__ out,                  // [num_seqs, num_heads, HEAD_DIM]
    float* __restrict__ lse,                    // [num_seqs, num_heads], or null
    const float* __restrict__ partial_out,      // [num_seqs, num_heads, partitions, HEAD_DIM]
    const float* __restrict__ partial_state,    // [num_seqs, num_heads, partitions, 2]: maximum and sum
    const int* __restrict__ seq_lens,           // [num_seqs]
    const int num_heads, const int partitions, const int partition_tokens) {
  __shared__ WarpResults<WARPS, HEAD_DIM> results;
  const long long row = blockIdx.x;
  const int seq_len = load_global(seq_lens + row / num_heads);
  const int used = seq_len / partition_tokens + (seq_len % partition_tokens != 0);
  const float* sums = partial_out + row * partitions * HEAD_DIM;
  const auto* states = reinterpret_cast<const Vector<float, 2>*>(partial_state) + row * partitions;

  RunningAttention<Row::SHARE> attention;
  for (int first = threadIdx.x / Row::LANES; first < used; first += GROUPS * IN_FLIGHT) {
    Row sum[IN_FLIGHT];
    SoftmaxState softmax[IN_FLIGHT];   // of nothing, past the last partition
#pragma unroll
    for (int r = 0; r < IN_FLIGHT; ++r) {
      const long long partition = first + r * GROUPS;
      const bool there = partition < used;
      sum[r].load(sums + partition * HEAD_DIM, there);
      const auto state = load_global_if(there, states + partition);
      if (there) softmax[r].max = state.value[0], softmax[r].sum = state.value[1];
    }
#pragma unroll
    for (int r = 0; r < IN_FLIGHT; ++r) attention.merge(softmax[r], sum[r]);
  }

  attention.merge_over_warp<Row::LANES>();
  results.store<Row>(attention);
  __syncthreads();
  results.write(out + row * HEAD_DIM, lse == nullptr ? nullptr : lse + row);
}
