// Read an array once, in 16-byte loads with several in flight, and nothing else: the ceiling for every kernel that
// reads a cache. The words are combined by exclusive or, so that no load can be left out and the result can be tested.
//
// Grid:  a few thread blocks per SM.    Block: (a multiple of 32).
#include "global_memory.cuh"
#include "reduce.cuh"

struct __align__(16) Words {
  unsigned int word[4];
};

extern "C" __global__ void read_stream(
    unsigned int* __restrict__ combined,     // [1], combined by exclusive or with what is there
    const unsigned int* __restrict__ data,   // [4 * vectors]
    const long long vectors) {
  constexpr int IN_FLIGHT = 8;
  const Words* source = reinterpret_cast<const Words*>(data);
  const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
  const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  unsigned int result = 0;
  for (long long first = thread; first < vectors; first += threads * IN_FLIGHT) {
    Words words[IN_FLIGHT] = {};
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i)
      if (first + i * threads < vectors) words[i] = load_global(source + first + i * threads);
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) result ^= words[i].word[0] ^ words[i].word[1] ^ words[i].word[2] ^ words[i].word[3];
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) result ^= __shfl_xor_sync(kAllLanes, result, distance);
  if (threadIdx.x % kWarpSize == 0) atomicXor(combined, result);
}
