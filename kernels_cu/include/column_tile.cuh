// Rows of 16 tokens to a cache that keeps the slots of a dimension together (values in BHDSX): a warp turns a tile of
// them round in shared memory, so that it reads whole sectors of rows and writes whole sectors of columns.
//
// A tile is 16 tokens by two 16-byte vectors; a lane brings one vector of one token. What the warp writes are pieces: VEC
// neighbouring slots of one dimension, 16 bytes. Tokens whose slots make no piece (they are no neighbours, or do not
// begin at a multiple of VEC, or a block's slots are no multiple of it) are stored one value at a time.
#pragma once

#include "paged_kv.cuh"
#include "reduce.cuh"
#include "store_vector.cuh"
#include "types.cuh"

constexpr int kTileTokens = 16;
constexpr int kTileVectors = 2;

// What a lane brings.
__device__ __forceinline__ int token_of_lane() { return threadIdx.x % kTileTokens; }
__device__ __forceinline__ int vector_of_lane() { return threadIdx.x % kWarpSize / kTileTokens; }

// The slots of a tile's tokens, as each lane needs them. All lanes of the warp come here together.
template <int Vec, int BlockSize>
struct TileSlots {
  static constexpr int PIECES = kTileTokens / Vec;   // of a dimension

  long long slot;         // of the lane's token, -1 = skip
  bool alone;             // whether the lane's token is in no piece
  long long piece_slot;   // the first of the piece that the lane writes, -1 if its tokens make none

  __device__ __forceinline__ explicit TileSlots(long long slot_of_token) : slot(slot_of_token) {
    const long long first = __shfl_sync(kAllLanes, slot, token_of_lane() / Vec * Vec);
    const bool in_place = first >= 0 && first % Vec == 0 && slot == first + token_of_lane() % Vec;
    const unsigned in_places = __ballot_sync(kAllLanes, BlockSize % Vec == 0 && in_place);
    const auto makes_piece = [&](int piece) { return (in_places >> piece * Vec & ((1u << Vec) - 1)) == (1u << Vec) - 1; };
    const int piece = threadIdx.x % PIECES;
    const long long piece_first = __shfl_sync(kAllLanes, slot, piece * Vec);
    alone = !makes_piece(token_of_lane() / Vec);
    piece_slot = makes_piece(piece) ? piece_first : -1;
  }
};

// A warp's own shared memory. Between the two vectors is room for a dimension more: their stores meet in no bank.
template <typename T>
struct __align__(16) ColumnTile {
  static constexpr int VEC = kValuesPer16Bytes<T>;
  T value[(kTileVectors * VEC + 1) * kTileTokens];   // [dimension][token]

  __device__ __forceinline__ T* at(int dim, int token) { return value + (dim + dim / VEC) * kTileTokens + token; }

  // Store the lane's vector, the `vector`-th of a token's row of all KV heads, -1 for none. All lanes come here together,
  // and to this tile again only after the barrier of another tile's store, as it may still be read.
  template <int HeadDim, int BlockSize, int Pack>
  __device__ __forceinline__ void store(T* cache, const KvStrides<Pack>& strides, const TileSlots<VEC, BlockSize>& slots,
                                        int vector, const Vector<T, VEC>& row) {
    constexpr int VECTORS = HeadDim / VEC;
    const int piece = threadIdx.x % kWarpSize, dim = piece / slots.PIECES, token = piece % slots.PIECES * VEC;
    const int vector_of_dim = __shfl_sync(kAllLanes, vector, dim / VEC * kTileTokens);
#pragma unroll
    for (int v = 0; v < VEC; ++v) *at(vector_of_lane() * VEC + v, token_of_lane()) = row.value[v];
    __syncwarp();   // every lane's values are here
    if (slots.piece_slot >= 0 && vector_of_dim >= 0) {
      const int block_id = static_cast<int>(slots.piece_slot / BlockSize);
      const int slot_in_block = static_cast<int>(slots.piece_slot % BlockSize);
      const int dim_of_head = vector_of_dim % VECTORS * VEC + dim % VEC;
      *reinterpret_cast<Vector<T, VEC>*>(
          cache + strides.offset(block_id, vector_of_dim / VECTORS, slot_in_block, dim_of_head)) =
          *reinterpret_cast<const Vector<T, VEC>*>(at(dim, token));
    }
    if (slots.alone && slots.slot >= 0 && vector >= 0)
      store_vector(cache, strides, static_cast<int>(slots.slot / BlockSize), vector / VECTORS,
                   static_cast<int>(slots.slot % BlockSize), vector % VECTORS * VEC, row);
  }
};
