// From a block table and strides to the address of a token's key or value: the only place that computes one.
//
// Every layout is four strides, in elements. A head's dimensions lie in packs of `Pack` neighbours; in the plain
// layouts the whole head is one pack, in BHDSX a key's pack is 16 bytes and a value's is one element.
#pragma once

constexpr int kUnmapped = -1;   // a block table's entry without a block

template <int Pack>
struct KvStrides {
  int block;        // strides within a block, and of a block, fit 32 bits; what they are multiplied by makes 64
  long long head;
  int slot, pack;

  __device__ __forceinline__ long long offset(int block_id, int kv_head, int slot_in_block, int dim) const {
    const long long of_head = kv_head * head + static_cast<long long>(dim / Pack) * pack + dim % Pack;
    return of_head + (static_cast<long long>(block_id) * block + static_cast<long long>(slot_in_block) * slot);
  }
};
