// A number that the compiler must not look behind: what is made of it is made again where it is used, and takes no
// register meanwhile.
#pragma once

__device__ __forceinline__ int recomputed(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
