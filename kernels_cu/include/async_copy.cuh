// Copies from global to shared memory that run on their own (PTX cp.async): start some, close them into a group, and
// wait until all groups but the latest few have arrived. A thread waits for its own copies only. sm_80 and later.
#ifndef CUPAGED_ASYNC_COPY_CUH   // the host build has included its twin by now
#define CUPAGED_ASYNC_COPY_CUH

// Start to copy 16 bytes, or to write 16 zeros where not `wanted`; both addresses are multiples of 16. L2 is told to fetch
// the whole line of 128 bytes, as a neighbouring head's row is in it where rows are no multiple of that.
__device__ __forceinline__ void start_copy_16(void* shared, const void* global, bool wanted) {
  const unsigned int address = static_cast<unsigned int>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(wanted ? 16 : 0)
               : "memory");
}
// The same for what is read once: L2 is also told to let go of it before anything else, so that it does not drive out
// tables, plans and queries, which every call reads.
__device__ __forceinline__ void start_copy_16_once(void* shared, const void* global, bool wanted) {
  const unsigned int address = static_cast<unsigned int>(__cvta_generic_to_shared(shared));
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(address), "l"(global),
               "r"(wanted ? 16 : 0), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void close_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Left>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// What this thread wrote or saw written before is seen by whoever sees what it writes after, on the whole device; lighter
// than __threadfence(), which puts all fences in one order.
__device__ __forceinline__ void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

#endif
