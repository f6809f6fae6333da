// `diffusiongemma::paged_attention_cpu`: the attention operator for float32 tensors on the CPU, reading keys and values where
// they lie in their pages. See the package's docstring for arguments.
//
// A unit of work is some query rows of one sequence that share a key/value head. It goes over the keys in blocks that begin at
// multiples of BLOCK_KEYS tokens of the sequence:
// 1. Scores of the block; keys that a row does not see get -infinity.
// 2. Online softmax: the row's largest score so far, weights relative to it, their sum.
// 3. Weighted sum of the block's values.
//
// To a row, a key that it does not see adds exactly 0. So its result is the same bits however its text was cut into passes.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <memory>
#include <vector>

#include "plugins/cpu/vector.h"

namespace diffusiongemma {
namespace {

using torch::stable::Tensor;

constexpr int64_t BLOCK_KEYS = 64;
constexpr int64_t UNIT_ROWS = 32;
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// The operator's arguments, and sizes by the names of the package's legend.
struct Call {
  const float *query, *new_kv, *kv_pages;
  const int32_t *page_table, *prefix_lengths, *sequence_starts, *image_block_ids;
  int64_t heads, kv_heads, head_dim, page_size, columns, window;
  bool causal;
  float* output;
};

struct Unit {
  int64_t sequence, kv_head, first_token, end_token;  // tokens of the packed batch
};

// Half-open ranges of positions.
struct Range {
  int64_t first, end;
};

class UnitRun {
 public:
  UnitRun(const Call& call, const Unit& unit)
      : call_(call),
        unit_(unit),
        group_(call.heads / call.kv_heads),
        num_rows_((unit.end_token - unit.first_token) * group_),
        padded_rows_((num_rows_ + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS),
        padded_dim_((call.head_dim + LANES - 1) / LANES * LANES),
        start_(call.sequence_starts[unit.sequence]),
        prefix_(call.prefix_lengths[unit.sequence]),
        weights_(padded_rows_ * BLOCK_KEYS, 0.0f),
        sums_(padded_rows_ * padded_dim_, 0.0f),
        zeros_(padded_dim_, 0.0f),
        padded_values_(padded_dim_ == call.head_dim ? 0 : BLOCK_KEYS * padded_dim_, 0.0f),
        totals_(num_rows_, Vec{}),
        largest_(num_rows_, NEVER),
        rows_(num_rows_),
        seen_(num_rows_) {}

  void run() {
    Range all{std::numeric_limits<int64_t>::max(), 0};
    for (int64_t row = 0; row < num_rows_; ++row) {
      const int64_t token = unit_.first_token + row / group_;
      rows_[row] = call_.query + (token * call_.heads + unit_.kv_head * group_ + row % group_) * call_.head_dim;
      seen_[row] = seen(token);
      all = {std::min(all.first, seen_[row].first), std::max(all.end, seen_[row].end)};
    }
    for (int64_t block = all.first / BLOCK_KEYS * BLOCK_KEYS; block < all.end; block += BLOCK_KEYS) {
      const Range here{std::max<int64_t>(0, all.first - block), std::min(BLOCK_KEYS, all.end - block)};
      find_keys(block, here);
      scores();               // 1.
      softmax(block);         // 2.
      weigh_values(here);     // 3.
    }
    for (int64_t row = 0; row < num_rows_; ++row) {
      const float total = sum(totals_[row]);
      const float* from = sums_.data() + row * padded_dim_;
      float* to = call_.output + (rows_[row] - call_.query);
      for (int64_t i = 0; i < call_.head_dim; ++i) to[i] = from[i] / total;
    }
  }

 private:
  // From the first to the last key that a token sees; between them an image may leave out some, see `is_visible`.
  Range seen(int64_t token) const {
    const int64_t end = call_.sequence_starts[unit_.sequence + 1], position = prefix_ + token - start_;
    const int64_t before = call_.window ? call_.window - 1 : std::numeric_limits<int64_t>::max() / 2;
    if (!call_.causal) return {std::max<int64_t>(0, prefix_ - before), prefix_ + end - start_};
    Range range{std::max<int64_t>(0, position - before), position + 1};
    if (call_.image_block_ids[token] >= 0) {
      for (int64_t other = start_; other < end; ++other) {
        if (call_.image_block_ids[other] != call_.image_block_ids[token]) continue;
        range = {std::min(range.first, prefix_ + other - start_), std::max(range.end, prefix_ + other - start_ + 1)};
      }
    }
    return range;
  }

  bool is_visible(int64_t token, int64_t key) const {  // of a causal pass
    const int64_t position = prefix_ + token - start_, image = call_.image_block_ids[token];
    if (key >= prefix_ && image >= 0 && call_.image_block_ids[start_ + key - prefix_] == image) return true;
    return key <= position && (!call_.window || key > position - call_.window);
  }

  void find_keys(int64_t block, Range here) {
    const int64_t token_size = 2 * call_.kv_heads * call_.head_dim, value = call_.kv_heads * call_.head_dim;
    for (int64_t i = 0; i < BLOCK_KEYS; ++i) {
      keys_[i] = values_[i] = zeros_.data();
      if (i < here.first || i >= here.end) continue;
      const int64_t key = block + i;
      const float* at = call_.new_kv + (start_ + key - prefix_) * token_size;
      if (key < prefix_) {
        const int64_t page = call_.page_table[unit_.sequence * call_.columns + key / call_.page_size];
        at = call_.kv_pages + (page * call_.page_size + key % call_.page_size) * token_size;
      }
      keys_[i] = at + unit_.kv_head * call_.head_dim;
      values_[i] = keys_[i] + value;
      if (!padded_values_.empty()) {
        float* copy = padded_values_.data() + i * padded_dim_;
        std::copy(values_[i], values_[i] + call_.head_dim, copy);
        values_[i] = copy;
      }
    }
  }

  void scores() {
    float* to[TILE_ROWS];
    for (int64_t row = 0; row < num_rows_; row += TILE_ROWS) {
      const int64_t count = std::min<int64_t>(TILE_ROWS, num_rows_ - row);
      for (int64_t key = 0; key < BLOCK_KEYS; key += TILE_COLUMNS) {
        for (int64_t r = 0; r < count; ++r) to[r] = weights_.data() + (row + r) * BLOCK_KEYS + key;
        store_tile(dot_tile(rows_.data() + row, count, keys_ + key, call_.head_dim), to, count, TILE_COLUMNS);
      }
    }
  }

  void softmax(int64_t block) {
    for (int64_t row = 0; row < num_rows_; ++row) {
      float* weights = weights_.data() + row * BLOCK_KEYS;
      const int64_t token = unit_.first_token + row / group_;
      const int64_t first = std::clamp<int64_t>(seen_[row].first - block, 0, BLOCK_KEYS);
      const int64_t end = std::clamp<int64_t>(seen_[row].end - block, 0, BLOCK_KEYS);
      std::fill(weights, weights + first, NEVER);
      std::fill(weights + end, weights + BLOCK_KEYS, NEVER);
      if (call_.causal && call_.image_block_ids[token] >= 0) {
        for (int64_t i = 0; i < BLOCK_KEYS; ++i) {
          if (weights[i] != NEVER && !is_visible(token, block + i)) weights[i] = NEVER;
        }
      }
      Vec most = load(weights);
      for (int64_t i = LANES; i < BLOCK_KEYS; i += LANES) {
        const Vec next = load(weights + i);
        most = most > next ? most : next;
      }
      const float before = largest_[row], now = std::max(before, diffusiongemma::largest(most));
      if (now == NEVER) {  // the row sees nothing yet
        std::fill(weights, weights + BLOCK_KEYS, 0.0f);
        continue;
      }
      Vec total{};
      for (int64_t i = 0; i < BLOCK_KEYS; i += LANES) {
        const Vec weight = exp(load(weights + i) - now);
        store(weights + i, weight);
        total += weight;
      }
      if (now > before) {
        const float scale = exp(splat(before - now))[0];
        totals_[row] *= scale;
        float* sums = sums_.data() + row * padded_dim_;
        for (int64_t i = 0; i < padded_dim_; i += LANES) store(sums + i, load(sums + i) * scale);
        largest_[row] = now;
      }
      totals_[row] += total;
    }
  }

  void weigh_values(Range here) {
    for (int64_t row = 0; row < num_rows_; row += TILE_ROWS) {
      int64_t column = 0;
      for (; column + 4 * LANES <= padded_dim_; column += 4 * LANES) weigh<4>(row, column, here);
      for (; column + 2 * LANES <= padded_dim_; column += 2 * LANES) weigh<2>(row, column, here);
      for (; column < padded_dim_; column += LANES) weigh<1>(row, column, here);
    }
  }

  template <int VECS>
  void weigh(int64_t row, int64_t column, Range here) {
    const float* weights = weights_.data() + row * BLOCK_KEYS;
    float* sums = sums_.data() + row * padded_dim_ + column;
    Vec tile[TILE_ROWS][VECS];
    for (int r = 0; r < TILE_ROWS; ++r) {
      for (int v = 0; v < VECS; ++v) tile[r][v] = load(sums + r * padded_dim_ + v * LANES);
    }
    for (int64_t key = here.first; key < here.end; ++key) {
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) {
        const Vec value = in_register(load(values_[key] + column + v * LANES));
#pragma GCC unroll 4
        for (int r = 0; r < TILE_ROWS; ++r) tile[r][v] += weights[r * BLOCK_KEYS + key] * value;
      }
    }
    for (int r = 0; r < TILE_ROWS; ++r) {
      for (int v = 0; v < VECS; ++v) store(sums + r * padded_dim_ + v * LANES, tile[r][v]);
    }
  }

