// The formats whose numbers have 4 bits, `plugins/moe/int4.py` and `plugins/moe/nvfp4.py`, for `StoredRows`.
//
// Both have, of each 64 x 64 numbers, 16 words in a piece for two rows, 8 apart, 8 numbers each. They are unpacked 16 numbers at a time, with
// lanes upper, far, lane_column: those of one place, next and right, in the lower halves of the words, and in the upper ones.

#pragma once

#include <cstdint>
#include <cstring>

#include "plugins/moe/stored_rows.h"

namespace diffusiongemma {

typedef int32_t Words __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

constexpr int64_t PAIRS_OF_ROWS = 32, WORDS_BYTES = 2048;

// The words of two rows' 64 numbers each; thread: warp, lane_row.
inline Words words_of(const void* of_tile, int64_t thread) {
  constexpr Words IN_A_ROW = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  Words words;  // lane_column, upper, far
  std::memcpy(&words, static_cast<const char*>(of_tile) + sizeof(words) * thread, sizeof(words));
  return __builtin_shuffle(words, IN_A_ROW);
}

inline int64_t first_row(int64_t thread) { return thread / 8 * 16 + thread % 8; }

// Writes the numbers of even and odd columns that have one place, next and right, to two rows, 8 apart.
inline void store(const Floats& even, const Floats& odd, int64_t place, float* row, int64_t stride) {
  constexpr Words LOWER = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const Floats numbers[2] = {
      __builtin_shuffle(even, odd, LOWER), __builtin_shuffle(even, odd, LOWER + 8)};  // each far, lane_column, odd
  for (int64_t upper = 0; upper < 2; ++upper) {
    const char* const both = reinterpret_cast<const char*>(&numbers[upper]);
    std::memcpy(row + upper * 8 * stride + 8 * place, both, 32);
    std::memcpy(row + upper * 8 * stride + 32 + 8 * place, both + 32, 32);
  }
}

inline float float_of(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

struct Int4 {
  using Item = int16_t;

  static constexpr int64_t HALFWORDS = WORDS_BYTES / 2 + 128;

  static int64_t of_block(int64_t depths) { return depths * HALFWORDS; }

  static void unpack(const Item* from, int64_t depths, float* to) {
    const int64_t stride = depths * BLOCK;
    for (int64_t depth = 0; depth < depths; ++depth, from += HALFWORDS) {
      for (int64_t thread = 0; thread < PAIRS_OF_ROWS; ++thread) {
        const Words words = words_of(from, thread);
        Floats scale;
        for (int64_t lane = 0; lane < 16; ++lane) {
          scale[lane] = float_of(static_cast<uint32_t>(static_cast<uint16_t>(from[WORDS_BYTES / 2 + 4 * thread + lane / 4])) << 16);
        }
        float* const row = to + first_row(thread) * stride + depth * BLOCK;
#pragma GCC unroll 4
        for (int64_t place = 0; place < 4; ++place) {
          const int at = 3 + 4 * place;
          const Words turned = place < 3 ? words >> (at + 16) : ((words >> 31) & 1) | (words << 1);
          const Floats even = (__builtin_convertvector(words >> at & 15, Floats) - 8.0f) * scale;
          const Floats odd = (__builtin_convertvector(turned & 15, Floats) - 8.0f) * scale;
          store(even, odd, place, row, stride);
        }
      }
    }
  }
};

struct Nvfp4 {
  using Item = uint8_t;

  static constexpr int64_t BYTES = WORDS_BYTES + 256;

  static int64_t of_block(int64_t depths) { return depths * BYTES + 4 * BLOCK; }

  // Four bits each, sign first, of the numbers of a place in the lower halves of the words.
  static Words numbers_at(int64_t place, const Words& words) {
    switch (place) {
      case 0: return (words >> 12 & 8) | (words >> 6 & 7);
      case 1: return (words >> 9 & 8) | (words >> 3 & 7);
      case 2: return (words >> 6 & 8) | (words & 7);
      default: return (words >> 11 & 12) | (words >> 10 & 3);
    }
  }

  static void unpack(const Item* from, int64_t depths, float* to) {
    constexpr Floats VALUES = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0f, -0.5, -1, -1.5, -2, -3, -4, -6};
    const int64_t stride = depths * BLOCK;
    float of_rows[BLOCK];
    std::memcpy(of_rows, from + depths * BYTES, sizeof(of_rows));
    for (int64_t depth = 0; depth < depths; ++depth, from += BYTES) {
      for (int64_t thread = 0; thread < PAIRS_OF_ROWS; ++thread) {
        const Words words = words_of(from, thread);
        const int64_t first = first_row(thread);
        Floats scale[2], factor;  // by next
        for (int64_t lane = 0; lane < 16; ++lane) {
          factor[lane] = of_rows[first + lane / 8 * 8] * 0x1p-7f;
          for (int64_t next = 0; next < 2; ++next) {
            const uint32_t bits = from[WORDS_BYTES + 8 * thread + 2 * (lane / 4) + next];
            scale[next][lane] = float_of(0x70000000u | bits << 20) * 0x1p-119f;
          }
        }
        float* const row = to + first * stride + depth * BLOCK;
#pragma GCC unroll 4
        for (int64_t place = 0; place < 4; ++place) {
          const Words codes[2] = {numbers_at(place, words), numbers_at(place, words >> 16)};
          Floats numbers[2];
          for (int64_t odd = 0; odd < 2; ++odd) {
            numbers[odd] = __builtin_shuffle(VALUES, codes[odd]) * scale[place / 2] * factor;
          }
          store(numbers[0], numbers[1], place, row, stride);
        }
      }
    }
  }
};

}  // namespace diffusiongemma
