// Write new keys and values into the slots that the block manager chose for them; a slot of -1 is skipped.
//
// One thread moves one 16-byte vector of a token's row, first of its key, then of its value. Where a layout keeps slots
// together and not dimensions (values in BHDSX), a warp takes two neighbouring vectors of 16 tokens, and turns the values
// round in shared memory: if the tokens' slots are neighbours, as those of a prompt are, it writes whole sectors.
//
// Measured on an H100 (experiments/results/h100-80gb-hbm3/cache_ops.csv), from 64 MB on: 95 to 96 % of a copy's
// speed in the plain layouts, 90 to 91 % in BHDSX.
//
// Grid:  enough for num_tokens * num_kv_heads * HEAD_DIM / VEC threads; in BHDSX, for as many warps as there are tiles,
//        num_tokens / 16, up, * num_kv_heads * HEAD_DIM / VEC / 2, up.    Block: (a multiple of 32, THREADS at most).
//
// Defines
//   STORAGE     __half, __nv_bfloat16 or float
//   SLOT        int or long long, the type of slot_mapping
//   HEAD_DIM    a multiple of 8
//   BLOCK_SIZE  tokens per KV block
//   KEY_PACK    neighbouring dimensions of a key: HEAD_DIM, or 16 / sizeof(STORAGE) in BHDSX
//   VALUE_PACK  neighbouring dimensions of a value: HEAD_DIM, or 1 in BHDSX
#include "column_tile.cuh"
#include "global_memory.cuh"
#include "paged_kv.cuh"
#include "store_vector.cuh"
#include "types.cuh"

constexpr int VEC = kValuesPer16Bytes<STORAGE>;
constexpr int VECTORS = HEAD_DIM / VEC;   // 16-byte vectors in a token's row
constexpr int THREADS = 256;
using Row = Vector<STORAGE, VEC>;

// Return a / b: in 32 bits where that is enough, as 64 take many times as long.
__device__ __forceinline__ long long quotient(long long a, int b) {
  return a <= 0xffffffffLL ? static_cast<unsigned>(a) / static_cast<unsigned>(b) : a / b;
}

// Move a warp's tile: the lane's vector of the lane's token.
__device__ __forceinline__ void append_tile(STORAGE* key_cache, STORAGE* value_cache, const STORAGE* key,
                                            const STORAGE* value, const SLOT* slot_mapping, long long num_tokens,
                                            int num_kv_heads, const KvStrides<KEY_PACK>& key_strides,
                                            const KvStrides<VALUE_PACK>& value_strides) {
  __shared__ ColumnTile<STORAGE> tiles[THREADS / kWarpSize];
  const long long tile = (blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x) / kWarpSize;
  const int vectors_per_token = num_kv_heads * VECTORS, tiles_per_token = (vectors_per_token + 1) / kTileVectors;
  const long long tokens_before = quotient(tile, tiles_per_token) * kTileTokens;
  if (tokens_before >= num_tokens) return;   // the whole warp
  const int first_vector = static_cast<int>(tile - tokens_before / kTileTokens * tiles_per_token) * kTileVectors;
  const long long token = tokens_before + token_of_lane();
  const int vector = first_vector + vector_of_lane();
  const bool there = token < num_tokens && vector < vectors_per_token;

  const long long row = token * vectors_per_token + vector;   // the inputs are contiguous
  const Row new_key = load_global_if(there, reinterpret_cast<const Row*>(key) + row);
  const Row new_value = load_global_if(there, reinterpret_cast<const Row*>(value) + row);
  const long long slot = token < num_tokens ? static_cast<long long>(load_global(slot_mapping + token)) : -1;
  if (there && slot >= 0)
    store_vector(key_cache, key_strides, static_cast<int>(slot / BLOCK_SIZE), vector / VECTORS,
                 static_cast<int>(slot % BLOCK_SIZE), vector % VECTORS * VEC, new_key);
  const TileSlots<VEC, BLOCK_SIZE> slots(slot);
  tiles[threadIdx.x / kWarpSize].store<HEAD_DIM>(value_cache, value_strides, slots, there ? vector : -1, new_value);
}

extern "C" __global__ void append_kv(
    STORAGE* __restrict__ key_cache,      // by the four strides below
    STORAGE* __restrict__ value_cache,    // likewise
    const STORAGE* __restrict__ key,      // [num_tokens, num_kv_heads, HEAD_DIM]
    const STORAGE* __restrict__ value,    // [num_tokens, num_kv_heads, HEAD_DIM]
    const SLOT* __restrict__ slot_mapping,   // [num_tokens], slot = block * BLOCK_SIZE + offset, -1 = skip
    const long long num_tokens, const int num_kv_heads,
    const int key_block_stride, const long long key_head_stride, const int key_slot_stride, const int key_pack_stride,
    const int value_block_stride, const long long value_head_stride, const int value_slot_stride,
    const int value_pack_stride) {
  const KvStrides<KEY_PACK> key_strides{key_block_stride, key_head_stride, key_slot_stride, key_pack_stride};
  const KvStrides<VALUE_PACK> value_strides{value_block_stride, value_head_stride, value_slot_stride, value_pack_stride};
  if (VALUE_PACK == 1) {
    append_tile(key_cache, value_cache, key, value, slot_mapping, num_tokens, num_kv_heads, key_strides, value_strides);
    return;
  }
  const long long thread = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  const int vectors_per_token = num_kv_heads * VECTORS;
  const long long token = quotient(thread, vectors_per_token);
  if (token >= num_tokens) return;
  const int vector_in_token = static_cast<int>(thread - token * vectors_per_token);
  const int kv_head = vector_in_token / VECTORS, dim = vector_in_token % VECTORS * VEC;
  const long long slot = load_global(slot_mapping + token);
  const Row new_key = load_global_if(slot >= 0, reinterpret_cast<const Row*>(key) + thread);   // the inputs are contiguous
  const Row new_value = load_global_if(slot >= 0, reinterpret_cast<const Row*>(value) + thread);
  if (slot < 0) return;
  const int block_id = static_cast<int>(slot / BLOCK_SIZE), slot_in_block = static_cast<int>(slot % BLOCK_SIZE);
  store_vector(key_cache, key_strides, block_id, kv_head, slot_in_block, dim, new_key);
  store_vector(value_cache, value_strides, block_id, kv_head, slot_in_block, dim, new_value);
}
