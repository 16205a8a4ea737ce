// Write new keys and values into the slots that the block manager chose for them; a slot of -1 is skipped.
//
// One thread moves one 16-byte vector of a token's row, first of its key, then of its value. Where a layout keeps slots
// together and not dimensions (values in BHDSX), it takes the vectors of GROUP tokens, and turns them round in registers:
// if the tokens' slots are neighbours, as those of a prompt are, a dimension of all of them is a vector again. Else they
// are stored one by one.
//
// Grid:  enough for num_tokens / GROUP (1, or VEC in BHDSX), up, * num_kv_heads * HEAD_DIM / VEC threads.    Block: (any).
//
// Defines
//   STORAGE     __half, __nv_bfloat16 or float
//   SLOT        int or long long, the type of slot_mapping
//   HEAD_DIM    a multiple of 8
//   BLOCK_SIZE  tokens per KV block
//   KEY_PACK    neighbouring dimensions of a key: HEAD_DIM, or 16 / sizeof(STORAGE) in BHDSX
//   VALUE_PACK  neighbouring dimensions of a value: HEAD_DIM, or 1 in BHDSX
#include "global_memory.cuh"
#include "paged_kv.cuh"
#include "store_vector.cuh"
#include "types.cuh"

constexpr int VEC = kValuesPer16Bytes<STORAGE>;
constexpr int VECTORS = HEAD_DIM / VEC;   // 16-byte vectors in a token's row
constexpr int GROUP = VALUE_PACK == 1 ? VEC : 1;   // tokens of a thread
using Row = Vector<STORAGE, VEC>;

// Store the values of GROUP tokens with neighbouring slots, the first a multiple of GROUP: a vector for each dimension.
__device__ __forceinline__ void store_columns(STORAGE* cache, const KvStrides<VALUE_PACK>& strides, int block_id,
                                              int kv_head, int slot, int dim, const Row (&value)[GROUP]) {
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    Vector<STORAGE, GROUP> column;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) column.value[i] = value[i].value[v];
    *reinterpret_cast<Vector<STORAGE, GROUP>*>(cache + strides.offset(block_id, kv_head, slot, dim + v)) = column;
  }
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
  const long long thread = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  const int vectors_per_token = num_kv_heads * VECTORS;
  const long long group = thread <= 0xffffffffLL ? static_cast<unsigned>(thread) / static_cast<unsigned>(vectors_per_token)
                                                 : thread / vectors_per_token;   // takes many times as long
  const long long first_token = group * GROUP;
  if (first_token >= num_tokens) return;
  const int vector_in_token = static_cast<int>(thread - group * vectors_per_token);
  const int kv_head = vector_in_token / VECTORS, dim = vector_in_token % VECTORS * VEC;
  const KvStrides<KEY_PACK> key_strides{key_block_stride, key_head_stride, key_slot_stride, key_pack_stride};
  const KvStrides<VALUE_PACK> value_strides{value_block_stride, value_head_stride, value_slot_stride, value_pack_stride};

  long long slot[GROUP];
  Row new_key[GROUP], new_value[GROUP];
  bool together = GROUP > 1 && BLOCK_SIZE % GROUP == 0;   // whether the values' slots are a vector
#pragma unroll
  for (int i = 0; i < GROUP; ++i) {
    const bool there = first_token + i < num_tokens;
    slot[i] = there ? static_cast<long long>(load_global(slot_mapping + first_token + i)) : -1;
    const long long row = (first_token + i) * vectors_per_token + vector_in_token;   // the inputs are contiguous
    new_key[i] = load_global_if(slot[i] >= 0, reinterpret_cast<const Row*>(key) + row);
    new_value[i] = load_global_if(slot[i] >= 0, reinterpret_cast<const Row*>(value) + row);
    together = together && slot[i] == slot[0] + i;
  }
  together = together && slot[0] >= 0 && slot[0] % GROUP == 0;
#pragma unroll
  for (int i = 0; i < GROUP; ++i) {
    if (slot[i] < 0) continue;
    const int block_id = static_cast<int>(slot[i] / BLOCK_SIZE), slot_in_block = static_cast<int>(slot[i] % BLOCK_SIZE);
    store_vector(key_cache, key_strides, block_id, kv_head, slot_in_block, dim, new_key[i]);
    if (!together) store_vector(value_cache, value_strides, block_id, kv_head, slot_in_block, dim, new_value[i]);
    else if (i == 0) store_columns(value_cache, value_strides, block_id, kv_head, slot_in_block, dim, new_value);
  }
}
