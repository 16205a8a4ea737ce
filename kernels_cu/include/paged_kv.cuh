// From a block table and strides to the address of a token's key or value: the only place that computes one.
//
// Every layout is four strides, in elements. A head's dimensions lie in packs of `Pack` neighbours; in the plain
// layouts the whole head is one pack, in BHDSX a key's pack is 16 bytes and a value's is one element.
//
// TABLE_LOOKUP, a define that the paging experiment alone sets: 1 reads the block table; 0 computes what stands in a
// table whose sequences lie one behind the other, to see what reading it costs.
#pragma once

#include "global_memory.cuh"
#include "launch_overlap.cuh"

#ifndef TABLE_LOOKUP
#define TABLE_LOOKUP 1
#endif

constexpr int kUnmapped = -1;   // a block table's entry without a block

// One sequence's row of a block table.
struct BlockTable {
  const int* row;    // [max_blocks], -1 = unmapped
  long long first;   // entries of the table before the row

  __device__ __forceinline__ BlockTable(const int* block_tables, long long seq, int max_blocks)
      : row(block_tables + seq * max_blocks), first(seq * max_blocks) {}

  // The block that holds the sequence's tokens index * block_size and on.
  __device__ __forceinline__ int block(unsigned index) const {
#if TABLE_LOOKUP
    return load_global(row + index);
#else
    return static_cast<int>(first + index);
#endif
  }
  // What the table says while it may not be written yet.
  __device__ __forceinline__ int peek_block(unsigned index) const {
#if TABLE_LOOKUP
    return peek(row + index);
#else
    return static_cast<int>(first + index);
#endif
  }
};

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
