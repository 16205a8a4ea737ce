// Attention that takes in tokens as they come: a running softmax, and the values weighted relative to its maximum.
// Two of them over different tokens merge into one over all of them, in any order, and one over nothing changes nothing.
#pragma once

#include "reduce.cuh"
#include "softmax.cuh"
#include "types.cuh"

template <int Share>
struct RunningAttention {
  SoftmaxState softmax;
  float sum[Share] = {};   // of weighted values: this lane's dimensions

  __device__ __forceinline__ void raise(float new_max) {
    const float factor = softmax.raise(new_max);
#pragma unroll
    for (float& value : sum) value *= factor;
  }

  // Take in the values of N tokens; a logit of -infinity takes no part.
  template <typename Row, int N>
  __device__ __forceinline__ void add(const float (&logit)[N], const Row (&value)[N]) {
    float largest = logit[0];
#pragma unroll
    for (int n = 1; n < N; ++n) largest = fmaxf(largest, logit[n]);
    raise(largest);
    float weights = 0.0f;   // of these tokens: one alone may be too small to change the sum of thousands
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float weight = softmax_weight(logit[n], softmax.max);
      weights += weight;
#pragma unroll
      for (int i = 0; i < Share; ++i) sum[i] += weight * value[n][i];
    }
    softmax.sum += weights;
  }

  // Take in attention over other tokens.
  template <typename Row>
  __device__ __forceinline__ void merge(const SoftmaxState& other, const Row& other_sum) {
    raise(other.max);
    add_scaled(other, other_sum);
  }
  // Take in attention over N sets of other tokens: no sum is used before all maxima are there, so that loads of them
  // run side by side.
  template <typename Row, int N>
  __device__ __forceinline__ void merge(const SoftmaxState (&other)[N], const Row (&other_sum)[N]) {
    float largest = other[0].max;
#pragma unroll
    for (int n = 1; n < N; ++n) largest = fmaxf(largest, other[n].max);
    raise(largest);
#pragma unroll
    for (int n = 0; n < N; ++n) add_scaled(other[n], other_sum[n]);
  }
  template <typename Row>
  __device__ __forceinline__ void add_scaled(const SoftmaxState& other, const Row& other_sum) {   // of no larger maximum
    const float factor = softmax_weight(other.max, softmax.max);
    softmax.sum += other.sum * factor;
#pragma unroll
    for (int i = 0; i < Share; ++i) sum[i] += other_sum[i] * factor;
  }

  // Merge over the lanes of a warp that hold the same dimensions, Lanes apart.
  template <int Lanes>
  __device__ __forceinline__ void merge_over_warp() {
    raise(warp_reduce<Max, Lanes, kWarpSize>(softmax.max));
    softmax.sum = warp_reduce<Sum, Lanes, kWarpSize>(softmax.sum);
#pragma unroll
    for (float& value : sum) value = warp_reduce<Sum, Lanes, kWarpSize>(value);
  }
};

// What the warps of a block found for one query head, in shared memory.
template <int Warps, int HeadDim>
struct WarpResults {
  float max[Warps], softmax_sum[Warps];
  float sum[Warps][HeadDim];

  // The softmax over the tokens of all warps.
  __device__ __forceinline__ SoftmaxState merged_softmax() const {
    SoftmaxState all;
#pragma unroll
    for (int warp = 0; warp < Warps; ++warp) all.max = fmaxf(all.max, max[warp]);
#pragma unroll
    for (int warp = 0; warp < Warps; ++warp) all.sum += softmax_sum[warp] * softmax_weight(max[warp], all.max);
    return all;
  }
  // One dimension of the weighted values of all warps, relative to the merged maximum.
  __device__ __forceinline__ float merged_sum(int dim, float all_max) const {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Warps; ++warp) total += sum[warp][dim] * softmax_weight(max[warp], all_max);
    return total;
  }

  // This warp's result: the first Row::LANES lanes hold it, each a share of the dimensions.
  template <typename Row>
  __device__ __forceinline__ void store(const RunningAttention<Row::SHARE>& attention) {
    const int warp = threadIdx.x / kWarpSize;
    if (threadIdx.x % kWarpSize == 0) {
      max[warp] = attention.softmax.max;
      softmax_sum[warp] = attention.softmax.sum;
    }
    if (threadIdx.x % kWarpSize < Row::LANES)
#pragma unroll
      for (int i = 0; i < Row::SHARE; ++i)
        if (Row::dimension(i) < HeadDim) sum[warp][Row::dimension(i)] = attention.sum[i];
  }

  // Write the output of a query head, once every warp has stored its result.
  template <typename T>
  __device__ __forceinline__ void write(T* out,       // [HeadDim]
                                        float* lse) const {   // one, or null
    write(out, lse, merged_softmax());
  }
  // The same with a softmax that something besides the tokens has joined.
  template <typename T>
  __device__ __forceinline__ void write(T* out, float* lse, const SoftmaxState& all) const {
    for (int dim = threadIdx.x; dim < HeadDim; dim += Warps * kWarpSize)
      out[dim] = from_float<T>(merged_sum(dim, all.max) * all.normaliser());
    if (lse != nullptr && threadIdx.x == 0) *lse = all.log_sum_exp();
  }
};
