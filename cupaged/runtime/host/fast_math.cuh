// The host's twin of kernels_cu/include/fast_math.cuh.
#ifndef CUPAGED_FAST_MATH_CUH
#define CUPAGED_FAST_MATH_CUH

#include "cuda_host.h"

inline float fast_exp2(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

#endif
