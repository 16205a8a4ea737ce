// Loads from global memory, each a plain dereference. Kernels go through these functions because the host build has a
// twin of this header that notes which bytes every warp asks for.
#ifndef CUPAGED_GLOBAL_MEMORY_CUH   // the host build has included its twin by now
#define CUPAGED_GLOBAL_MEMORY_CUH

// One load instruction of sizeof(T) bytes: 1, 2, 4, 8 or, for a Vector, up to 16.
template <typename T>
__device__ __forceinline__ T load_global(const T* address) {
  return *address;
}

// The same where `wanted`, else zeros without touching memory: lanes that want nothing still keep step with their warp.
template <typename T>
__device__ __forceinline__ T load_global_if(bool wanted, const T* address) {
  T value = {};
  if (wanted) value = *address;
  return value;
}

// 16 bytes by an ordinary load, also where the compiler, seeing const and __restrict__, would take the read-only path.
__device__ __forceinline__ uint4 load_ordinary(bool wanted, const uint4* address) {
  uint4 value = {};
  if (wanted)
    asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
        : "l"(address));
  return value;
}

// 16 bytes that nobody writes while the kernel runs: by the read-only path, which the texture units once lent it.
__device__ __forceinline__ uint4 load_read_only(bool wanted, const uint4* address) {
  return wanted ? __ldg(address) : uint4{};
}

// The same, and L1 is asked not to keep them. sm_70 and later.
__device__ __forceinline__ uint4 load_no_allocate(bool wanted, const uint4* address) {
  uint4 value = {};
  if (wanted)
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
        : "l"(address));
  return value;
}

#endif
