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

  __device__ __forceinline__ bool is_mapped(int token) const { return (mapped[token / 32] >> token % 32 & 1) != 0; }
  __device__ __forceinline__ bool all_mapped() const {
    bool all = true;
#pragma unroll
    for (int i = 0; i < Tokens / 32; ++i) all = all && mapped[i] == 0xffffffffu;
    return all;
  }

  // Of the tile's tokens, those that a row sees if they are mapped.
  struct Range {
    int begin, end;
    // All conditions are looked at, as branches would take longer.
    __device__ __forceinline__ bool holds(int token) const { return (!CAUSAL | token < end) & (!WINDOW | token >= begin); }
  };
  __device__ __forceinline__ Range range_of(int context) const {
    return {variants.first_token(context) - first, context - first};
  }
};
