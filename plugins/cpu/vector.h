// Vectors of float32 and the two small matrix products that the CPU operators are made of.
//
// Every result is the same sequence of additions whatever else is computed with it: one row's numbers do not depend on how many
// rows there are, which rows are its neighbours, or how many threads work. So a request's tokens do not depend on its batch.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace diffusiongemma {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vec values) { *reinterpret_cast<Unaligned*>(to) = values; }
inline Vec splat(float value) { return value - Vec{}; }

inline Vec load_first(const float* from, int64_t count) {  // zeros behind `count`
  float values[LANES] = {};
  std::memcpy(values, from, count * sizeof(float));
  return load(values);
}

// e^x to two roundings; 0 below -87, where its results would be denormal, and for -infinity; e^88 above 88.
inline Vec exp(Vec x) {
  const Vec clamped = x < -87.0f ? splat(-87.0f) : (x > 88.0f ? splat(88.0f) : x);
  // x = n ln 2 + r with |r| <= ln 2 / 2: adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
  const Vec shifted = clamped * 1.44269504f + 12582912.0f;
  const Vec n = shifted - 12582912.0f;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec series = r * (1.0f / 5040) + 1.0f / 720;  // of e^r; the next term is below 6e-9
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const Ints power = ((Ints)shifted - 0x4B400000 + 127) << 23;
  return x < -87.0f ? Vec{} : series * (Vec)power;
}

// To two roundings. Small arguments by an odd polynomial, fitted at the Chebyshev nodes of [0, 0.625] to 1.5 * 2^-24.
inline Vec tanh(Vec x) {
  const Vec square = x * x;
  Vec series = square * -0.006104945670813322f + 0.021003639325499535f;
  series = series * square - 0.05385249853134155f;
  series = series * square + 0.13332782685756683f;
  series = series * square - 0.333333283662796f;
  const Vec size = x < 0.0f ? -x : x;
  const Vec large = 1.0f - 2.0f / (exp(2.0f * size) + 1.0f);
  return size < 0.625f ? x + x * (square * series) : (x < 0.0f ? -large : large);
}

template <int STRIDE>
inline Vec swapped(Vec values) {  // lane i gets lane i ^ STRIDE
  Ints from;
  for (int lane = 0; lane < LANES; ++lane) from[lane] = lane ^ STRIDE;
  return __builtin_shuffle(values, from);
}

template <int STRIDE = LANES / 2>
inline float sum(Vec values) {
  values += swapped<STRIDE>(values);
  if constexpr (STRIDE == 1) {
    return values[0];
  } else {
    return sum<STRIDE / 2>(values);
  }
}

template <int STRIDE = LANES / 2>
inline float largest(Vec values) {
  const Vec others = swapped<STRIDE>(values);
  values = values > others ? values : others;
  if constexpr (STRIDE == 1) {
    return values[0];
  } else {
    return largest<STRIDE / 2>(values);
  }
}

// Rows and columns of a tile of dot products: as many as a vector has lanes, so that their sums fill one.
constexpr int TILE_ROWS = 4;
constexpr int TILE_COLUMNS = LANES / TILE_ROWS;

namespace detail {

template <int STRIDE>
inline Vec fold(Vec a, Vec b) {  // lanes with bit STRIDE clear: sums of a, the others: sums of b
  Ints own, other;
  for (int lane = 0; lane < LANES; ++lane) {
    const int from = lane & STRIDE ? LANES : 0;
    own[lane] = from + lane;
    other[lane] = from + (lane ^ STRIDE);
  }
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
}

template <int STRIDE>
inline Vec fold_all(Vec* sums) {
#pragma GCC unroll 8
  for (int i = 0; i < STRIDE; ++i) sums[i] = fold<STRIDE>(sums[i], sums[i + STRIDE]);
  if constexpr (STRIDE == 1) {
    return sums[0];
  } else {
    return fold_all<STRIDE / 2>(sums);
  }
}

}  // namespace detail

// Keeps GCC from loading a value anew for every product that it is in: loads would then bound the tile, not products.
inline Vec in_register(Vec value) {
#ifdef __x86_64__
  asm("" : "+v"(value));
#endif
  return value;
}

// Lane i of the result: the dot product of rows[i / TILE_COLUMNS] and columns[i % TILE_COLUMNS], both of `length`.
template <int ROWS = TILE_ROWS>
inline Vec dot_tile(const float* const* rows, const float* const* columns, int64_t length) {
  Vec sums[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= length; i += LANES) {
    Vec column[TILE_COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < TILE_COLUMNS; ++c) column[c] = load(columns[c] + i);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Vec row = in_register(load(rows[r] + i));
#pragma GCC unroll 4
      for (int c = 0; c < TILE_COLUMNS; ++c) sums[r * TILE_COLUMNS + c] += row * column[c];
    }
  }
  if (i < length) {
    Vec column[TILE_COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < TILE_COLUMNS; ++c) column[c] = load_first(columns[c] + i, length - i);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Vec row = load_first(rows[r] + i, length - i);
#pragma GCC unroll 4
      for (int c = 0; c < TILE_COLUMNS; ++c) sums[r * TILE_COLUMNS + c] += row * column[c];
    }
  }
  return detail::fold_all<LANES / 2>(sums);
}

// As dot_tile, of the first num_rows rows.
inline Vec dot_tile(const float* const* rows, int64_t num_rows, const float* const* columns, int64_t length) {
  switch (num_rows) {
    case 1: return dot_tile<1>(rows, columns, length);
    case 2: return dot_tile<2>(rows, columns, length);
    case 3: return dot_tile<3>(rows, columns, length);
    default: return dot_tile<TILE_ROWS>(rows, columns, length);
  }
}

// Writes a tile's values [num_rows, TILE_COLUMNS] to `to`, whose rows are `stride` apart; columns behind num_columns are left out.
inline void store_tile(Vec tile, float* const* to, int64_t num_rows, int64_t num_columns) {
  float values[LANES];
  store(values, tile);
  for (int64_t r = 0; r < num_rows; ++r) {
    std::memcpy(to[r], values + r * TILE_COLUMNS, std::min<int64_t>(num_columns, TILE_COLUMNS) * sizeof(float));
  }
}

}  // namespace diffusiongemma
