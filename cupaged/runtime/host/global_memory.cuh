// The host's twin of kernels_cu/include/global_memory.cuh: the same loads, noted by the traffic recorder.
#ifndef CUPAGED_GLOBAL_MEMORY_CUH
#define CUPAGED_GLOBAL_MEMORY_CUH

#include "cuda_host.h"

template <typename T>
__device__ __forceinline__ T load_global(const T* address, CUPAGED_CALLER) {
  if (cupaged::this_thread->record_traffic) cupaged::record_load(address, sizeof(T), {file, line});
  return *address;
}

template <typename T>
__device__ __forceinline__ T load_global_if(bool wanted, const T* address, CUPAGED_CALLER) {
  if (cupaged::this_thread->record_traffic) cupaged::record_load(address, wanted ? sizeof(T) : 0, {file, line});
  return wanted ? *address : T{};
}

inline uint4 load_ordinary(bool wanted, const uint4* address, CUPAGED_CALLER) {
  return load_global_if(wanted, address, file, line);
}
inline uint4 load_read_only(bool wanted, const uint4* address, CUPAGED_CALLER) {
  return load_global_if(wanted, address, file, line);
}
inline uint4 load_no_allocate(bool wanted, const uint4* address, CUPAGED_CALLER) {
  return load_global_if(wanted, address, file, line);
}

#endif
