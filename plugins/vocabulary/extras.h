// What a request may ask of a row beyond the plain pass, as `filter_kernel.py` and `logprobs_kernel.py` do on a GPU: samples again
// where filters do not let the token drawn of all through, and the most likely tokens.
//
// Tokens are compared by their processed logits. The k largest are among those that reach the k-th largest of the blocks' maxima,
// which are hardly more.

#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "plugins/cpu/vector.h"
#include "plugins/vocabulary/draw.h"

namespace diffusiongemma {

// A row, filled up to whole blocks with tokens that have no chance.
struct KeptRow {
  std::vector<float> processed, weights;
  int64_t vocab_size = 0;

  void resize(int64_t size) {
    vocab_size = size;
    const int64_t padded = (size + BLOCK - 1) / BLOCK * BLOCK;
    processed.resize(padded);
    weights.resize(padded);
  }

  // Whether token a comes before token b: the likelier first, equals in the order of the vocabulary.
  bool before(int64_t a, int64_t b) const { return processed[a] > processed[b] || (processed[a] == processed[b] && a < b); }

  int64_t num_blocks() const { return static_cast<int64_t>(processed.size()) / BLOCK; }
};

struct Filters {
  int64_t top_k;  // 0 is off
  float top_p, min_p;  // 1 and 0 are off

  bool any() const { return top_k > 0 || top_p < 1 || min_p > 0; }
};

inline float largest_of_block(const float* values) {
  Vec most = load(values);
  for (int64_t i = LANES; i < BLOCK; i += LANES) {
    const Vec others = load(values + i);
    most = others > most ? others : most;
  }
  return largest(most);
}

// The k most likely tokens, k from 1 to vocab_size, in any order but for the last: no other is as unlikely, or as late among
// equals.
inline std::vector<int64_t> most_likely(const KeptRow& row, int64_t k) {
  std::vector<float> maxima(row.num_blocks());
  for (int64_t block = 0; block < row.num_blocks(); ++block) maxima[block] = largest_of_block(&row.processed[block * BLOCK]);
  float limit = -std::numeric_limits<float>::infinity();
  if (k <= row.num_blocks()) {
    std::vector<float> falling = maxima;
    std::nth_element(falling.begin(), falling.begin() + k - 1, falling.end(), std::greater<float>());
    limit = falling[k - 1];
  }
  std::vector<int64_t> tokens;
  for (int64_t block = 0; block < row.num_blocks(); ++block) {
    if (maxima[block] < limit) continue;
    const int64_t end = std::min((block + 1) * BLOCK, row.vocab_size);
    for (int64_t token = block * BLOCK; token < end; ++token) {
      if (row.processed[token] >= limit) tokens.push_back(token);
    }
  }
  const auto before = [&](int64_t a, int64_t b) { return row.before(a, b); };
  std::nth_element(tokens.begin(), tokens.begin() + k - 1, tokens.end(), before);
  tokens.resize(k);
  return tokens;
}

// The weights of the tokens with processed logits from `limit` on.
inline float weight_from(const KeptRow& row, float limit) {
  Vec total{};
  for (size_t i = 0; i < row.weights.size(); i += LANES) {
    total += load(&row.processed[i]) >= limit ? load(&row.weights[i]) : Vec{};
  }
  return sum(total);
}

// A token for the row where `sampled` was drawn of all tokens; see `filter_kernel.py`. Every draw raises the limit.
inline int64_t filtered(const KeptRow& row, const Filters& filters, const Philox& noise, float largest, int64_t sampled) {
  const float none = -std::numeric_limits<float>::infinity();
  float least = none;
  if (filters.top_k > 0 && filters.top_k < row.vocab_size) least = row.processed[most_likely(row, filters.top_k).back()];
  float limit = filters.min_p > 0 ? std::max(least, largest + std::log(filters.min_p)) : least;
  const float enough = filters.top_p < 1 ? weight_from(row, least) * filters.top_p : 0;
  bool again = row.processed[sampled] < limit;
  while (true) {
    if (again) {
      Draw draw(noise, largest, limit);
      for (int64_t first = 0; first < row.vocab_size; first += BLOCK) {
        if (largest_of_block(&row.processed[first]) >= limit) draw.take(&row.processed[first], &row.weights[first], first);
      }
      sampled = draw.token();
    }
    const float drawn = row.processed[sampled];
    if (!(filters.top_p < 1 && drawn >= limit && drawn < largest)) return sampled;
    limit = std::nextafter(drawn, std::numeric_limits<float>::infinity());
    again = weight_from(row, limit) >= enough;
    if (!again) return sampled;
  }
}

}  // namespace diffusiongemma