  const Call& call_;
  const Unit& unit_;
  const int64_t group_, num_rows_, padded_rows_, padded_dim_, start_, prefix_;
  std::vector<float> weights_;  // [padded_rows, BLOCK_KEYS] scores, then weights, of a block
  std::vector<float> sums_;     // [padded_rows, padded_dim] weighted sums of values
  std::vector<float> zeros_;    // stands for keys and values that no row of the unit sees, which may not be there
  std::vector<float> padded_values_;
  std::vector<Vec> totals_;  // sums of weights, by lane
  std::vector<float> largest_;
  std::vector<const float*> rows_;
  std::vector<Range> seen_;
  const float* keys_[BLOCK_KEYS];
  const float* values_[BLOCK_KEYS];
};

Tensor paged_attention(
    Tensor query, Tensor new_kv, Tensor kv_pages, Tensor page_table, Tensor prefix_lengths, Tensor sequence_starts,
    Tensor image_block_ids, bool causal, int64_t window) {
  for (Tensor* each : {&query, &new_kv, &page_table, &prefix_lengths, &sequence_starts, &image_block_ids}) {
    *each = torch::stable::contiguous(*each);
  }
  Tensor output = torch::stable::empty_like(query);
  const Call call{
      .query = query.const_data_ptr<float>(),
      .new_kv = new_kv.const_data_ptr<float>(),
      .kv_pages = kv_pages.const_data_ptr<float>(),
      .page_table = page_table.const_data_ptr<int32_t>(),
      .prefix_lengths = prefix_lengths.const_data_ptr<int32_t>(),
      .sequence_starts = sequence_starts.const_data_ptr<int32_t>(),
      .image_block_ids = image_block_ids.const_data_ptr<int32_t>(),
      .heads = query.size(1),
      .kv_heads = new_kv.size(2),
      .head_dim = query.size(2),
      .page_size = kv_pages.size(1),
      .columns = page_table.size(1),
      .window = window,
      .causal = causal,
      .output = output.mutable_data_ptr<float>(),
  };
  const int64_t unit_tokens = std::max<int64_t>(1, UNIT_ROWS / (call.heads / call.kv_heads));
  std::vector<Unit> units;
  for (int64_t sequence = 0; sequence < prefix_lengths.size(0); ++sequence) {
    const int64_t end = call.sequence_starts[sequence + 1];
    for (int64_t first = call.sequence_starts[sequence]; first < end; first += unit_tokens) {
      for (int64_t head = 0; head < call.kv_heads; ++head) {
        units.push_back({sequence, head, first, std::min(first + unit_tokens, end)});
      }
    }
  }
  const int64_t num_units = units.size();
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < num_units; ++i) UnitRun(call, units[i]).run();
  return output;
}

}  // namespace
}  // namespace diffusiongemma

STABLE_TORCH_LIBRARY_IMPL(diffusiongemma, CPU, library) {
  library.impl("paged_attention_cpu", TORCH_BOX(&diffusiongemma::paged_attention));
}
