// The host's twin of kernels_cu/include/exp2.cuh.
#ifndef CUPAGED_EXP2_CUH
#define CUPAGED_EXP2_CUH

#include "cuda_host.h"

inline float fast_exp2(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

#endif
