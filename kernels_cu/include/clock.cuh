// The multiprocessor's cycle counter, for kernels that time themselves.
#ifndef CUPAGED_CLOCK_CUH   // the host build has included its twin by now
#define CUPAGED_CLOCK_CUH

// Not moved past other volatile statements; what is timed must depend on what came before.
__device__ __forceinline__ long long cycles_now() {
  long long cycles;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(cycles)::"memory");
  return cycles;
}

#endif
