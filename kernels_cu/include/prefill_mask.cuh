// Which context tokens a query row of a prefill sees: those up to its own (CAUSAL), within its window, that are mapped.
// A warp asks once a tile whether it need look at tokens one by one, and whether the tile is for it at all.
#pragma once

#include "variants.cuh"

#ifndef CAUSAL
#define CAUSAL 1   // 0: every query token sees all of its sequence's tokens
#endif

// What a warp's rows see of a tile of `Tokens` tokens that begins at `first`.
template <int Tokens>
struct PrefillMask {
  static_assert(Tokens == 64, "a bit for each in two words");
  Variants variants;
  int first;                // token
  const unsigned* mapped;   // [Tokens / 32], a bit for each token: whether it is there

  // Of rows whose contexts lie from `shortest` to `longest`: whether none sees any token, and whether each sees all.
  __device__ __forceinline__ bool nothing_seen(int shortest, int longest) const {
    return (CAUSAL && first >= longest) || first + Tokens <= variants.first_token(shortest);
  }
  __device__ __forceinline__ bool all_seen(int shortest, int longest) const {
    return (!CAUSAL || first + Tokens <= shortest) && first >= variants.first_token(longest) && all_mapped();
  }

  __device__ __forceinline__ bool all_mapped() const {
    bool all = true;
#pragma unroll
    for (int i = 0; i < Tokens / 32; ++i) all = all && mapped[i] == 0xffffffffu;
    return all;
  }

  // A bit for each token of the tile: whether a row of this context sees it.
  __device__ __forceinline__ unsigned long long seen_by(int context) const {
    const int begin = variants.first_token(context) - first, end = context - first;
    unsigned word[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      word[i] = mapped[i];
      if (CAUSAL) word[i] &= bits_below(end - 32 * i);
      if (WINDOW) word[i] &= ~bits_below(begin - 32 * i);
    }
    return static_cast<unsigned long long>(word[1]) << 32 | word[0];
  }
  static __device__ __forceinline__ unsigned bits_below(int n) { return n <= 0 ? 0u : 0xffffffffu >> max(32 - n, 0); }
};
