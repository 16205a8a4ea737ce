// 2 to a power by the hardware's own instruction (PTX ex2.approx): right to 2 units in the last place of a float, and 0
// below the smallest normal number. exp2f takes four instructions for the sake of the latter.
#ifndef CUPAGED_EXP2_CUH   // the host build has included its twin by now
#define CUPAGED_EXP2_CUH

__device__ __forceinline__ float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

#endif
