// The host's twin of kernels_cu/include/launch_overlap.cuh. Here kernels run one after the other; what is peeked at is
// right at some addresses and nonsense at others, likely and unlikely, as on a GPU where it is still being written, and a
// line that is fetched must be memory. What a fetch writes to shared memory is nonsense, whenever it arrives there.
#ifndef CUPAGED_LAUNCH_OVERLAP_CUH
#define CUPAGED_LAUNCH_OVERLAP_CUH

#include "async_copy.cuh"
#include "cuda_host.h"

#ifndef LAUNCH_OVERLAP
#define LAUNCH_OVERLAP 0
#endif

inline void wait_for_kernel_before() {}
inline void start_kernel_after() {}

template <typename T>
inline T peek(const T* address) {
  static_assert(sizeof(T) % sizeof(int) == 0, "words");
  int words[sizeof(T) / sizeof(int)];
  std::memcpy(words, address, sizeof(T));
  uint64_t noise = reinterpret_cast<uintptr_t>(address) ^ cupaged::this_thread->thread_index.x;   // lanes may differ
  const auto next = [&] {
    noise = (noise ^ noise >> 29) * 0xbf58476d1ce4e5b9u + 0x9e3779b97f4a7c15u;
    return static_cast<unsigned>(noise >> 32);
  };
  next();
  if (next() % 2 != 0)
    for (int& word : words) {
      const unsigned kind = next() % 4, value = next();
      if (kind == 1) word = static_cast<int>(value % 6) - 1;   // as a sequence, a tile or a block may be
      if (kind == 2) word = static_cast<int>(value);
      if (kind == 3) word = value % 2 != 0 ? 0x7fffffff : -0x7fffffff - 1;
    }
  T value;
  std::memcpy(&value, words, sizeof(T));
  return value;
}
inline void fetch_line(const void* address) { static_cast<void>(*static_cast<const volatile char*>(address)); }
inline void start_fetch_line(void* shared, const void* address, CUPAGED_CALLER) {
  static constexpr uint64_t nonsense[2] = {~uint64_t{0}, ~uint64_t{0}};
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(address)) % 16 != 0)
    cupaged::fail({file, line}, "start_fetch_line takes addresses that are multiples of 16");
  fetch_line(address);
  fetch_line(static_cast<const char*>(address) + 15);
  cupaged::note_copy(shared, nonsense);
}
inline void wait_for_fetches() {
  close_copy_group();
  wait_for_copies<0>();
}

#endif
