// The state of a softmax that is computed piece by piece (Milakov and Gimelshein, arXiv 1805.02867): the largest logit
// so far, and the sum of exponentials relative to it. Logits are in units of log 2, so that exp2f serves.
#pragma once

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

constexpr float kLargestFloat = 3.4028235e38f;

// A logit beyond float32's range counts as the largest, or the lowest, number in it: an infinite one less an infinite maximum
// is NaN, and -infinity stands for a token that takes no part. A logit that is NaN stays one.
__device__ __forceinline__ float saturated(float logit) {
  const float at_most = logit > kLargestFloat ? kLargestFloat : logit;   // not fminf, which takes the number beside NaN
  return at_most < -kLargestFloat ? -kLargestFloat : at_most;
}

// 2^(logit - max), and 0 for what takes no part: without the test, -inf minus -inf would give NaN. A logit that is NaN
// stays one.
__device__ __forceinline__ float softmax_weight(float logit, float max) {
  return logit == minus_infinity() ? 0.0f : exp2f(logit - max);
}

struct SoftmaxState {
  float max = minus_infinity();
  float sum = 0.0f;

  // Take in logits whose maximum is `new_max`; returns the factor for everything accumulated under the old maximum.
  // The caller then adds the new weights to `sum`.
  __device__ __forceinline__ float raise(float new_max) {
    const float larger = fmaxf(max, new_max);
    const float factor = softmax_weight(max, larger);
    max = larger;
    sum *= factor;
    return factor;
  }

  // What a weighted sum of values is divided by; a softmax over nothing gives output 0.
  __device__ __forceinline__ float normaliser() const { return sum == 0.0f ? 0.0f : 1.0f / sum; }

  // Natural logarithm of the sum of exponentials of the logits; -infinity over nothing.
  __device__ __forceinline__ float log_sum_exp() const {
    return sum == 0.0f ? minus_infinity() : (max + log2f(sum)) * kLn2;
  }
};
