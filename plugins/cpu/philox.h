// Counter-based noise: Philox 4x32-10 with the project's counter layout, which `noise.py` of the backend documents.

#pragma once

#include <cstdint>

namespace diffusiongemma {

class Philox {
 public:
  Philox() = default;

  static Philox renoise(int64_t seed, int64_t canvas_index, int64_t step, int64_t position) {
    return {seed, canvas_index | 1ll << 30, step, position};
  }

  static Philox gumbel(int64_t seed, int64_t canvas_index, int64_t step, int64_t position) {
    return {seed, canvas_index | 2ll << 30, step, position};
  }

  // The word of token lane 0.
  uint32_t first_word() const {
    uint32_t words[4];
    group(0, words);
    return words[0];
  }

  // The words of 256 token lanes from 4 * first_group on.
  void words(int64_t first_group, uint32_t* to) const {
#pragma omp simd
    for (int i = 0; i < 64; ++i) {
      uint32_t four[4];
      group(static_cast<uint32_t>(first_group) + i, four);
      to[4 * i] = four[0];
      to[4 * i + 1] = four[1];
      to[4 * i + 2] = four[2];
      to[4 * i + 3] = four[3];
    }
  }

 private:
  Philox(int64_t seed, int64_t stream, int64_t step, int64_t position)
      : key_0_(static_cast<uint32_t>(seed)),
        key_1_(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)),
        position_(static_cast<uint32_t>(position)),
        step_(static_cast<uint32_t>(step)),
        stream_(static_cast<uint32_t>(stream)) {}

  // The numbers of a round are those of `noise.philox_4x32_10`.
  [[gnu::always_inline]] void group(uint32_t lane_group, uint32_t* to) const {
    uint32_t word_0 = lane_group, word_1 = position_, word_2 = step_, word_3 = stream_, key_0 = key_0_, key_1 = key_1_;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t product_0 = static_cast<uint64_t>(word_0) * 0xD2511F53u;  // 1.
      const uint64_t product_1 = static_cast<uint64_t>(word_2) * 0xCD9E8D57u;
      word_0 = static_cast<uint32_t>(product_1 >> 32) ^ word_1 ^ key_0;  // 2.
      word_1 = static_cast<uint32_t>(product_1);
      word_2 = static_cast<uint32_t>(product_0 >> 32) ^ word_3 ^ key_1;  // 3.
      word_3 = static_cast<uint32_t>(product_0);
      key_0 += 0x9E3779B9u;  // 4.
      key_1 += 0xBB67AE85u;
    }
    to[0] = word_0;
    to[1] = word_1;
    to[2] = word_2;
    to[3] = word_3;
  }

  uint32_t key_0_ = 0, key_1_ = 0, position_ = 0, step_ = 0, stream_ = 0;
};

}  // namespace diffusiongemma
