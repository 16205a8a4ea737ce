// From a block table and strides to the address of a token's key or value: the only place that computes one.
//
// Every layout is four strides, in elements. A head's dimensions lie in packs of `Pack` neighbours; in the plain
// layouts the whole head is one pack, in BHDSX a key's pack is 16 bytes and a value's is one element.
#pragma once

constexpr int kUnmapped = -1;   // a block table's entry without a block

template <int Pack>
struct KvStrides {
  long long block, head, slot, pack;

  __device__ __forceinline__ long long offset(int block_id, int kv_head, int slot_in_block, int dim) const {
    return block_id * block + kv_head * head + slot_in_block * slot + (dim / Pack) * pack + dim % Pack;
  }
};
