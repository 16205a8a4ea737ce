// How decode work is shared out: all chunks of all (sequence, head tile) pairs stand in one line, and every thread block
// takes the same number of them in a row. A long sequence is spread over many blocks, short ones share one, and nobody
// waits: the work is split by bytes, whatever the lengths are ("stream-K", Osama et al., arXiv 2301.03598).
#pragma once

#include "global_memory.cuh"

constexpr int CHUNK = 16;   // tokens that one warp takes at a time

struct DecodePlan {
  const int* offsets;     // [num_seqs + 1], chunks of all head tiles of the sequences before each
  int num_seqs, tiles;    // tiles: head tiles of a sequence

  __device__ __forceinline__ int total() const { return load_global(offsets + num_seqs); }
  __device__ __forceinline__ int chunks_of(int seq) const {
    return (load_global(offsets + seq + 1) - load_global(offsets + seq)) / tiles;
  }
  // How many blocks share: each has a chunk at least.
  static __device__ __forceinline__ int sharing_blocks(int blocks, int total) { return blocks < total ? blocks : total; }
  // First chunk in line of a block, and the block that has a chunk.
  static __device__ __forceinline__ int first_of(int block, int blocks, int total) {
    return static_cast<int>(static_cast<long long>(total) * block / blocks);
  }
  static __device__ __forceinline__ int block_of(int chunk, int blocks, int total) {
    return static_cast<int>(((chunk + 1ll) * blocks - 1) / total);
  }
};

// A place in the line.
struct Cursor {
  int line;                // how many chunks stand before it
  int seq, tile, chunk;    // what it is: a chunk of a head tile of a sequence
  int chunks;              // in this sequence

  __device__ __forceinline__ void start(const DecodePlan& plan, int place, int first_seq) {
    line = place;
    seq = first_seq;
    chunks = plan.chunks_of(seq);
    const int within = place - load_global(plan.offsets + seq);
    tile = within / chunks;
    chunk = within % chunks;
  }
  __device__ __forceinline__ void advance(const DecodePlan& plan, int places) {
    line += places;
    chunk += places;
    while (chunk >= chunks) {
      chunk -= chunks;
      if (++tile == plan.tiles) {
        tile = 0;
        do {
          if (++seq == plan.num_seqs) return;   // past the end of the line
          chunks = plan.chunks_of(seq);
        } while (chunks == 0);
      }
    }
  }
};
