// The sampler for float32 tensors on the CPU, beside its CUDA form in `launch.py`: same arguments, same numbers to rounding.
//
// `vocabulary_cpu`, a row of logits at a time, which stays in a core's cache:
// 1. Processed logits: soft cap, temperature; the largest and where it is.
// 2. Weights exp(processed - largest) in place of the logits, their sum, and the sum of weight * (processed - largest).
// 3. The sampled token: the largest of processed + Gumbel noise.
//
// The Gumbel noise of a word is -log(e) with e = -log(1 - v) >= v. A token wins only if processed - log(v) is above the best so
// far; with the weights of 2 that is a comparison without a logarithm, and few tokens pass it. Only those get the exact noise.
//
// `advance_cpu`, a canvas at a time: acceptance, renoising, convergence, as `sampler.py` defines them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "plugins/cpu/philox.h"
#include "plugins/cpu/vector.h"

namespace diffusiongemma {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t BLOCK = 256;  // logits
constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float LEAST_GUMBEL = -2.82f;  // a little less than any noise

inline float uniform(uint32_t word) {
  return std::min((static_cast<float>(word) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
}

inline float gumbel(uint32_t word) { return -std::log(-std::log1p(-uniform(word))); }

struct Best {
  float value;
  int64_t token;
};

// 1., of one row: `logits` become processed ones.
Best process(float* logits, int64_t vocab_size, float cap, float temperature) {
  Vec most = splat(-std::numeric_limits<float>::infinity());
  Ints where{}, lanes;
  for (int lane = 0; lane < LANES; ++lane) lanes[lane] = lane;
  const int64_t whole = vocab_size / LANES * LANES;
  const auto processed = [cap, temperature](Vec raw) { return (cap > 0 ? tanh(raw / cap) * cap : raw) / temperature; };
  for (int64_t i = 0; i < whole; i += LANES) {
    const Vec values = processed(load(logits + i));
    store(logits + i, values);
    const Ints token = lanes + static_cast<int32_t>(i);
    where = values > most ? token : where;
    most = values > most ? values : most;
  }
  Best best{most[0], where[0]};
  for (int lane = 1; lane < LANES; ++lane) {
    if (most[lane] > best.value || (most[lane] == best.value && where[lane] < best.token)) best = {most[lane], where[lane]};
  }
  if (whole < vocab_size) {
    const Vec values = processed(load_first(logits + whole, vocab_size - whole));
    for (int64_t i = whole; i < vocab_size; ++i) {
      logits[i] = values[i - whole];
      if (logits[i] > best.value) best = {logits[i], i};
    }
  }
  return best;
}

struct Sums {
  Vec weights{}, weighted{};
};

// 2., of one block: BLOCK processed logits become weights.
void weigh(float* logits, float largest, Sums& sums) {
  Sums block;
  for (int64_t i = 0; i < BLOCK; i += LANES) {
    const Vec difference = load(logits + i) - largest;
    const Vec shifted = difference > LOWEST ? difference : splat(LOWEST);  // -infinity * 0 is not the limit, 0
    const Vec weights = exp(shifted);
    store(logits + i, weights);
    block.weights += weights;
    block.weighted += weights * shifted;
  }
  sums.weights += block.weights;
  sums.weighted += block.weighted;
}

// 3.
class Draw {
 public:
  Draw(const Philox& noise, float largest)
      : noise_(noise),
        largest_(largest),
        slack_(0x1p-10f + 0x1p-21f * std::abs(largest)),
        limit_(limit_of(largest + LEAST_GUMBEL)) {}

  // `processed` and `weights` are those of tokens first to first + BLOCK.
  void take(const float* processed, const float* weights, int64_t first, int64_t count) {
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
    for (int64_t i = 0; i < count; ++i) {
      if (!wins[i]) continue;
      const float value = processed[i] + gumbel(words[i]);
      if (value > best_.value) {
        best_ = {value, first + i};
        limit_ = limit_of(value);
      }
    }
  }

  int64_t token() const { return best_.token; }

 private:
  float limit_of(float value) const { return std::exp(largest_ - value + slack_); }

  const Philox noise_;
  const float largest_, slack_;
  float limit_;
  Best best_{-std::numeric_limits<float>::infinity(), 0};
};

struct RowResult {
  int64_t argmax, sampled;
  float entropy, total;
};

RowResult vocabulary_row(float* logits, int64_t vocab_size, float cap, float temperature, const Philox* noise) {
  const Best top = process(logits, vocab_size, cap, temperature);
  Sums sums;
  Draw draw(noise ? *noise : Philox{}, top.value);
  for (int64_t first = 0; first < vocab_size; first += BLOCK) {
    float processed[BLOCK], weights[BLOCK];
    const int64_t count = std::min(BLOCK, vocab_size - first);
    std::fill(processed + count, processed + BLOCK, -std::numeric_limits<float>::infinity());
    std::copy(logits + first, logits + first + count, processed);
    std::copy(processed, processed + BLOCK, weights);
    weigh(weights, top.value, sums);
    if (noise) draw.take(processed, weights, first, count);
    std::copy(weights, weights + count, logits + first);
  }
  const float total = sum(sums.weights);
  const float entropy = std::log(total) - sum(sums.weighted) / total;
  return {top.token, noise ? draw.token() : top.token, entropy, total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> vocabulary(
    Tensor logits, double cap, Tensor temperature, Tensor greedy, Tensor seeds, Tensor canvas_indices, Tensor steps,
    Tensor positions) {
  const int64_t num_rows = logits.size(0), vocab_size = logits.size(1);
  Tensor argmax = torch::stable::new_empty(seeds, {num_rows}), sampled = torch::stable::new_empty(seeds, {num_rows});
  Tensor entropy = torch::stable::new_empty(logits, {num_rows}), total = torch::stable::new_empty(logits, {num_rows});
  float* rows = logits.mutable_data_ptr<float>();
  const float* temperatures = temperature.const_data_ptr<float>();
  const bool* is_greedy = greedy.const_data_ptr<bool>();
  const int64_t *seed = seeds.const_data_ptr<int64_t>(), *canvas_index = canvas_indices.const_data_ptr<int64_t>();
  const int64_t *step = steps.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  int64_t *to_argmax = argmax.mutable_data_ptr<int64_t>(), *to_sampled = sampled.mutable_data_ptr<int64_t>();
  float *to_entropy = entropy.mutable_data_ptr<float>(), *to_total = total.mutable_data_ptr<float>();
#pragma omp parallel for
  for (int64_t row = 0; row < num_rows; ++row) {
    const Philox noise = Philox::gumbel(seed[row], canvas_index[row], step[row], position[row]);
    const RowResult result = vocabulary_row(
        rows + row * vocab_size, vocab_size, static_cast<float>(cap), temperatures[row], is_greedy[row] ? nullptr : &noise);
    to_argmax[row] = result.argmax;
    to_sampled[row] = result.sampled;
    to_entropy[row] = result.entropy;
    to_total[row] = result.total;
  }
  return {argmax, sampled, entropy, total};
}

// The longest run of lowest-entropy tokens with sum(entropies) - max(entropies) <= bound; sums in double, each rounded once.
std::vector<bool> accepted(const float* entropy, int64_t length, float bound) {
  std::vector<int64_t> order(length);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return entropy[a] < entropy[b]; });
  std::vector<bool> mask(length);
  double running = 0;
  for (const int64_t token : order) {
    running += entropy[token];
    mask[token] = static_cast<float>(running) - entropy[token] <= bound;
  }
  return mask;
}

std::tuple<Tensor, Tensor, Tensor> advance(
    Tensor entropy, Tensor argmax, Tensor sampled, Tensor bound, Tensor confidence_threshold, Tensor previous_argmax,
    Tensor stable_steps, Tensor stability_threshold, Tensor seeds, Tensor canvas_indices, Tensor steps, int64_t vocab_size) {
  const int64_t num_rows = entropy.size(0), length = entropy.size(1);
  Tensor canvas = torch::stable::empty_like(sampled), new_stable_steps = torch::stable::empty_like(stable_steps);
  Tensor converged = torch::stable::new_empty(entropy, {num_rows}, ScalarType::Bool);
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* of_row = entropy.const_data_ptr<float>() + row * length;
    const int64_t* most_likely = argmax.const_data_ptr<int64_t>() + row * length;
    const int64_t* before = previous_argmax.const_data_ptr<int64_t>() + row * length;
    const int64_t* drawn = sampled.const_data_ptr<int64_t>() + row * length;
    int64_t* to = canvas.mutable_data_ptr<int64_t>() + row * length;
    const std::vector<bool> mask = accepted(of_row, length, bound.const_data_ptr<float>()[row]);
    const int64_t seed = seeds.const_data_ptr<int64_t>()[row], canvas_index = canvas_indices.const_data_ptr<int64_t>()[row];
    const int64_t step = steps.const_data_ptr<int64_t>()[row];
    for (int64_t position = 0; position < length; ++position) {
      const uint64_t word = Philox::renoise(seed, canvas_index, step, position).first_word();
      to[position] = mask[position] ? drawn[position] : static_cast<int64_t>(word * vocab_size >> 32);
    }
    const bool repeated = std::equal(most_likely, most_likely + length, before);
    const int64_t count = repeated ? stable_steps.const_data_ptr<int64_t>()[row] + 1 : 0;
    const float mean = std::accumulate(of_row, of_row + length, 0.0) / length;
    new_stable_steps.mutable_data_ptr<int64_t>()[row] = count;
    converged.mutable_data_ptr<bool>()[row] = count >= stability_threshold.const_data_ptr<int64_t>()[row] &&
                                              mean < confidence_threshold.const_data_ptr<float>()[row];
  }
  return {canvas, new_stable_steps, converged};
}

}  // namespace
}  // namespace diffusiongemma

STABLE_TORCH_LIBRARY_IMPL(diffusiongemma, CPU, library) {
  library.impl("vocabulary_cpu", TORCH_BOX(&diffusiongemma::vocabulary));
  library.impl("advance_cpu", TORCH_BOX(&diffusiongemma::advance));
}
