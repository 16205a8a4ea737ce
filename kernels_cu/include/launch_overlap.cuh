// A kernel that starts while the one before it ends (programmatic dependent launch, sm_90 and later). Where
// LAUNCH_OVERLAP is 1 the host launches it so: its blocks may run once every block of the kernel before, if that one
// takes part, has called start_kernel_after() or ended. It must call wait_for_kernel_before() before it writes anything
// or reads what anybody may be writing; until then it can fetch into the L2 cache what it is about to read.
#ifndef CUPAGED_LAUNCH_OVERLAP_CUH   // the host build has included its twin by now
#define CUPAGED_LAUNCH_OVERLAP_CUH

#include "async_copy.cuh"

#ifndef LAUNCH_OVERLAP
#define LAUNCH_OVERLAP 0
#endif

// Until all kernels before this one have ended, and what they wrote is seen. Pointers to what is read afterwards must not
// be both const and __restrict__: the compiler may take such loads to before the wait, though not volatile assembly.
__device__ __forceinline__ void wait_for_kernel_before() {
#if LAUNCH_OVERLAP
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// For the whole block, by any of its threads.
__device__ __forceinline__ void start_kernel_after() {
#if LAUNCH_OVERLAP
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 4 or 16 bytes that may be about to change: they may serve to guess what to fetch, and for nothing else. Past the L1
// cache, which would give them again after the wait.
template <typename T>
__device__ __forceinline__ T peek(const T* address) {
  return __ldcg(address);
}
// Fetch the line of 128 bytes around an address into the L2 cache, where writes of others reach it.
__device__ __forceinline__ void fetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory");
}
// The same by a copy of 16 bytes, a multiple of which the address must be, to shared memory that nobody reads: unlike a
// prefetch, a copy can be waited for.
__device__ __forceinline__ void start_fetch_line(void* shared, const void* address) { start_copy_16(shared, address, true); }
__device__ __forceinline__ void wait_for_fetches() {
  close_copy_group();
  wait_for_copies<0>();
}

#endif
