// How decode work is shared out. A head tile of a sequence is a run of chunks of CHUNK tokens; long runs are cut into
// equal parts. These are the pieces that thread blocks take from a queue, the largest first (Graham, "Bounds on
// multiprocessing timing anomalies", 1969). Pieces of one part of a sequence stand together, so that all heads of a
// token, neighbours in memory, are read at about the same time.
//
// Who computes a piece is open; what the pieces are is not: the same plan gives the same bits.
#pragma once

#include "attention_tile.cuh"
#include "global_memory.cuh"

// A head tile of a part of a sequence.
struct __align__(16) Piece {
  int seq, tile;
  int begin, end;            // chunks of the sequence
  int parts, part;           // of the sequence; this one
  int slot;                  // of part 0 of this tile in the work space, where there are several parts
  int unused;

  __device__ __forceinline__ int chunks() const { return end - begin; }
};

// Chunks of a sequence that take part: with a sliding window, not those that no query token sees; not those of a prefix
// that is read elsewhere. A sequence of which nothing is left has one, so that somebody writes its output.
struct ChunkRange {
  int first, end;
};
__device__ __forceinline__ ChunkRange chunks_of(int seq_len, int query_tokens, int window, int prefix) {
  const int first = max(prefix, max(0, seq_len - query_tokens) - (window - 1)) / CHUNK;
  return {first, max(first + 1, (seq_len + CHUNK - 1) / CHUNK)};
}
