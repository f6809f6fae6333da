// `diffusiongemma::experts_cpu`: the experts operator for float32 tensors on the CPU, with weights in float32 or in 4 bits
// (`plugins/moe/int4.py`, `plugins/moe/nvfp4.py`). See the package's docstring for arguments.
//
// 1. Sort the N * k routed rows by expert.
// 2. Units of work, one expert and some of its rows each: gate and up products, activation, down product.
// 3. Weight and combine, a row's experts in their order.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "plugins/cpu/vector.h"
#include "plugins/moe/four_bits.h"
#include "plugins/moe/stored_rows.h"

namespace diffusiongemma {
namespace {

using torch::stable::Tensor;

static_assert(8 % TILE_COLUMNS == 0, "a tile's columns of weights in blocks are of one block");
constexpr int64_t UNIT_ROWS = 64;  // rows whose products stay in a core's cache

// x / (1 + exp(-2 u)), which is x * (1 + tanh(u)) / 2, with u = sqrt(2 / pi) * (x + 0.044715 x^3).
inline Vec gelu_tanh(Vec x) {
  const Vec u = 0.7978845608028654f * x * (1.0f + 0.044715f * x * x);
  return x / (1.0f + exp(-2.0f * u));
}

struct Sizes {
  int64_t hidden, width;
};

// An expert's weights in float32: a row of the gate's, of up's and of the second product's weight.
class PlainExpert {
 public:
  PlainExpert(const Sizes& sizes, const float* gate_up, const float* down, int64_t expert)
      : sizes_(sizes),
        gate_up_(gate_up + expert * 2 * sizes.width * sizes.hidden),
        down_(down + expert * sizes.hidden * sizes.width) {}

  const float* gate(int64_t row) { return gate_up_ + row * sizes_.hidden; }
  const float* up(int64_t row) { return gate_up_ + (sizes_.width + row) * sizes_.hidden; }
  const float* down(int64_t row) { return down_ + row * sizes_.width; }

 private:
  const Sizes& sizes_;
  const float *gate_up_, *down_;
};

// The same of weights in a format, a block of which is unpacked when one of its rows is asked for and another's was before.
template <class Format>
class StoredExpert {
 public:
  StoredExpert(
      const Sizes& sizes, const typename Format::Item* gate_up, const typename Format::Item* down, int64_t expert)
      : gate_up_(expert * num_blocks(2 * sizes.width), sizes.hidden, gate_up),
        down_(expert * num_blocks(sizes.hidden), sizes.width, down) {}

  const float* gate(int64_t row) { return gate_up_.row(row / 8 * 16 + row % 8); }  // the halves in turns of 8 rows
  const float* up(int64_t row) { return gate_up_.row(row / 8 * 16 + row % 8 + 8); }
  const float* down(int64_t row) { return down_.row(row); }

