// The host's twin of kernels_cu/include/mma.cuh: the lanes of a warp lay their registers open to each other, meet, and
// each computes its own part of the result in float.
#ifndef CUPAGED_MMA_CUH
#define CUPAGED_MMA_CUH

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_host.h"

struct LeftTile {
  unsigned int pair[4];
};
struct RightTile {
  unsigned int pair[2];
};
struct ResultTile {
  float value[4];
};

namespace cupaged {

// Each lane shows the others its registers, with a meeting before and one after they are read.
inline void meet(Site site) { meet_warp(WarpOperation::synchronise, 0xffffffffu, 0, 0, site); }

inline float value_of(uint16_t bits, __half) { return half_bits_to_float(bits); }
inline float value_of(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }
inline uint16_t half_of(uint64_t word, int index) { return static_cast<uint16_t>(word >> (16 * index)); }

}  // namespace cupaged

template <typename T>
void multiply_add(ResultTile& sum, const LeftTile& a, const RightTile& b, T type, CUPAGED_CALLER) {
  cupaged::WarpBoard& board = cupaged::warp_board();
  const int lane = cupaged::lane_index();
  board.word[lane][0] = a.pair[0] | uint64_t{a.pair[2]} << 32;   // its row: columns 2(l%4), + 1, + 8, + 9
  board.word[lane][1] = a.pair[1] | uint64_t{a.pair[3]} << 32;   // the row 8 below
  board.word[lane][2] = b.pair[0] | uint64_t{b.pair[1]} << 32;   // its column: rows 2(l%4), + 1, + 8, + 9
  cupaged::meet({file, line});
  for (int half = 0; half < 2; ++half)
    for (int next = 0; next < 2; ++next) {
      const int left = lane / 4 * 4, right = (lane % 4 * 2 + next) * 4;   // the four lanes that hold the row, the column
      float dot = 0.0f;
      for (int quarter = 0; quarter < 4; ++quarter)
        for (int i = 0; i < 4; ++i)
          dot += cupaged::value_of(cupaged::half_of(board.word[left + quarter][half], i), type) *
                 cupaged::value_of(cupaged::half_of(board.word[right + quarter][2], i), type);
      sum.value[2 * half + next] += dot;
    }
  cupaged::meet({file, line});
}

namespace cupaged {

// Read 16-bit element `column` of the 16 bytes at which lane `row_lane` points.
inline uint32_t element(const WarpBoard& board, int row_lane, int column) {
  uint16_t bits;
  std::memcpy(&bits, reinterpret_cast<const char*>(board.word[row_lane][0]) + 2 * column, 2);
  return bits;
}

}  // namespace cupaged

inline void load_matrices(unsigned int (&pair)[4], const void* row, CUPAGED_CALLER) {
  cupaged::WarpBoard& board = cupaged::warp_board();
  const int lane = cupaged::lane_index();
  board.word[lane][0] = reinterpret_cast<uint64_t>(row);
  cupaged::meet({file, line});
  for (int matrix = 0; matrix < 4; ++matrix) {
    const int from = 8 * matrix + lane / 4, column = lane % 4 * 2;
    pair[matrix] = cupaged::element(board, from, column) | cupaged::element(board, from, column + 1) << 16;
  }
  cupaged::meet({file, line});
}
inline void load_matrices_transposed(unsigned int (&pair)[4], const void* row, CUPAGED_CALLER) {
  cupaged::WarpBoard& board = cupaged::warp_board();
  const int lane = cupaged::lane_index();
  board.word[lane][0] = reinterpret_cast<uint64_t>(row);
  cupaged::meet({file, line});
  for (int matrix = 0; matrix < 4; ++matrix) {
    const int from = 8 * matrix + lane % 4 * 2, column = lane / 4;
    pair[matrix] = cupaged::element(board, from, column) | cupaged::element(board, from + 1, column) << 16;
  }
  cupaged::meet({file, line});
}

inline unsigned int pack_pair(float low, float high, __half) {
  return __float2half(low).bits | static_cast<unsigned>(__float2half(high).bits) << 16;
}
inline unsigned int pack_pair(float low, float high, __nv_bfloat16) {
  return __float2bfloat16(low).bits | static_cast<unsigned>(__float2bfloat16(high).bits) << 16;
}

#endif
