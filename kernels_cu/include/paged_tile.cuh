// A tile of context tokens of a paged sequence, copied to shared memory by all threads of a block. The block table is
// looked up a tile ahead: lane l of every warp looks after the entries of tokens l, l + 32, ...
#pragma once

#include "async_copy.cuh"
#include "paged_kv.cuh"
#include "recomputed.cuh"
#include "reduce.cuh"
#include "swizzled_rows.cuh"
#include "types.cuh"

template <typename T, int HeadDim, int BlockSize, int Tokens, int Threads>
struct TileLoader {
  using Rows = SwizzledRows<T, HeadDim>;
  static constexpr int ENTRIES = Tokens / kWarpSize;
  // Lanes that copy a row, each every LANES-th vector of it: what one looks up and computes serves several copies.
  static constexpr int LANES = Rows::VECTORS % 8 == 0 ? 8 : Rows::VECTORS % 4 == 0 ? 4 : Rows::VECTORS;
  // Rows that are copied at once, a power of 2: from 8 on, vectors of a column change places alike in every turn.
  static constexpr int ROWS_A_TURN = largest_power_of_2(Threads / LANES < kWarpSize ? Threads / LANES : kWarpSize);
  static constexpr int TURNS = Tokens / ROWS_A_TURN;
  static_assert(Tokens % kWarpSize == 0 && ROWS_A_TURN >= 1 && ROWS_A_TURN <= kWarpSize,
                "lanes look after as many tokens each");

  long long head_offset;         // of the KV head, in keys and in values
  int block_stride, slot_stride;
  BlockTable table;
  int max_blocks;
  int from_token, to_token;      // that are wanted
  int entry[ENTRIES];            // the block of each token that is wanted and mapped, else kUnmapped

  __device__ __forceinline__ void look_up(int tile) {
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
      const int token = tile * Tokens + e * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize;
      const unsigned index = static_cast<unsigned>(token) / BlockSize;
      entry[e] = kUnmapped;
      if (from_token <= token && token < to_token && index < static_cast<unsigned>(max_blocks))
        entry[e] = table.block(index);
    }
  }

  // Start to copy the tile that was looked up. A row without a token becomes zeros: what lies in its slot may be NaN.
  __device__ __forceinline__ void start_copy(const T* key_cache, const T* value_cache, int tile,
                                             T* key_rows, T* value_rows,   // [Tokens][HeadDim], by place_of
                                             unsigned* mapped) const {     // [ENTRIES], a bit for each token
    const int thread = recomputed(threadIdx.x), row = thread / LANES, vector = thread % LANES;
    const bool copies = Threads == ROWS_A_TURN * LANES || row < ROWS_A_TURN;
    const KvStrides<HeadDim> strides{block_stride, 0, slot_stride, 0};
    const int first_place = Rows::place_of(row, vector);
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
      const int below = turn * ROWS_A_TURN, entry_of = below / kWarpSize;
      const int found = __shfl_sync(kAllLanes, entry[entry_of], below % kWarpSize + row);   // from who looked it up
      const int block_id = found == kUnmapped ? 0 : found;
      const int slot = static_cast<unsigned>(tile * Tokens + below + row) % BlockSize;
      const long long offset = head_offset + strides.offset(block_id, 0, slot, vector * Rows::VEC);
      const int place = ROWS_A_TURN % 8 == 0 ? first_place + below * HeadDim : Rows::place_of(below + row, vector);
      if (!copies) continue;
#pragma unroll
      for (int on = 0; on < HeadDim; on += LANES * Rows::VEC) {   // vectors change places within the first LANES alike
        start_copy_16(key_rows + place + on, key_cache + offset + on, found != kUnmapped);
        start_copy_16(value_rows + place + on, value_cache + offset + on, found != kUnmapped);
      }
    }
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
      const unsigned bits = __ballot_sync(kAllLanes, entry[e] != kUnmapped);
      if (threadIdx.x == 0) mapped[e] = bits;
    }
  }
};
