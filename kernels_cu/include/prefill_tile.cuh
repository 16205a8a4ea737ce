// A warp's attention of 16 or 32 query rows over tiles of context tokens, on tensor cores (FlashAttention-2, Dao, arXiv
// 2307.08691): queries, keys and values are read from shared memory, logits, a running softmax and the weighted sum of
// values stay in registers.
//
// A weight is 2^(product * factor - maximum), by one multiply-add that rounds nothing before it subtracts. The maximum is
// rounded, though, and where it is large that shifts all exponents by many units: there, weights are made of logits that
// are rounded before, as the maximum was (`wants_logits`).
//
// Lane l has the rows l/4, l/4 + 8, l/4 + 16, ..., called halves here since two of them fill an operand. Weights are
// rounded to the storage type before they meet the values; sums are float32.
#pragma once

#include "fast_math.cuh"
#include "mma.cuh"
#include "reduce.cuh"
#include "softmax.cuh"
#include "swizzled_rows.cuh"

template <typename T, int HeadDim, int Rows, int Tokens, int HeldSteps>
struct PrefillTile {
  using Shared = SwizzledRows<T, HeadDim>;
  using Walk = typename Shared::Walk;
  static constexpr int OPERANDS = Rows / 16, HALVES = Rows / 8;
  static constexpr int STEPS = HeadDim / 16;                         // tiles of 16 dimensions
  static constexpr int EIGHTS = Tokens / 8, SIXTEENTHS = Tokens / 16;
  static constexpr float HEADROOM = 256.0f;   // how large a lane's weights may become before the maximum is raised
  static constexpr float NO_LOGIT = -kLargestFloat;   // a maximum of nothing: finite, as -infinity less -infinity is NaN
  static constexpr float LARGE = 1048576.0f;   // a maximum up to which rounding shifts exponents by a sixteenth at most

  using Products = ResultTile[OPERANDS][EIGHTS];   // [16 rows, 8 tokens] each
  using Weights = LeftTile[OPERANDS];              // of 16 tokens
  using Totals = float[HALVES];                    // sums of the weights of 16 tokens, this lane's part

  LeftTile held[HeldSteps > 0 ? HeldSteps : 1][OPERANDS];   // the first steps of the query: the rest is read each time
  ResultTile out[OPERANDS][2 * STEPS];
  SoftmaxState softmax[HALVES];   // its maximum is what weights are relative to: some logits may exceed it a little

  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarpSize; }
  static __device__ __forceinline__ int row_of(int half) { return lane() / 4 + 8 * half; }
  static __device__ __forceinline__ int token_of(int eighth, int next) { return eighth * 8 + lane() % 4 * 2 + next; }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (SoftmaxState& state : softmax) state.max = NO_LOGIT, state.sum = 0.0f;
#pragma unroll
    for (int operand = 0; operand < OPERANDS; ++operand)
