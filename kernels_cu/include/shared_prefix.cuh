// A prefix that all sequences share, read once for all of them (Juravsky et al., "Hydragen", arXiv 2402.05099): a first
// launch attends to it with the query tokens of all sequences, as if they were one sequence's; a second attends to what
// follows in each sequence, and takes in what the first found, in float32, before it writes its result.
#pragma once

#include "types.cuh"
#include "variants.cuh"

#define PREFIX_ALONE 1
#define PREFIX_BEFORE 2
#ifndef SHARED_PREFIX
#define SHARED_PREFIX 0   // PREFIX_ALONE: the first launch; PREFIX_BEFORE: the second; 0: nothing is shared
#endif

struct SharedPrefix {
  int tokens, num_seqs;
  float* out;     // [num_seqs, query_tokens, num_heads, HEAD_DIM], sums of values by their weights
  float* state;   // [num_seqs, query_tokens, num_heads, 2], maximum and sum of weights

  // Leave attention over the prefix, 4 dimensions of query row `at`, or take it in. Part: a softmax's state and a sum.
  template <typename Part>
  __device__ __forceinline__ void store(const Part& part, long long at, int head_dim, int dim) const {
    *reinterpret_cast<Vector<float, 4>*>(out + at * head_dim + dim) = {part.sum[0], part.sum[1], part.sum[2], part.sum[3]};
    if (dim == 0) *reinterpret_cast<Vector<float, 2>*>(state + 2 * at) = {part.softmax.max, part.softmax.sum};
  }
  template <typename Part>
  __device__ __forceinline__ void add_to(Part& part, long long at, int head_dim, int dim) const {
    const auto sum = load_global(reinterpret_cast<const Vector<float, 4>*>(out + at * head_dim + dim));
    const auto weights = load_global(reinterpret_cast<const Vector<float, 2>*>(state + 2 * at));
    part.merge(SoftmaxState{weights[0], weights[1]}, sum);
  }

  // Rows of the block table that this launch goes by: one where all sequences are as if they were one.
  __device__ __forceinline__ int table_rows() const { return SHARED_PREFIX == PREFIX_ALONE ? 1 : num_seqs; }

  // Of a sequence, this launch reads the tokens from here to there.
  __device__ __forceinline__ int first_token() const { return SHARED_PREFIX == PREFIX_BEFORE ? tokens : 0; }
  __device__ __forceinline__ int end_token(const int* seq_lens, int seq) const {
    return SHARED_PREFIX == PREFIX_ALONE ? tokens : load_global(seq_lens + seq);
  }

  // How many query tokens attend to what a sequence's table row maps.
  __device__ __forceinline__ int query_tokens(const Variants& variants) const {
    return SHARED_PREFIX == PREFIX_ALONE ? num_seqs * variants.query_tokens : QUERY_TOKENS ? variants.query_tokens : 1;
  }

  // How many tokens of its own sequence query token i of these sees, whether this launch reads them or not.
  __device__ __forceinline__ int context_of(const Variants& variants, const int* seq_lens, int seq, int i) const {
    if (SHARED_PREFIX == PREFIX_ALONE) seq = i / variants.query_tokens, i -= seq * variants.query_tokens;
    return variants.context_of(load_global(seq_lens + seq), i);
  }
};
