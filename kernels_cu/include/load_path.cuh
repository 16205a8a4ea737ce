// How a vector of a cached token's row comes to a thread: by which instruction, or through a texture bound in which way.
// A kernel that takes its rows from `CacheRows` runs by any of them, and nothing else in it differs.
//
// Defines
//   LOAD_PATH     one of the names below
//   TEXEL_FLOATS  1: texels of four channels of STORAGE, half or float, which the texture units turn into floats as they
//                 fetch: 8 bytes of memory become 16 of registers. 0: texels of 16 bytes of STORAGE as they are, in four
//                 integer channels, so that a fetch brings as much as any other load. bfloat16 is no texel's format.
//   TEXTURE_TILES  texture objects that one array of the cache takes: 1 where it fits the limits of one
#pragma once

#include "async_copy.cuh"
#include "global_memory.cuh"
#include "paged_kv.cuh"
#include "texture.cuh"
#include "types.cuh"

#define LOAD_PLAIN 0         // ld.global
#define LOAD_READ_ONLY 1     // __ldg, ld.global.nc
#define LOAD_NO_ALLOCATE 2   // ld.global.nc.L1::no_allocate
#define LOAD_ASYNC_COPY 3    // cp.async to shared memory, past L1 and registers
#define TEXTURE_LINEAR 4     // tex1Dfetch, in the cache itself
#define TEXTURE_PITCH 5      // tex2D, in the cache itself: a row is a KV block
#define TEXTURE_ARRAY 6      // tex2D, in a block-linear copy: x is the token's slot, y its vector

#ifndef LOAD_PATH
#define LOAD_PATH TEXTURE_LINEAR
#endif
#ifndef TEXEL_FLOATS
#define TEXEL_FLOATS 0
#endif
#ifndef TEXTURE_TILES
#define TEXTURE_TILES 1
#endif

// Keys or values in memory, and the texture objects over them.
template <typename T, int HeadDim, int BlockSize>
struct CachePlace {
  const T* cache;
  KvStrides<HeadDim> strides;
  unsigned long long texture;           // the only one, or
  const unsigned long long* textures;   // [TEXTURE_TILES], each of 2^tile_bits texels or rows, see below
  int tile_bits;
  int first_texel;                      // of the array: values lie between the keys in BS2HD
  int head_rows;                        // rows from a head to the next in TEXTURE_PITCH; 0: heads share a row
};

#if LOAD_PATH >= TEXTURE_LINEAR

#if TEXEL_FLOATS
template <typename T>
using Loaded = float;   // what a vector holds when it has arrived
using Texel = float4;
#else
template <typename T>
using Loaded = T;
using Texel = uint4;
#endif

template <typename T, int HeadDim, int BlockSize, int Slots>
struct CacheRows {
  static constexpr int VEC = kValuesPer16Bytes<Loaded<T>>;   // values in a texel
  using Vec = Vector<Loaded<T>, VEC>;
  const CachePlace<T, HeadDim, BlockSize>& place;

  // The vector that begins with dimension `dim` of a token's row, or zeros.
  __device__ __forceinline__ Vec start(bool wanted, int block_id, int kv_head, int slot, int dim, int) const {
    const KvStrides<HeadDim>& strides = place.strides;
    Texel texel = {};
#if LOAD_PATH == TEXTURE_LINEAR
    const auto offset = static_cast<unsigned long long>(strides.offset(block_id, kv_head, slot, dim));
    const long long index = place.first_texel + static_cast<long long>(offset / VEC);
    fetch_1d(texel, wanted, texture_of(wanted, index), within_tile(index));
#elif LOAD_PATH == TEXTURE_PITCH
    const int head_in_row = place.head_rows == 0 ? kv_head * static_cast<int>(strides.head) : 0;
    const auto in_row = static_cast<unsigned>(head_in_row + slot * strides.slot + dim);
    const int x = place.first_texel + static_cast<int>(in_row / VEC);
    const int y = block_id + kv_head * place.head_rows;
    fetch_2d(texel, wanted, texture_of(wanted, y), x, within_tile(y));
#else
    const long long x = static_cast<long long>(block_id) * BlockSize + slot;
    const int y = static_cast<int>(static_cast<unsigned>(kv_head * HeadDim + dim) / VEC);
    fetch_2d(texel, wanted, texture_of(wanted, x), within_tile(x), y);
#endif
    return reinterpret_cast<const Vec&>(texel);
  }
  __device__ __forceinline__ void wait() const {}
  __device__ __forceinline__ void take(Vec&, int) const {}

 private:
  __device__ __forceinline__ unsigned long long texture_of(bool wanted, long long coordinate) const {
    return TEXTURE_TILES == 1 ? place.texture
                              : load_global_if(wanted, place.textures + (coordinate >> place.tile_bits));
  }
  __device__ __forceinline__ int within_tile(long long coordinate) const {
    return static_cast<int>(TEXTURE_TILES == 1 ? coordinate : coordinate & ((1ll << place.tile_bits) - 1));
  }
};

#else

template <typename T>
using Loaded = T;

template <typename T, int HeadDim, int BlockSize, int Slots>
struct CacheRows {
  static constexpr int VEC = kValuesPer16Bytes<T>;
  using Vec = Vector<T, VEC>;
  const CachePlace<T, HeadDim, BlockSize>& place;
#if LOAD_PATH == LOAD_ASYNC_COPY
  uint4* shared;   // [Slots][threads]: a thread reads what it copied itself, so that no barrier is needed
#endif

  __device__ __forceinline__ Vec start(bool wanted, int block_id, int kv_head, int slot, int dim, int number) const {
    const T* address = place.cache + place.strides.offset(block_id, kv_head, slot, dim);
    const auto* vector = reinterpret_cast<const uint4*>(address);
#if LOAD_PATH == LOAD_PLAIN
    const uint4 bits = load_ordinary(wanted, vector);
#elif LOAD_PATH == LOAD_READ_ONLY
    const uint4 bits = load_read_only(wanted, vector);
#elif LOAD_PATH == LOAD_NO_ALLOCATE
    const uint4 bits = load_no_allocate(wanted, vector);
#else
    start_copy_16(shared + number * blockDim.x + threadIdx.x, wanted ? address : place.cache, wanted);
    const uint4 bits = {};
#endif
    return reinterpret_cast<const Vec&>(bits);
  }

  // Before a thread takes the vectors that it started, it waits for them; only copies need either.
  __device__ __forceinline__ void wait() const {
#if LOAD_PATH == LOAD_ASYNC_COPY
    close_copy_group();
    wait_for_copies<0>();
#endif
  }
  __device__ __forceinline__ void take(Vec& vector, int number) const {
#if LOAD_PATH == LOAD_ASYNC_COPY
    vector = reinterpret_cast<const Vec&>(shared[number * blockDim.x + threadIdx.x]);
#endif
  }
};

#endif
