// A token drawn from softmax(processed logits): the largest of processed + Gumbel noise.
//
// The Gumbel noise of a word is -log(e) with e = -log(1 - v) >= v. A token wins only if processed - log(v) is above the best so
// far; with the weights, exp(processed - largest), that is a comparison without a logarithm, and few tokens pass it. Only those
// get the exact noise.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "plugins/cpu/philox.h"

namespace diffusiongemma {

constexpr int64_t BLOCK = 256;  // logits

inline float gumbel(uint32_t word) {
  const float uniform = std::min((static_cast<float>(word) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
  return -std::log(-std::log1p(-uniform));
}

class Draw {
 public:
  // Of the tokens with processed logits from `least` on, the largest among them.
  Draw(const Philox& noise, float largest, float least)
      : noise_(noise),
        largest_(largest),
        least_(least),
        slack_(0x1p-10f + 0x1p-21f * std::abs(largest)),
        limit_(limit_of(largest + LEAST_GUMBEL)) {}

  // BLOCK tokens from `first` on; where there are fewer, the others have weights of 0.
  void take(const float* processed, const float* weights, int64_t first) {
    alignas(64) uint32_t words[BLOCK];
    noise_.words(first / 4, words);
    alignas(64) int32_t wins[BLOCK];
    int32_t any = 0;
    const float limit = limit_;
#pragma omp simd reduction(| : any)
    for (int64_t i = 0; i < BLOCK; ++i) {
      wins[i] = static_cast<float>(words[i]) * 0x1p-32f <= weights[i] * limit;
      any |= wins[i];
    }
    if (!any) return;
    for (int64_t i = 0; i < BLOCK; ++i) {
      if (!wins[i] || processed[i] < least_) continue;
      const float value = processed[i] + gumbel(words[i]);
      if (value > best_value_) {
        best_value_ = value;
        best_token_ = first + i;
        limit_ = limit_of(value);
      }
    }
  }

  int64_t token() const { return best_token_; }

 private:
  static constexpr float LEAST_GUMBEL = -2.82f;  // a little less than any noise

  float limit_of(float value) const { return std::exp(largest_ - value + slack_); }

  const Philox noise_;
  const float largest_, least_, slack_;
  float limit_;
  float best_value_ = -std::numeric_limits<float>::infinity();
  int64_t best_token_ = 0;
};

}  // namespace diffusiongemma
