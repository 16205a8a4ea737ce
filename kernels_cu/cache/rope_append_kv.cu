// Rotate new keys by their positions (RoPE, Su et al., arXiv 2104.09864) and write them to their slots with their values;
// rotate queries too, if there are any. Saves writing rotated keys and reading them again.
//
// A block has a token: its threads find the token's sines and cosines once, for all heads. An angle is a number of turns,
// of which only the fraction counts: position times frequency is taken exactly to twice a float's digits, so that
// far positions lose nothing. Where a layout keeps slots together and not dimensions (values in BHDSX), a block has a
// tile's 16 tokens, whose values its warps turn round in shared memory, and shares their heads with others.
//
// Measured on an H100 (experiments/results/h100-80gb-hbm3/cache_ops.csv), from 64 MB on: 89 to 91 % of a copy's
// speed in the plain layouts, 77 to 81 % in BHDSX.
//
// Grid:  (num_tokens), in BHDSX (num_tokens / 16, up; blocks that share the heads, any).    Block: (THREADS).
//
// Defines
//   STORAGE      __half, __nv_bfloat16 or float
//   SLOT         int or long long, the type of slot_mapping
//   HEAD_DIM     a multiple of 8
//   ROTARY_DIM   dimensions that turn, the first; a multiple of twice a vector's, 2 * VEC
//   INTERLEAVED  1: neighbours turn together; 0: dimension i and i + ROTARY_DIM / 2
//   BLOCK_SIZE, KEY_PACK, VALUE_PACK  as in append_kv
#include "column_tile.cuh"
#include "global_memory.cuh"
#include "paged_kv.cuh"
#include "store_vector.cuh"
#include "types.cuh"

constexpr int THREADS = 128;
constexpr int VEC = kValuesPer16Bytes<STORAGE>;
constexpr int VECTORS = HEAD_DIM / VEC;              // in a row
constexpr int PAIRS = ROTARY_DIM / 2;                // that turn together
constexpr int TURNED = ROTARY_DIM / VEC;             // vectors that turn
constexpr int ITEMS = VECTORS - TURNED / 2;          // of a row: two vectors that turn, or one that does not
constexpr bool IN_TILES = VALUE_PACK == 1;
constexpr int TOKENS = IN_TILES ? kTileTokens : 1;   // of a block
constexpr int ROW_OF_TOKENS = IN_TILES ? TOKENS + TOKENS / VEC : 1;   // the pairs of a tile's vectors lie in other banks
constexpr float TWO_PI = 6.283185307179586f;
using Row = Vector<STORAGE, VEC>;

struct Angles {
  float cosine[PAIRS][ROW_OF_TOKENS], sine[PAIRS][ROW_OF_TOKENS];
};

// Turn a pair of numbers of one of the block's tokens.
__device__ __forceinline__ void turn(STORAGE& x, STORAGE& y, const Angles& angles, int pair, int token) {
  const float a = to_float(x), b = to_float(y), c = angles.cosine[pair][token], s = angles.sine[pair][token];
  x = from_float<STORAGE>(a * c - b * s);
  y = from_float<STORAGE>(b * c + a * s);
}

// The vectors of an item of a row: those that turn together, or one that stays as it is, twice.
struct Item {
  int low, high;

  __device__ __forceinline__ explicit Item(int item) {
    const bool turns = item < TURNED / 2;
    low = !turns ? item + TURNED / 2 : INTERLEAVED ? 2 * item : item;
    high = !turns ? low : INTERLEAVED ? low + 1 : item + TURNED / 2;
  }
  __device__ __forceinline__ void turn_both(Row& a, Row& b, const Angles& angles, int token) const {
    if (low == high) return;
#pragma unroll
    for (int v = 0; v < VEC; ++v)
      if (!INTERLEAVED) turn(a.value[v], b.value[v], angles, low * VEC + v, token);
#pragma unroll
    for (int v = 0; v < VEC; v += 2)
      if (INTERLEAVED) {
        turn(a.value[v], a.value[v + 1], angles, (low * VEC + v) / 2, token);
        turn(b.value[v], b.value[v + 1], angles, (high * VEC + v) / 2, token);
      }
  }
};

