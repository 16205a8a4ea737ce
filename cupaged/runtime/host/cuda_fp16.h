// CUDA's half on the host: 16 bits in memory, arithmetic through float, rounded to nearest even as the GPU does.
#pragma once

#include "cuda_host.h"

namespace cupaged {

// IEEE binary16 to binary32. Moving the exponent's field and multiplying by 2^112 makes subnormals come out right.
inline float half_bits_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return same_bits<float>(sign | 0x70000000u | magnitude);   // infinity, NaN
  return same_bits<float>(sign | same_bits<uint32_t>(same_bits<float>(magnitude) * 0x1p112f));
}

inline uint16_t float_to_half_bits(float value) {
  const uint32_t bits = same_bits<uint32_t>(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;                                    // the GPU's canonical NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);    // rounds up to infinity
  if (magnitude < 0x38800000u) {                                                 // subnormal: let an addition round
    const uint32_t rounded = same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5f) - 0x3f000000u;
    return static_cast<uint16_t>(sign | rounded);
  }
  const uint32_t tie_to_even = magnitude >> 13 & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + tie_to_even) >> 13));
}

}  // namespace cupaged

struct __half {
  uint16_t bits;
};
using half = __half;
struct alignas(4) __half2 {
  __half x, y;
};
using half2 = __half2;

inline float __half2float(__half value) { return cupaged::half_bits_to_float(value.bits); }
inline __half __float2half(float value) { return {cupaged::float_to_half_bits(value)}; }
inline __half __float2half_rn(float value) { return __float2half(value); }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
