// How prefill work is shared out. The rows of a KV head are the query heads of its group, token by token; a piece is a
// tile of them over some tiles of the context, for one KV head after the other. Thread blocks take pieces from a queue,
// the longest first (Graham, "Bounds on multiprocessing timing anomalies", 1969).
//
// Heads are taken in sections, as many as have their keys and values in the L2 cache together: row tiles of one sequence
// and head read the same tokens.
#pragma once

#include "async_copy.cuh"
#include "global_memory.cuh"
#include "types.cuh"

struct __align__(16) PrefillPiece {
  int seq, first_token;         // where the sequence's new tokens begin in the query
  int first_row, rows;          // of the tile, within the sequence's
  int context, seq_len;         // tokens up to the first new token, its own the last: 0 or less if there are not so many
  int begin, end;               // tiles of context tokens
  int parts, part, slot;        // where the context is cut into parts: of how many, which, and the first's place
  int unused;

  __device__ __forceinline__ int tiles() const { return end - begin; }
};

// A piece that is taken, and the KV head that it is for.
struct PrefillWork {
  PrefillPiece piece;
  int kv_head;   // below 0: there is no more work
};

// The pieces in the order in which they are taken, each for every KV head of a section.
struct PrefillQueue {
  const PrefillPiece* pieces;
  int count, section, num_kv_heads;

  // Start to copy the number-th piece to shared memory; one thread does it.
  __device__ __forceinline__ void start_copy(PrefillWork& to, int number) const {
    to.kv_head = -1;
    if (number >= count * num_kv_heads) return;
    const int first_head = number / (count * section) * section, within = number - first_head * count;
    const int heads = min(section, num_kv_heads - first_head), index = within / heads;
    to.kv_head = first_head + (within - index * heads);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(PrefillPiece)) / 16; ++i)
      start_copy_16(reinterpret_cast<char*>(&to.piece) + 16 * i, reinterpret_cast<const char*>(pieces + index) + 16 * i, true);
    close_copy_group();
  }
};

// The query rows of a piece.
struct PrefillRows {
  int first_row, group, context;
  int first_token, first_head, num_heads;

  __device__ __forceinline__ PrefillRows(const PrefillWork& work, int group, int num_heads)
      : first_row(work.piece.first_row), group(group), context(work.piece.context),
        first_token(work.piece.first_token), first_head(work.kv_head * group), num_heads(num_heads) {}

  __device__ __forceinline__ int token(int row) const { return (first_row + row) / group; }   // of the sequence's new ones
  __device__ __forceinline__ int head(int row) const { return first_head + (first_row + row) % group; }
  // Tokens up to the row's own, that among them.
  __device__ __forceinline__ int context_of(int row) const { return context + token(row); }
  // The row's place in [total_tokens, num_heads].
  __device__ __forceinline__ long long index(int row) const {
    return static_cast<long long>(first_token + token(row)) * num_heads + head(row);
  }
};
