// Weights that are stored in fewer bits, turned into float32 a block of 64 rows at a time (`plugins/moe/arranging.py`).
//
// A format is a class with Item, what memory is made of; `of_block(depths)`, items of a block of `depths` times 64 columns; and
// `unpack(from, depths, to)`, which writes what a block's numbers are, rows of 64 * depths floats.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace diffusiongemma {

constexpr int64_t BLOCK = 64;

inline int64_t num_blocks(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }

// The rows of one expert's weight, in float32.
template <class Format>
class StoredRows {
 public:
  using Item = typename Format::Item;

  // first: the expert's first block among those of all, `from`.
  StoredRows(int64_t first, int64_t columns, const Item* from)
      : depths_((columns + BLOCK - 1) / BLOCK),
        from_(from + first * Format::of_block(depths_)),
        unpacked_(BLOCK * BLOCK * depths_) {}

  // A row's numbers, which stay until a row of another block is asked for.
  const float* row(int64_t index) {
    const int64_t block = index / BLOCK;
    if (block != block_) {
      block_ = block;
      Format::unpack(from_ + block * Format::of_block(depths_), depths_, unpacked_.data());
    }
    return unpacked_.data() + index % BLOCK * (depths_ * BLOCK);
  }

 private:
  const int64_t depths_;
  const Item* const from_;
  std::vector<float> unpacked_;
  int64_t block_ = -1;
};

}  // namespace diffusiongemma
