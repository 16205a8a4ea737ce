// Logits that are kept below a cap smoothly (Gemma 2, arXiv 2408.00118): cap * tanh(x / cap).
#pragma once

#include "fast_math.cuh"

// tanh by an exponential errs by units in the last place of 1, too much for a small one: a polynomial serves there, of least
// relative error, 9e-8. In all right to 4 units in the last place, on either side of 0, as the exponential is never small.
// tanhf takes 18 instructions with both factors. Not tanh.approx: its error, 2^-11 of a logit, would be many times that of
// a weight in half precision.
__device__ __forceinline__ float soft_capped(float x, float cap) {
  const float inverse = 1.0f / cap;
  const float ratio = x * inverse, square = ratio * ratio;
  if (fabsf(ratio) < 0.6f) {
    const float by_square = fmaf(fmaf(fmaf(0.01561263f, square, -0.0522118f), square, 0.13313117f), square, -0.33332598f);
    return fmaf(x, square * by_square, x);
  }
  constexpr float kTwiceLog2E = 2.8853900817779268f;
  const float below_cap = 2.0f * cap * fast_reciprocal(1.0f + fast_exp2(fabsf(x) * (kTwiceLog2E * inverse)));
  return copysignf(cap - below_cap, x);
}
