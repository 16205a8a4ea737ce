// The host's twin of kernels_cu/include/async_copy.cuh. A copy is made when it starts, or noted then and made when it is
// waited for, as the schedule's seed says: the GPU may make it at any time between. Until then NaN stands in its place.
#ifndef CUPAGED_ASYNC_COPY_CUH
#define CUPAGED_ASYNC_COPY_CUH

#include "cuda_host.h"

inline void start_copy_16(void* shared, const void* global, bool wanted, CUPAGED_CALLER) {
  if (cupaged::this_thread->record_traffic) cupaged::record_load(global, wanted ? 16 : 0, {file, line});
  cupaged::note_copy(shared, wanted ? global : nullptr);
}
inline void start_copy_16_once(void* shared, const void* global, bool wanted, CUPAGED_CALLER) {
  start_copy_16(shared, global, wanted, file, line);
}
inline void close_copy_group() { cupaged::close_copies(); }
template <int Left>
inline void wait_for_copies() {
  cupaged::make_copies(Left);
}

inline void fence_device() {}

#endif
