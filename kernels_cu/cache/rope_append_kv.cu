// Rotate new keys by their positions (RoPE, Su et al., arXiv 2104.09864) and write them to their slots with their values;
// rotate queries too, if there are any. Saves writing rotated keys and reading them again.
//
// A block has a token: its threads find the token's sines and cosines once, for all heads. An angle is a number of turns,
// of which only the fraction counts: position times frequency is taken exactly to twice a float's digits, so that
// far positions lose nothing.
//
// Measured: not measured yet.
//
// Grid:  (num_tokens).    Block: (THREADS).
//
// Defines
//   STORAGE      __half, __nv_bfloat16 or float
//   SLOT         int or long long, the type of slot_mapping
//   HEAD_DIM     a multiple of 8
//   ROTARY_DIM   dimensions that turn, the first; a multiple of twice a vector's, 2 * VEC
//   INTERLEAVED  1: neighbours turn together; 0: dimension i and i + ROTARY_DIM / 2
//   BLOCK_SIZE, KEY_PACK, VALUE_PACK  as in append_kv
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
constexpr float TWO_PI = 6.283185307179586f;
using Row = Vector<STORAGE, VEC>;

struct Angles {
  float cosine[PAIRS], sine[PAIRS];
};

// Turn a pair of numbers.
__device__ __forceinline__ void turn(STORAGE& x, STORAGE& y, const Angles& angles, int pair) {
  const float a = to_float(x), b = to_float(y), c = angles.cosine[pair], s = angles.sine[pair];
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
  __device__ __forceinline__ void turn_both(Row& a, Row& b, const Angles& angles) const {
    if (low == high) return;
#pragma unroll
    for (int v = 0; v < VEC; ++v)
      if (!INTERLEAVED) turn(a.value[v], b.value[v], angles, low * VEC + v);
#pragma unroll
    for (int v = 0; v < VEC; v += 2)
      if (INTERLEAVED) {
        turn(a.value[v], a.value[v + 1], angles, (low * VEC + v) / 2);
        turn(b.value[v], b.value[v + 1], angles, (high * VEC + v) / 2);
      }
  }
};

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
    const int value_pack_stride) {
  __shared__ Angles angles;
  const long long token = blockIdx.x;
  const float position = static_cast<float>(load_global(positions + token));
  for (int pair = threadIdx.x; pair < PAIRS; pair += THREADS) {
    const float high = load_global(turns + pair), product = position * high;
    const float lost = fmaf(position, high, -product) + position * load_global(turns + PAIRS + pair);
    const float angle = (product - rintf(product) + lost) * TWO_PI;
    angles.cosine[pair] = cosf(angle);
    angles.sine[pair] = sinf(angle);
  }
  __syncthreads();

  const auto load = [](const STORAGE* row, int vector) { return load_global(reinterpret_cast<const Row*>(row) + vector); };
  for (int index = threadIdx.x; index < num_heads * ITEMS; index += THREADS) {
    const int head = index / ITEMS;
    const STORAGE* from = query + token * query_stride + head * HEAD_DIM;
    const long long row = (token * num_heads + head) * HEAD_DIM;
    const Item item(index % ITEMS);
    Row low = load(from, item.low), high = load(from, item.high);
    item.turn_both(low, high, angles);
    reinterpret_cast<Row*>(rotated + row)[item.low] = low;
    if (item.high != item.low) reinterpret_cast<Row*>(rotated + row)[item.high] = high;
  }

  const long long slot = load_global(slot_mapping + token);
  if (slot < 0) return;
  const int block_id = static_cast<int>(slot / BLOCK_SIZE), slot_in_block = static_cast<int>(slot % BLOCK_SIZE);
  const KvStrides<KEY_PACK> key_strides{key_block_stride, key_head_stride, key_slot_stride, key_pack_stride};
  const KvStrides<VALUE_PACK> value_strides{value_block_stride, value_head_stride, value_slot_stride, value_pack_stride};
  for (int index = threadIdx.x; index < num_kv_heads * ITEMS; index += THREADS) {
    const int kv_head = index / ITEMS;
    const STORAGE* from = key + token * key_stride + kv_head * HEAD_DIM;
    const STORAGE* from_value = value + token * value_stride + kv_head * HEAD_DIM;
    const Item item(index % ITEMS);
    Row low = load(from, item.low), high = load(from, item.high);
    const Row low_value = load(from_value, item.low), high_value = load(from_value, item.high);
    item.turn_both(low, high, angles);
    store_vector(key_cache, key_strides, block_id, kv_head, slot_in_block, item.low * VEC, low);
    store_vector(value_cache, value_strides, block_id, kv_head, slot_in_block, item.low * VEC, low_value);
    if (item.high == item.low) continue;
    store_vector(key_cache, key_strides, block_id, kv_head, slot_in_block, item.high * VEC, high);
    store_vector(value_cache, value_strides, block_id, kv_head, slot_in_block, item.high * VEC, high_value);
  }
}
