// Copy an array once, in 16-byte vectors with several in flight, and nothing else: with the driver's copy, the ceiling for
// every kernel that writes what it reads.
//
// Measured on an H100 (experiments/results/h100-80gb-hbm3/cache_ops.json): the best copy moves 2915 GB/s at 64 MB and
// 3002 at 256 MB, bytes read and written.
//
// Grid:  any: thread blocks take chunks of blockDim.x * IN_FLIGHT vectors in turns.    Block: (any).
//
// Defines
//   IN_FLIGHT  vectors of a thread that are on their way together
//   STREAMING  1: the caches are told that nobody reads again what is stored
#include "global_memory.cuh"

extern "C" __global__ void copy_stream(
    unsigned int* __restrict__ to,           // [4 * vectors]
    const unsigned int* __restrict__ from,   // [4 * vectors]
    const long long vectors) {
  uint4* target = reinterpret_cast<uint4*>(to);
  const uint4* source = reinterpret_cast<const uint4*>(from);
  const long long chunk = static_cast<long long>(blockDim.x) * IN_FLIGHT;
  for (long long first = blockIdx.x * chunk + threadIdx.x; first < vectors; first += gridDim.x * chunk) {
    uint4 vector[IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const long long at = first + i * static_cast<long long>(blockDim.x);
      vector[i] = load_global_if(at < vectors, source + at);
    }
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const long long at = first + i * static_cast<long long>(blockDim.x);
      if (at >= vectors) continue;
      if (STREAMING) __stcs(target + at, vector[i]);
      else target[at] = vector[i];
    }
  }
}
