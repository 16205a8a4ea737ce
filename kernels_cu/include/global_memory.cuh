// Loads from global memory. Kernels go through these functions because the host build has a twin of this header that notes
// which bytes every warp asks for.
#ifndef CUPAGED_GLOBAL_MEMORY_CUH   // the host build has included its twin by now
#define CUPAGED_GLOBAL_MEMORY_CUH

// One load instruction of sizeof(T) bytes: 1, 2, 4, 8 or, for a Vector, up to 16.
template <typename T>
__device__ __forceinline__ T load_global(const T* address) {
  return *address;
}

// 16 bytes where `wanted`, else zeros, by a load of a given kind. Predicated, as a branch around each load would keep the
// next one waiting, and volatile, so that several stay in a row and are on their way together.
#define CUPAGED_LOAD_16(instruction)                                                             \
  uint4 value = {};                                                                              \
  asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %5, 0;\n@wanted " instruction        \
               " {%0, %1, %2, %3}, [%4];\n}"                                                     \
               : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w)                      \
               : "l"(address), "r"(static_cast<unsigned int>(wanted)));                          \
  return value;

// An ordinary load, also where the compiler, seeing const and __restrict__, would take the read-only path.
__device__ __forceinline__ uint4 load_ordinary(bool wanted, const uint4* address) { CUPAGED_LOAD_16("ld.global.v4.u32") }
// What __ldg becomes: by the read-only path. Nobody writes these bytes while the kernel runs.
__device__ __forceinline__ uint4 load_read_only(bool wanted, const uint4* address) {
  CUPAGED_LOAD_16("ld.global.nc.v4.u32")
}
// The same, and L1 is asked not to keep them. sm_70 and later.
__device__ __forceinline__ uint4 load_no_allocate(bool wanted, const uint4* address) {
  CUPAGED_LOAD_16("ld.global.nc.L1::no_allocate.v4.u32")
}
#undef CUPAGED_LOAD_16

// load_global where `wanted`, else zeros without touching memory: lanes that want nothing still keep step with their warp.
// 16 bytes must be such as the kernel does not write: the compiler may load them before what it stores.
template <typename T>
__device__ __forceinline__ T load_global_if(bool wanted, const T* address) {
  T value = {};
  if constexpr (sizeof(T) == sizeof(uint4)) {
    const uint4 words = load_ordinary(wanted, reinterpret_cast<const uint4*>(address));
    value = reinterpret_cast<const T&>(words);
  } else if (wanted) {
    value = *address;
  }
  return value;
}

#endif