__device__ __forceinline__ Row load_vector(const STORAGE* row, int vector) {
  return load_global(reinterpret_cast<const Row*>(row) + vector);
}

// Write the keys and values of a tile's tokens, of which each lane has one: a warp takes two items at a time.
__device__ __forceinline__ void append_tiles(STORAGE* key_cache, STORAGE* value_cache,
                                             const STORAGE* key, const STORAGE* value,   // the lane's token's
                                             const Angles& angles, long long slot, int num_kv_heads,
                                             const KvStrides<KEY_PACK>& key_strides,
                                             const KvStrides<VALUE_PACK>& value_strides) {
  constexpr int WARPS = THREADS / kWarpSize;
  __shared__ ColumnTile<STORAGE> low_tiles[WARPS], high_tiles[WARPS];
  const int warp = threadIdx.x / kWarpSize, items = num_kv_heads * ITEMS;
  const TileSlots<VEC, BLOCK_SIZE> slots(slot);
  const int block_id = static_cast<int>(slot / BLOCK_SIZE), slot_in_block = static_cast<int>(slot % BLOCK_SIZE);
  for (int first = (blockIdx.y * WARPS + warp) * kTileVectors; first < items; first += gridDim.y * WARPS * kTileVectors) {
    const int index = first + vector_of_lane(), kv_head = index / ITEMS;
    const bool there = slot >= 0 && index < items;
    const Item item(index % ITEMS);
    Row low = {}, high = {}, low_value = {}, high_value = {};
    if (there) {
      const STORAGE *from = key + kv_head * HEAD_DIM, *from_value = value + kv_head * HEAD_DIM;
      low = load_vector(from, item.low), high = load_vector(from, item.high);
      low_value = load_vector(from_value, item.low), high_value = load_vector(from_value, item.high);
      item.turn_both(low, high, angles, token_of_lane());
      store_vector(key_cache, key_strides, block_id, kv_head, slot_in_block, item.low * VEC, low);
      if (item.high != item.low)
        store_vector(key_cache, key_strides, block_id, kv_head, slot_in_block, item.high * VEC, high);
    }
    const int low_vector = index < items ? kv_head * VECTORS + item.low : -1;
    const int high_vector = index < items && item.high != item.low ? kv_head * VECTORS + item.high : -1;
    low_tiles[warp].store<HEAD_DIM>(value_cache, value_strides, slots, low_vector, low_value);
    high_tiles[warp].store<HEAD_DIM>(value_cache, value_strides, slots, high_vector, high_value);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) rope_append_kv(
    STORAGE* __restrict__ key_cache,         // by the four strides below
    STORAGE* __restrict__ value_cache,       // likewise
    STORAGE* __restrict__ rotated,           // [num_tokens, num_heads, HEAD_DIM], or null without a query
    const STORAGE* __restrict__ query,       // [num_tokens, num_heads, HEAD_DIM], or null
    const STORAGE* __restrict__ key,         // [num_tokens, num_kv_heads, HEAD_DIM]
    const STORAGE* __restrict__ value,       // [num_tokens, num_kv_heads, HEAD_DIM]; all three may skip between tokens
    const SLOT* __restrict__ slot_mapping,   // [num_tokens], slot = block * BLOCK_SIZE + offset, -1 = skip
    const int* __restrict__ positions,       // [num_tokens]
    const float* __restrict__ turns,         // [2, PAIRS], turns a position, and what a float has no digits for
    const int num_heads, const int num_kv_heads,   // num_heads: 0 without a query
    const long long query_stride, const long long key_stride, const long long value_stride,   // from token to token
    const int key_block_stride, const long long key_head_stride, const int key_slot_stride, const int key_pack_stride,
    const int value_block_stride, const long long value_head_stride, const int value_slot_stride,
    const int value_pack_stride, const long long num_tokens) {
  __shared__ Angles angles;
  const long long first_token = blockIdx.x * static_cast<long long>(TOKENS);
  const int tokens = IN_TILES && num_tokens - first_token < TOKENS ? static_cast<int>(num_tokens - first_token) : TOKENS;
  for (int index = threadIdx.x; index < PAIRS * TOKENS; index += THREADS) {
    const int pair = index / TOKENS, token = index % TOKENS;
    if (token >= tokens) continue;
    const float position = static_cast<float>(load_global(positions + first_token + token));
    const float high = load_global(turns + pair), product = position * high;
    const float lost = fmaf(position, high, -product) + position * load_global(turns + PAIRS + pair);
    const float angle = (product - rintf(product) + lost) * TWO_PI;
    angles.cosine[pair][token] = cosf(angle);
    angles.sine[pair][token] = sinf(angle);
  }
  __syncthreads();

  const int first_item = IN_TILES ? blockIdx.y * THREADS + threadIdx.x : threadIdx.x;
  const int step = IN_TILES ? gridDim.y * THREADS : THREADS;
  for (int index = first_item; index < tokens * num_heads * ITEMS; index += step) {
    const int token = IN_TILES ? index / ITEMS / num_heads : 0, head = index / ITEMS - token * num_heads;
    const STORAGE* from = query + (first_token + token) * query_stride + head * HEAD_DIM;
    const long long row = ((first_token + token) * num_heads + head) * HEAD_DIM;
    const Item item(index % ITEMS);
    Row low = load_vector(from, item.low), high = load_vector(from, item.high);
    item.turn_both(low, high, angles, token);
    reinterpret_cast<Row*>(rotated + row)[item.low] = low;
    if (item.high != item.low) reinterpret_cast<Row*>(rotated + row)[item.high] = high;
  }

  const KvStrides<KEY_PACK> key_strides{key_block_stride, key_head_stride, key_slot_stride, key_pack_stride};
  const KvStrides<VALUE_PACK> value_strides{value_block_stride, value_head_stride, value_slot_stride, value_pack_stride};
  if (IN_TILES) {
    const long long token = first_token + token_of_lane();
    const long long slot = token_of_lane() < tokens ? load_global(slot_mapping + token) : -1;
    append_tiles(key_cache, value_cache, key + token * key_stride, value + token * value_stride, angles, slot,
                 num_kv_heads, key_strides, value_strides);
    return;
  }
  const long long slot = load_global(slot_mapping + first_token);
  if (slot < 0) return;
  const int block_id = static_cast<int>(slot / BLOCK_SIZE), slot_in_block = static_cast<int>(slot % BLOCK_SIZE);
  for (int index = threadIdx.x; index < num_kv_heads * ITEMS; index += THREADS) {
    const int kv_head = index / ITEMS;
    const STORAGE* from = key + first_token * key_stride + kv_head * HEAD_DIM;
    const STORAGE* from_value = value + first_token * value_stride + kv_head * HEAD_DIM;
    const Item item(index % ITEMS);
    Row low = load_vector(from, item.low), high = load_vector(from, item.high);
    const Row low_value = load_vector(from_value, item.low), high_value = load_vector(from_value, item.high);
    item.turn_both(low, high, angles, 0);
    store_vector(key_cache, key_strides, block_id, kv_head, slot_in_block, item.low * VEC, low);
    store_vector(value_cache, value_strides, block_id, kv_head, slot_in_block, item.low * VEC, low_value);
    if (item.high == item.low) continue;
    store_vector(key_cache, key_strides, block_id, kv_head, slot_in_block, item.high * VEC, high);
    store_vector(value_cache, value_strides, block_id, kv_head, slot_in_block, item.high * VEC, high_value);
  }
}
