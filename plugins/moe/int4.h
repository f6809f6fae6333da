// Weights in 4 bits, turned into float32 a block of 64 rows at a time; the format is that of `plugins/moe/int4.py`.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace diffusiongemma::int4 {

constexpr int64_t BLOCK = 64, WORDS = 512, HALFWORDS = 2 * WORDS + 128;

inline int64_t num_blocks(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }

typedef int32_t Words __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

// What 64 x 64 numbers are in float32, to rows of `stride` floats.
inline void unpack(const int16_t* from, float* to, int64_t stride) {
  constexpr Words IN_A_ROW = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};  // upper, far, lane_column
  constexpr Words LOWER = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  for (int64_t thread = 0; thread < 32; ++thread) {  // warp, lane_row
    Words words;  // lane_column, upper, far
    std::memcpy(&words, from + 32 * thread, sizeof(words));
    words = __builtin_shuffle(words, IN_A_ROW);
    Floats scale;
    for (int64_t lane = 0; lane < 16; ++lane) {
      const int32_t bits = static_cast<int32_t>(from[2 * WORDS + 4 * thread + lane / 4]) << 16;
      std::memcpy(reinterpret_cast<char*>(&scale) + 4 * lane, &bits, sizeof(bits));
    }
    float* const row = to + (thread / 8 * 16 + thread % 8) * stride;
#pragma GCC unroll 4
    for (int64_t piece = 0; piece < 4; ++piece) {  // next, right
      const int at = 3 + 4 * piece;
      const Words turned = piece < 3 ? words >> (at + 16) : ((words >> 31) & 1) | (words << 1);
      const Floats even = (__builtin_convertvector(words >> at & 15, Floats) - 8.0f) * scale;
      const Floats odd = (__builtin_convertvector(turned & 15, Floats) - 8.0f) * scale;
      const Floats numbers[2] = {
          __builtin_shuffle(even, odd, LOWER), __builtin_shuffle(even, odd, LOWER + 8)};  // each far, lane_column, odd
      for (int64_t upper = 0; upper < 2; ++upper) {
        const char* const both = reinterpret_cast<const char*>(&numbers[upper]);
        std::memcpy(row + upper * 8 * stride + 8 * piece, both, 32);
        std::memcpy(row + upper * 8 * stride + 32 + 8 * piece, both + 32, 32);
      }
    }
  }
}

// The rows of one expert's weight, in float32.
class Rows {
 public:
  // first: the expert's first block among those of all, `from`.
  Rows(int64_t first, int64_t columns, const int16_t* from)
      : depths_((columns + BLOCK - 1) / BLOCK), from_(from + first * depths_ * HALFWORDS), unpacked_(BLOCK * BLOCK * depths_) {}

  // A row's numbers, which stay until a row of another block is asked for.
  const float* row(int64_t index) {
    const int64_t block = index / BLOCK, stride = depths_ * BLOCK;
    if (block != block_) {
      block_ = block;
      for (int64_t depth = 0; depth < depths_; ++depth) {
        unpack(from_ + (block * depths_ + depth) * HALFWORDS, unpacked_.data() + depth * BLOCK, stride);
      }
    }
    return unpacked_.data() + index % BLOCK * stride;
  }

 private:
  const int64_t depths_;
  const int16_t* const from_;
  std::vector<float> unpacked_;
  int64_t block_ = -1;
};

}  // namespace diffusiongemma::int4
