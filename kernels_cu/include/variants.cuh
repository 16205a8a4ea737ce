// What attention does besides plain decode: a sliding window, a soft cap, ALiBi, sinks, several query tokens a sequence.
//
// Each has a define, 0 where it is not given: a kernel calls these functions in any case, and what is not asked for
// compiles to nothing. The values are parameters of the kernel. Logits are in units of log 2, as in softmax.cuh.
#pragma once

#include "global_memory.cuh"
#include "soft_cap.cuh"
#include "softmax.cuh"

#ifndef WINDOW
#define WINDOW 0          // 1: a query sees the last `window` tokens only, its own among them
#endif
#ifndef SOFTCAP
#define SOFTCAP 0         // 1: logits are bounded, softcap * tanh(logit / softcap)   (Gemma 2)
#endif
#ifndef ALIBI
#define ALIBI 0           // 1: a head's slope times the distance is added to logits   (Press et al., arXiv 2108.12409)
#endif
#ifndef SINKS
#define SINKS 0           // 1: a logit for each head that joins the sum of exponentials only   (gpt-oss)
#endif
#ifndef QUERY_TOKENS
#define QUERY_TOKENS 0    // 1: sequences have `query_tokens` query tokens each, the last of which is at the end
#endif

struct Variants {
  int query_tokens, window;
  float softcap;
  const float* alibi_slopes;   // [num_heads]
  const float* sinks;          // [num_heads]

  // How many tokens query token i of a sequence of length `seq_len` sees, its own the last; below 1 it sees none.
  __device__ __forceinline__ int context_of(int seq_len, int i) const {
    return QUERY_TOKENS ? seq_len - query_tokens + 1 + i : seq_len;
  }

  // The first token that takes part in a context: what lies before it is not read.
  __device__ __forceinline__ int first_token(int context) const { return WINDOW ? max(context - window, 0) : 0; }

  // A head's slope, for `logit`.
  __device__ __forceinline__ float slope_of(int head) const {
    return ALIBI ? load_global(alibi_slopes + head) * kLog2E : 0.0f;
  }

  // The logit of a scaled product of query and key: first the soft cap, then the bias by distance, 0 for the query's own
  // token, which is the last of its context.
  __device__ __forceinline__ float logit(float product, int key_token, int context, float slope) const {
#if SOFTCAP
    product = soft_capped(product, softcap * kLog2E);
#endif
#if ALIBI
    product += slope * static_cast<float>(key_token - (context - 1));
#endif
    return SOFTCAP && !ALIBI ? product : saturated(product);   // a soft cap keeps it in range
  }

  // Let a head's sink join a softmax, once for the whole context; returns the factor for the weighted sum of values.
  __device__ __forceinline__ float add_sink(SoftmaxState& softmax, int head) const {
#if SINKS
    const float given = load_global(sinks + head);
    const float sink = given == minus_infinity() ? given : saturated(given * kLog2E);
    const float factor = softmax.raise(sink);
    softmax.sum += softmax_weight(sink, softmax.max);
    return factor;
#else
    return 1.0f;
#endif
  }
};
