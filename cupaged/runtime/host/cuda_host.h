// The CUDA C++ language for a host compiler: what NVRTC knows without an #include, and no more.
//
// A kernel's .cu file is compiled behind this header unchanged. What needs PTX has a header in kernels_cu/include/ and
// a twin of the same name and guard in this folder, which the host build includes first.
#pragma once

#include <math.h>   // expf and its kin, without std::, as in CUDA

#include <cstring>
#include <type_traits>

#include "scheduler.h"

// --- declarations -----------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __constant__
// Thread-local storage of the OS thread that runs the block: private to the block while it runs, as on the GPU.
#define __shared__ thread_local
#define __restrict__ __restrict

using uint3 = cupaged::Index3;

struct dim3 {
  unsigned int x = 1, y = 1, z = 1;
};

#define threadIdx (cupaged::this_thread->thread_index)
#define blockIdx (cupaged::this_thread->block_index)
#define blockDim (cupaged::this_thread->block_dim)
#define gridDim (cupaged::this_thread->grid_dim)
constexpr int warpSize = 32;

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned int x, y; };
struct alignas(16) uint4 { unsigned int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- barriers and warps -----------------------------------------------------------------------------------------

// Every function that waits takes the place it was called from, for the message about a thread that never came.
#define CUPAGED_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUPAGED_CALLER) { cupaged::barrier(false, {file, line}); }
inline int __syncthreads_count(int predicate, CUPAGED_CALLER) { return cupaged::barrier(predicate != 0, {file, line}); }
inline int __syncthreads_or(int predicate, CUPAGED_CALLER) {
  return cupaged::barrier(predicate != 0, {file, line}) != 0;
}
inline int __syncthreads_and(int predicate, CUPAGED_CALLER) {
  return cupaged::barrier(predicate == 0, {file, line}) == 0;
}

namespace cupaged {

inline int lane_index() {
  const auto& t = *this_thread;
  return static_cast<int>((t.thread_index.x + t.block_dim.x * (t.thread_index.y + t.block_dim.y * t.thread_index.z)) % 32);
}

template <typename T>
T exchange(uint32_t mask, T value, int source_lane, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "shuffles move values of up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(WarpOperation::exchange, mask, bits, source_lane, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cupaged

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUPAGED_CALLER) {
  const int lane = cupaged::lane_index(), first = lane & ~(width - 1);
  return cupaged::exchange(mask, value, first + (source & (width - 1)), {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUPAGED_CALLER) {
  const int lane = cupaged::lane_index(), first = lane & ~(width - 1), source = lane - static_cast<int>(delta);
  return cupaged::exchange(mask, value, source < first ? lane : source, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUPAGED_CALLER) {
  const int lane = cupaged::lane_index(), last = lane | (width - 1), source = lane + static_cast<int>(delta);
  return cupaged::exchange(mask, value, source > last ? lane : source, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUPAGED_CALLER) {
  const int lane = cupaged::lane_index(), last = lane | (width - 1), source = lane ^ lane_mask;
  return cupaged::exchange(mask, value, source > last ? lane : source, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUPAGED_CALLER) {
  return static_cast<unsigned>(cupaged::meet_warp(cupaged::WarpOperation::ballot, mask, predicate != 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, CUPAGED_CALLER) {
  return cupaged::meet_warp(cupaged::WarpOperation::ballot, mask, predicate != 0, 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUPAGED_CALLER) {
  return cupaged::meet_warp(cupaged::WarpOperation::ballot, mask, predicate == 0, 0, {file, line}) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUPAGED_CALLER) {
  cupaged::meet_warp(cupaged::WarpOperation::synchronise, mask, 0, 0, {file, line});
}

[[noreturn]] inline void __trap(CUPAGED_CALLER) { cupaged::fail({file, line}, "__trap() was reached"); }

// --- memory -----------------------------------------------------------------------------------------------------

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <typename T>
T __ldg(const T* address, CUPAGED_CALLER) {
  if (cupaged::this_thread->record_traffic) cupaged::record_load(address, sizeof(T), {file, line});
  return *address;
}

// Past the L1 cache; the host has none to pass.
template <typename T>
T __ldcg(const T* address, CUPAGED_CALLER) {
  return __ldg(address, file, line);
}
template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}
// The host's caches are told nothing.
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

namespace cupaged {
// Read-modify-write until no other OS thread came between; returns the value before.
template <typename T, typename Update>
T atomic_update(T* address, Update update) {
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = update(before);
  } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
  return before;
}
}  // namespace cupaged

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return cupaged::atomic_update(address, [value](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return cupaged::atomic_update(address, [value](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return cupaged::atomic_update(address, [value](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return cupaged::atomic_update(address, [value](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return cupaged::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return cupaged::atomic_update(address, [value](T old) { return static_cast<T>(old | value); });
}
template <typename T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return cupaged::atomic_update(address, [value](T old) { return static_cast<T>(old & value); });
}
template <typename T>
T atomicXor(T* address, std::type_identity_t<T> value) {
  return cupaged::atomic_update(address, [value](T old) { return static_cast<T>(old ^ value); });
}
// CUDA's wrapping counters, used to find the last block to finish.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return cupaged::atomic_update(address, [limit](unsigned old) { return old >= limit ? 0u : old + 1; });
}
inline unsigned atomicDec(unsigned* address, unsigned limit) {
  return cupaged::atomic_update(address, [limit](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}

// --- arithmetic -------------------------------------------------------------------------------------------------

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? static_cast<std::common_type_t<A, B>>(b) : static_cast<std::common_type_t<A, B>>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? static_cast<std::common_type_t<A, B>>(b) : static_cast<std::common_type_t<A, B>>(a);
}

namespace cupaged {
template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace cupaged

inline float __int_as_float(int bits) { return cupaged::same_bits<float>(bits); }
inline float __uint_as_float(unsigned bits) { return cupaged::same_bits<float>(bits); }
inline int __float_as_int(float value) { return cupaged::same_bits<int>(value); }
inline unsigned __float_as_uint(float value) { return cupaged::same_bits<unsigned>(value); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