#pragma unroll
      for (ResultTile& tile : out[operand]) tile = {};
  }

  __device__ __forceinline__ void hold(const T* query) {   // [Rows][HeadDim], by place_of
    const Walk walk(query, lane() % 16, lane() / 16);
#pragma unroll
    for (int step = 0; step < HeldSteps; ++step)
#pragma unroll
      for (int operand = 0; operand < OPERANDS; ++operand)
        load_matrices(held[step][operand].pair, walk.at(16 * operand, step));
  }

  // Multiply the query by the keys of a tile.
  __device__ __forceinline__ void multiply(Products& product, const T* query,
                                           const T* key) const {   // [Tokens][HeadDim]
    const Walk query_walk(query, lane() % 16, lane() / 16), key_walk(key, lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);
#pragma unroll
    for (int operand = 0; operand < OPERANDS; ++operand)
#pragma unroll
      for (ResultTile& tile : product[operand]) tile = {};
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      LeftTile left[OPERANDS];
#pragma unroll
      for (int operand = 0; operand < OPERANDS; ++operand) {
        if (step < HeldSteps) left[operand] = held[step < HeldSteps ? step : 0][operand];
        else load_matrices(left[operand].pair, query_walk.at(16 * operand, step));
      }
#pragma unroll
      for (int i = 0; i < SIXTEENTHS; ++i) {
        unsigned int pair[4];   // tokens 0-7 and 8-15, each as two tiles of 8 dimensions
        load_matrices(pair, key_walk.at(16 * i, step));
#pragma unroll
        for (int operand = 0; operand < OPERANDS; ++operand) {
          multiply_add(product[operand][2 * i], left[operand], RightTile{pair[0], pair[1]}, T());
          multiply_add(product[operand][2 * i + 1], left[operand], RightTile{pair[2], pair[3]}, T());
        }
      }
    }
  }

  // Whether some row has no maximum yet, or a large one. The same for all lanes.
  __device__ __forceinline__ bool wants_largest() const {
    bool wants = false;
#pragma unroll
    for (const SoftmaxState& state : softmax) wants = wants || fabsf(state.max) > LARGE;
    return __any_sync(kAllLanes, wants);
  }

  // Whether some row has a large maximum, beside which weights are made of rounded logits. The same for all lanes.
  __device__ __forceinline__ bool wants_logits() const {
    bool wants = false;
#pragma unroll
    for (const SoftmaxState& state : softmax) wants = wants || (fabsf(state.max) > LARGE && state.max != NO_LOGIT);
    return __any_sync(kAllLanes, wants);
  }

  // Whether some product is infinite. The same for all lanes.
  static __device__ __forceinline__ bool has_infinity(const Products& product) {
    float largest = 0.0f;
#pragma unroll
    for (const ResultTile (&row)[EIGHTS] : product)
#pragma unroll
      for (const ResultTile& eighth : row)
#pragma unroll
        for (const float& value : eighth.value) largest = fmaxf(largest, fabsf(value));
    return __any_sync(kAllLanes, largest > kLargestFloat);
  }

  // Make logits that are infinite the largest number, or the lowest: -infinity stands for a token that is left out.
  static __device__ __forceinline__ void saturate(Products& product) {
#pragma unroll
    for (ResultTile (&row)[EIGHTS] : product)
#pragma unroll
      for (ResultTile& eighth : row)
#pragma unroll
        for (float& value : eighth.value) value = saturated(value);
  }

  // Take in the values of a tile: its logits are products times `factor`, which is positive, in units of log 2; a product
  // of -infinity leaves the token out. `find_largest` is what `wants_largest` said; where `wants_logits` did, products are
  // logits already. Weights of the next 16 tokens are made between the multiplications of 16.
  __device__ __forceinline__ void add(const Products& product, float factor, bool find_largest,
                                      const T* value) {   // [Tokens][HeadDim]
    float headroom = HEADROOM;
    if (find_largest) {
      raise(product, factor, 0);
      if (wants_logits()) headroom = -1.0f;   // which every sum outgrows
    }
    const Walk walk(value, lane() % 16, lane() / 16);
    Weights weight[2];
    Totals total;
#pragma unroll
    for (int pair = 0; pair < 4 * OPERANDS; ++pair) weigh(weight[0], total, product, factor, 0, pair);
#pragma unroll
    for (int i = 0; i < SIXTEENTHS; ++i) {
      settle(weight[i % 2], total, headroom, product, factor, i);
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        unsigned int pair[4];   // dimensions 0-7 and 8-15 of the step, each as two tiles of 8 tokens
        load_matrices_transposed(pair, walk.at(16 * i, step));
#pragma unroll
        for (int operand = 0; operand < OPERANDS; ++operand) {
          multiply_add(out[operand][2 * step], weight[i % 2][operand], RightTile{pair[0], pair[1]}, T());
          multiply_add(out[operand][2 * step + 1], weight[i % 2][operand], RightTile{pair[2], pair[3]}, T());
        }
        if (i + 1 < SIXTEENTHS)
#pragma unroll
          for (int next = step * 4 * OPERANDS / STEPS; next < (step + 1) * 4 * OPERANDS / STEPS; ++next)
            weigh(weight[(i + 1) % 2], total, product, factor, i + 1, next);
      }
    }
  }

  // Sum up over lanes; no tile may be added after this.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (SoftmaxState& state : softmax) state.sum = warp_reduce<Sum, 1, 4>(state.sum);
  }

 private:
  // Raise all maxima to the largest logits from some 16 tokens on.
  __device__ __forceinline__ void raise(const Products& product, float factor, int first_sixteenth) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      float largest = minus_infinity();
#pragma unroll
      for (int eighth = 2 * first_sixteenth; eighth < EIGHTS; ++eighth) {
        const float* logit = product[half / 2][eighth].value + half % 2 * 2;
        largest = fmaxf(largest, fmaxf(logit[0], logit[1]));
      }
      const float shrink = softmax[half].raise(as_logit(warp_reduce<Max, 1, 4>(largest), factor));
#pragma unroll
      for (ResultTile& tile : out[half / 2]) tile.value[half % 2 * 2] *= shrink, tile.value[half % 2 * 2 + 1] *= shrink;
    }
  }

  // A product's logit, rounded. What is too low for a float may be -infinity, as its weight is 0 beside what is raised.
  static __device__ __forceinline__ float as_logit(float product, float factor) {
    const float logit = product * factor;
    return logit > kLargestFloat ? kLargestFloat : logit;
  }

  // Make a pair of weights of 16 tokens, and add them to this lane's part of their sums.
  template <bool Rounded = false>
  __device__ __forceinline__ void weigh(Weights& weight, Totals& total, const Products& product, float factor,
                                        int sixteenth, int pair) {
    const int operand = pair / 4, half = pair % 2, eighth = pair / 2 % 2, of_all = 2 * operand + half;
    const float* logit = product[operand][2 * sixteenth + eighth].value + 2 * half;
    const float base = softmax[of_all].max;
    const auto above = [&](float x) { return Rounded ? as_logit(x, factor) - base : fmaf(x, factor, -base); };
    const float low = fast_exp2(above(logit[0])), high = fast_exp2(above(logit[1]));
    total[of_all] = eighth == 0 ? low + high : total[of_all] + (low + high);
    weight[operand].pair[half + 2 * eighth] = pack_pair(low, high, T());
  }

  // Take the weights of 16 tokens into the sums. If one of them has outgrown its maximum, which is seldom after the first
  // tile, raise all maxima and make the weights again: looking at sums, which are there, spares looking for the largest.
  __device__ __forceinline__ void settle(Weights& weight, Totals& total, float& headroom, const Products& product,
                                         float factor, int sixteenth) {
    bool outgrown = false;
#pragma unroll
    for (float sum : total) outgrown = outgrown || sum > headroom;
    if (__any_sync(kAllLanes, outgrown)) {
      raise(product, factor, sixteenth);
      if (wants_logits()) headroom = -1.0f;   // so that the rest of the tile takes this way
#pragma unroll
      for (int pair = 0; pair < 4 * OPERANDS; ++pair) weigh<true>(weight, total, product, factor, sixteenth, pair);
    }
#pragma unroll
    for (int half = 0; half < HALVES; ++half) softmax[half].sum += total[half];
  }
};
