// Share out decode work on the device, from lengths that the host need not know: prefix sums over the sequences, and
// for every thread block of the attention kernel the sequence in which its share begins.
//
// Grid:  1.    Block: (THREADS).
#include "decode_plan.cuh"
#include "reduce.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / kWarpSize;

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

extern "C" __global__ void __launch_bounds__(THREADS) plan_decode(
    int* __restrict__ offsets,           // [num_seqs + 1], chunks of all head tiles of the sequences before each
    int* __restrict__ first_seq,         // [blocks], the sequence in which a block's share begins
    const int* __restrict__ seq_lens,    // [num_seqs]
    const int num_seqs, const int tiles, const int blocks) {
  __shared__ int sum_of_warp[WARPS], sum_so_far;
  if (threadIdx.x == 0) offsets[0] = sum_so_far = 0;
  __syncthreads();
  for (int first = 0; first < num_seqs; first += THREADS) {
    const int seq = first + threadIdx.x;
    const int chunks = seq < num_seqs ? (load_global(seq_lens + seq) + CHUNK - 1) / CHUNK * tiles : 0;
    const int before = sum_so_far;   // read on this side of the barriers, written on the other
    const int sum = before + inclusive_sum(chunks, sum_of_warp);
    if (seq < num_seqs) offsets[seq + 1] = sum;
    if (threadIdx.x == THREADS - 1) sum_so_far = sum;
    __syncthreads();
  }
  const int total = sum_so_far;
  const int sharing = DecodePlan::sharing_blocks(blocks, total);
  for (int block = threadIdx.x; block < sharing; block += THREADS) {
    const int place = DecodePlan::first_of(block, sharing, total);
    int low = 0, high = num_seqs;   // the last sequence that begins at or before the place
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (offsets[middle] <= place) low = middle;
      else high = middle;
    }
    first_seq[block] = low;
  }
}
