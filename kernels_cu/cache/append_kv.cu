// Write new keys and values into the slots that the block manager chose for them; a slot of -1 is skipped.
//
// One thread moves one 16-byte vector of a token's row, first of its key, then of its value. Where a layout does not
// keep the vector together (values in BHDSX), it is stored one element at a time.
//
// Grid:  enough for num_tokens * num_kv_heads * HEAD_DIM / VEC threads.    Block: (any).
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
  const long long token = thread / vectors_per_token;
  if (token >= num_tokens) return;
  const long long slot = load_global(slot_mapping + token);
  if (slot < 0) return;

  const int vector_in_token = static_cast<int>(thread % vectors_per_token);
  const int kv_head = vector_in_token / VECTORS, dim = vector_in_token % VECTORS * VEC;
  const int block_id = static_cast<int>(slot / BLOCK_SIZE), slot_in_block = static_cast<int>(slot % BLOCK_SIZE);
  const KvStrides<KEY_PACK> key_strides{key_block_stride, key_head_stride, key_slot_stride, key_pack_stride};
  const KvStrides<VALUE_PACK> value_strides{value_block_stride, value_head_stride, value_slot_stride, value_pack_stride};
  const long long row = thread * VEC;   // the inputs are contiguous: vector i of all is theirs too
  const auto new_key = load_global(reinterpret_cast<const Vector<STORAGE, VEC>*>(key + row));
  const auto new_value = load_global(reinterpret_cast<const Vector<STORAGE, VEC>*>(value + row));
  store_vector(key_cache, key_strides, block_id, kv_head, slot_in_block, dim, new_key);
  store_vector(value_cache, value_strides, block_id, kv_head, slot_in_block, dim, new_value);
}
