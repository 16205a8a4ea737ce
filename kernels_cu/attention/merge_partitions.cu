// Merge the attention that paged_attention_v2 or _mma found over the partitions of each context into one.
//
// Lanes that read a row of sums together take every GROUPS-th partition, several in flight, then meet as in the online
// kernel. Partitions past the end of the context were never written and are not read. A head's sink joins here.
//
// Measured with paged_attention_v2 and paged_attention_mma, of whose time it is part.
//
// Grid:  (rows * num_heads), head fastest; rows = num_seqs * query_tokens.    Block: (THREADS).
//
// Defines
//   STORAGE      __half, __nv_bfloat16 or float
//   HEAD_DIM     32 to 256, a multiple of 8
//   and QUERY_TOKENS, WINDOW and SINKS of variants.cuh
#include "global_memory.cuh"
#include "reduce.cuh"
#include "running_attention.cuh"
#include "softmax.cuh"
#include "token_row.cuh"
#include "types.cuh"
#include "variants.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / kWarpSize;
using Row = TokenRow<float, HEAD_DIM>;
constexpr int GROUPS = THREADS / Row::LANES;   // partitions that the block reads at once
constexpr int IN_FLIGHT = 4;                   // partitions that a lane reads before it uses the first

extern "C" __global__ void __launch_bounds__(THREADS) merge_partitions(
    STORAGE* __restrict__ out,                  // [rows, num_heads, HEAD_DIM]
    float* __restrict__ lse,                    // [rows, num_heads], or null
    const float* __restrict__ partial_out,      // [rows, num_heads, partitions, HEAD_DIM]
    const float* __restrict__ partial_state,    // [rows, num_heads, partitions, 2]: maximum and sum
    const int* __restrict__ seq_lens,           // [num_seqs]
    const int num_heads, const int partitions, const int partition_tokens,
    const int query_tokens, const int window,   // see variants.cuh
    const float* __restrict__ sinks) {          // [num_heads]
  __shared__ WarpResults<WARPS, HEAD_DIM> results;
  const long long row = blockIdx.x;
  const int query_row = blockIdx.x / num_heads, seq = QUERY_TOKENS ? query_row / query_tokens : query_row;
  const Variants variants{query_tokens, window, 0.0f, nullptr, sinks};
  const int context = variants.context_of(load_global(seq_lens + seq), query_row - seq * query_tokens);
  const int seen = max(0, context - variants.first_token(context));
  const int used = seen / partition_tokens + (seen % partition_tokens != 0);
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
    attention.merge(softmax, sum);
  }

  attention.merge_over_warp<Row::LANES>();
  results.store<Row>(attention);
  __syncthreads();
  SoftmaxState softmax = results.merged_softmax();
  variants.add_sink(softmax, blockIdx.x % num_heads);
  results.write(out + row * HEAD_DIM, lse == nullptr ? nullptr : lse + row, softmax);
}