 private:
  StoredRows<Format> gate_up_, down_;
};

struct Unit {
  int64_t expert, begin, end;  // of the sorted routed rows
};

// Products of up to UNIT_ROWS rows with one expert's weights; `to` are where the results go.
template <class Expert>
void run_unit(const Sizes& sizes, int64_t num_rows, const float* const* rows, Expert weights, float* const* to) {
  const auto [hidden, width] = sizes;
  const auto activated = std::make_unique_for_overwrite<float[]>(num_rows * width);
  const float* gate[TILE_COLUMNS];
  const float* up[TILE_COLUMNS];
  float* into[TILE_ROWS];
  for (int64_t column = 0; column < width; column += TILE_COLUMNS) {
    for (int64_t c = 0; c < TILE_COLUMNS; ++c) {
      const int64_t valid = std::min(column + c, width - 1);
      gate[c] = weights.gate(valid);
      up[c] = weights.up(valid);
    }
    for (int64_t row = 0; row < num_rows; row += TILE_ROWS) {
      const int64_t count = std::min<int64_t>(TILE_ROWS, num_rows - row);
      const Vec gated = gelu_tanh(dot_tile(rows + row, count, gate, hidden)) * dot_tile(rows + row, count, up, hidden);
      for (int64_t r = 0; r < count; ++r) into[r] = activated.get() + (row + r) * width + column;
      store_tile(gated, into, count, width - column);
    }
  }
  const float* activated_rows[UNIT_ROWS];
  for (int64_t row = 0; row < num_rows; ++row) activated_rows[row] = activated.get() + row * width;
  const float* columns[TILE_COLUMNS];
  for (int64_t column = 0; column < hidden; column += TILE_COLUMNS) {
    for (int64_t c = 0; c < TILE_COLUMNS; ++c) columns[c] = weights.down(std::min(column + c, hidden - 1));
    for (int64_t row = 0; row < num_rows; row += TILE_ROWS) {
      const int64_t count = std::min<int64_t>(TILE_ROWS, num_rows - row);
      for (int64_t r = 0; r < count; ++r) into[r] = to[row + r] + column;
      store_tile(dot_tile(activated_rows + row, count, columns, width), into, count, hidden - column);
    }
  }
}

template <class Expert, class Number>
Tensor experts_of(
    const Sizes& sizes, Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj) {
  hidden = torch::stable::contiguous(hidden);
  top_k_index = torch::stable::contiguous(top_k_index);
  top_k_weights = torch::stable::contiguous(top_k_weights);
  const int64_t num_rows = hidden.size(0), top_k = top_k_index.size(1), num_routed = num_rows * top_k;
  const int64_t num_experts = gate_up_proj.size(0);
  const float* rows = hidden.const_data_ptr<float>();
  const int64_t* index = top_k_index.const_data_ptr<int64_t>();
  const float* weights = top_k_weights.const_data_ptr<float>();
  const Number* gate_up = gate_up_proj.const_data_ptr<Number>();
  const Number* down = down_proj.const_data_ptr<Number>();

  // 1.
  std::vector<int64_t> starts(num_experts + 1, 0), order(num_routed);
  for (int64_t i = 0; i < num_routed; ++i) ++starts[index[i] + 1];
  for (int64_t expert = 0; expert < num_experts; ++expert) starts[expert + 1] += starts[expert];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t i = 0; i < num_routed; ++i) order[next[index[i]]++] = i;
  std::vector<Unit> units;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    for (int64_t begin = starts[expert]; begin < starts[expert + 1]; begin += UNIT_ROWS) {
      units.push_back({expert, begin, std::min(begin + UNIT_ROWS, starts[expert + 1])});
    }
  }

  // 2.
  Tensor results = torch::stable::new_empty(hidden, {num_routed, sizes.hidden});
  float* routed = results.mutable_data_ptr<float>();
  const int64_t num_units = units.size();
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < num_units; ++i) {
    const auto [expert, begin, end] = units[i];
    const float* from[UNIT_ROWS];
    float* to[UNIT_ROWS];
    for (int64_t at = begin; at < end; ++at) {
      from[at - begin] = rows + order[at] / top_k * sizes.hidden;
      to[at - begin] = routed + order[at] * sizes.hidden;
    }
    run_unit(sizes, end - begin, from, Expert(sizes, gate_up, down, expert), to);
  }

  // 3.
  Tensor output = torch::stable::empty_like(hidden);
  float* out = output.mutable_data_ptr<float>();
#pragma omp parallel for if (num_rows * top_k * sizes.hidden > (1 << 16))
  for (int64_t row = 0; row < num_rows; ++row) {
    float* to = out + row * sizes.hidden;
    std::fill(to, to + sizes.hidden, 0.0f);
    for (int64_t k = 0; k < top_k; ++k) {
      const float weight = weights[row * top_k + k];
      const float* from = routed + (row * top_k + k) * sizes.hidden;
      for (int64_t column = 0; column < sizes.hidden; ++column) to[column] += weight * from[column];
    }
  }
  return output;
}

template <class Format>
Tensor stored_experts(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj) {
  const Sizes sizes{hidden.size(1), gate_up_proj.size(1) * (BLOCK / 2)};
  return experts_of<StoredExpert<Format>, typename Format::Item>(
      sizes, hidden, top_k_index, top_k_weights, gate_up_proj, down_proj);
}

Tensor experts(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj) {
  const auto stored = gate_up_proj.scalar_type();
  if (stored == torch::headeronly::ScalarType::Short) {
    return stored_experts<Int4>(hidden, top_k_index, top_k_weights, gate_up_proj, down_proj);
  }
  if (stored == torch::headeronly::ScalarType::Byte) {
    return stored_experts<Nvfp4>(hidden, top_k_index, top_k_weights, gate_up_proj, down_proj);
  }
  const Sizes sizes{hidden.size(1), down_proj.size(2)};
  return experts_of<PlainExpert, float>(sizes, hidden, top_k_index, top_k_weights, gate_up_proj, down_proj);
}

}  // namespace
}  // namespace diffusiongemma

STABLE_TORCH_LIBRARY_IMPL(diffusiongemma, CPU, library) {
  library.impl("experts_cpu", TORCH_BOX(&diffusiongemma::experts));
}
