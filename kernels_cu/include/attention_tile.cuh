// A warp's attention of a tile of query rows over chunks of 16 or 32 tokens, on tensor cores: logits, a running softmax, and
// the weighted sum of values stay in registers (FlashAttention-2, Dao, arXiv 2307.08691, for one warp).
//
// Lane l has the rows l/4, l/4 + 8, l/4 + 16, ... of the tile, called halves here since two of them fill an operand.
// Weights are rounded to the storage type before they meet the values; sums are float32.
#pragma once

#include "global_memory.cuh"
#include "mma.cuh"
#include "reduce.cuh"
#include "softmax.cuh"
#include "swizzled_rows.cuh"
#include "types.cuh"

#ifndef CHUNK_TOKENS
#define CHUNK_TOKENS 16
#endif
constexpr int CHUNK = CHUNK_TOKENS;   // tokens that a warp takes at a time, 16 or 32

template <typename T, int HeadDim, int Rows>
struct AttentionTile {
  static constexpr int HALVES = Rows / 8;
  static constexpr int OPERANDS = (Rows + 15) / 16;   // the tensor cores take 16 rows: of 8, the rest is zeros
  static constexpr int STEPS = HeadDim / 16;          // tiles of 16 dimensions
  static constexpr int FLOAT_PITCH = HeadDim + (Rows == 8 ? 8 : 0);   // of results: where there is room, no bank conflicts

  LeftTile query[OPERANDS][STEPS];
  ResultTile out[OPERANDS][2 * STEPS];
  SoftmaxState softmax[HALVES];

  // Where a chunk's row has its 16-byte vector `index` in shared memory, in elements.
  static __device__ __forceinline__ int place_of(int row, int index) {
    return SwizzledRows<T, HeadDim>::place_of(row, index);
  }
  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarpSize; }
  static __device__ __forceinline__ int row_of(int half) { return lane() / 4 + 8 * half; }

  // Read the query: `row_offset(row)` says where a row of the tile begins; rows past `rows` are zeros.
  template <typename RowOffset>
  __device__ __forceinline__ void start(const T* query_rows, int rows, RowOffset row_offset) {
#pragma unroll
    for (int half = 0; half < 2 * OPERANDS; ++half) {
      const int row = row_of(half);
      const bool there = half < HALVES && row < rows;
      const T* first = query_rows + (there ? row_offset(row) : 0) + lane() % 4 * 2;
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          query[half / 2][step].pair[half % 2 + 2 * i] =
              load_global_if(there, reinterpret_cast<const unsigned int*>(first + step * 16 + i * 8));
    }
#pragma unroll
    for (int half = 0; half < HALVES; ++half) softmax[half] = SoftmaxState();
#pragma unroll
    for (int operand = 0; operand < OPERANDS; ++operand)
#pragma unroll
      for (ResultTile& tile : out[operand]) tile = {};
  }

  // Take in a chunk. `logit(product, half, token)` makes a logit, in units of log 2, of a query row's product with the
  // key of one of the chunk's tokens; -infinity leaves the token out.
  template <typename Logit>
  __device__ __forceinline__ void add(const T* key, const T* value, Logit logit) {   // [CHUNK][HeadDim], by place_of
    constexpr int EIGHTS = CHUNK / 8, SIXTEENTHS = CHUNK / 16;   // tiles of 8 and of 16 tokens
    ResultTile product[OPERANDS][EIGHTS] = {};   // [16 rows, 8 tokens] each
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int i = 0; i < SIXTEENTHS; ++i) {
        unsigned int pair[4];   // tokens 0-7 and 8-15, each as two tiles of 8 dimensions
        load_matrices(pair, key + place_of(i * 16 + lane() / 16 * 8 + lane() % 8, step * 2 + lane() / 8 % 2));
#pragma unroll
        for (int operand = 0; operand < OPERANDS; ++operand) {
          multiply_add(product[operand][2 * i], query[operand][step], RightTile{pair[0], pair[1]}, T());
          multiply_add(product[operand][2 * i + 1], query[operand][step], RightTile{pair[2], pair[3]}, T());
        }
      }
    LeftTile weight[OPERANDS][SIXTEENTHS] = {};   // [16 rows, 16 tokens] each
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      float w[EIGHTS][2];   // of each 8 tokens, 2(l%4) and its neighbour
      float largest = minus_infinity();
#pragma unroll
      for (int i = 0; i < EIGHTS; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          w[i][j] = logit(product[half / 2][i].value[half % 2 * 2 + j], half, i * 8 + lane() % 4 * 2 + j);
          largest = fmaxf(largest, w[i][j]);
        }
      const float factor = softmax[half].raise(warp_reduce<Max, 1, 4>(largest));
#pragma unroll
      for (ResultTile& tile : out[half / 2]) tile.value[half % 2 * 2] *= factor, tile.value[half % 2 * 2 + 1] *= factor;
#pragma unroll
      for (int i = 0; i < EIGHTS; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          w[i][j] = softmax_weight(w[i][j], softmax[half].max);
          softmax[half].sum += w[i][j];   // this lane's tokens only, until `finish`
        }
        weight[half / 2][i / 2].pair[half % 2 + i % 2 * 2] = pack_pair(w[i][0], w[i][1], T());
      }
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int i = 0; i < SIXTEENTHS; ++i) {
        unsigned int pair[4];   // dimensions 0-7 and 8-15 of the step, each as two tiles of 8 tokens
        load_matrices_transposed(pair, value + place_of(i * 16 + lane() / 8 % 2 * 8 + lane() % 8, step * 2 + lane() / 16));
#pragma unroll
        for (int operand = 0; operand < OPERANDS; ++operand) {
          multiply_add(out[operand][2 * step], weight[operand][i], RightTile{pair[0], pair[1]}, T());
          multiply_add(out[operand][2 * step + 1], weight[operand][i], RightTile{pair[2], pair[3]}, T());
        }
      }
  }

  // Sum up over lanes; no chunk may be added after this.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < HALVES; ++half) softmax[half].sum = warp_reduce<Sum, 1, 4>(softmax[half].sum);
  }

  // Lay 16 rows of the result open to other warps.
  __device__ __forceinline__ void store(float* rows, int operand) const {   // [16][FLOAT_PITCH], shared memory
#pragma unroll
    for (int half = 0; half < 2 && 2 * operand + half < HALVES; ++half)
#pragma unroll
      for (int tile = 0; tile < 2 * STEPS; ++tile) {
        const float* value = out[operand][tile].value + 2 * half;
        *reinterpret_cast<Vector<float, 2>*>(rows + row_of(half) * FLOAT_PITCH + tile * 8 + lane() % 4 * 2) = {value[0], value[1]};
      }
  }
};
