// Functions that the hardware has instructions of its own for (PTX ex2.approx, rcp.approx), right to 2 units and 1 unit in
// the last place of a float; numbers below the smallest normal one count as 0. exp2f takes four instructions for the sake
// of those, and a division some ten to be right to the last place.
#ifndef CUPAGED_FAST_MATH_CUH   // the host build has included its twin by now
#define CUPAGED_FAST_MATH_CUH

__device__ __forceinline__ float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

__device__ __forceinline__ float fast_reciprocal(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}

#endif
