// The sampler for float32 tensors on the CPU, beside its CUDA form in `launch.py`: same arguments, same numbers to rounding.
//
// `vocabulary_cpu`, a row of logits at a time, which stays in a core's cache:
// 1. Processed logits: soft cap, penalty of repeated tokens, bias, temperature; the largest and where it is.
// 2. Weights exp(processed - largest) in place of the logits, their sum, and the sum of weight * (processed - largest).
// 3. The sampled token (`draw.h`).
// 4. Where they are asked for: filters of the sampled token, log probabilities (`extras.h`).
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
#include "plugins/vocabulary/draw.h"
#include "plugins/vocabulary/extras.h"

namespace diffusiongemma {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float LOWEST = std::numeric_limits<float>::lowest();

struct Best {
  float value;
  int64_t token;
};

// Of one row, see `tables.py`; null if there is none.
struct Adjustment {
  const int32_t* repeated;
  float penalty;
  const float* bias;
};

// Of the tokens from `first` on, a multiple of LANES; count: how many there are.
Vec adjusted(Vec capped, const Adjustment& adjustment, int64_t first, int64_t count) {
  if (adjustment.repeated) {
    const int32_t word = adjustment.repeated[first / 32] >> first % 32;  // LANES divide 32
    Ints again;
    for (int lane = 0; lane < LANES; ++lane) again[lane] = word >> lane & 1;
    const Vec penalized = capped > 0.0f ? capped / adjustment.penalty : capped * adjustment.penalty;
    capped = again != 0 ? penalized : capped;
  }
  if (!adjustment.bias) return capped;
  const float* bias = adjustment.bias + first;
  return capped + (count == LANES ? load(bias) : load_first(bias, count));
}

// 1., of one row: `logits` become processed ones.
Best process(float* logits, int64_t vocab_size, float cap, const Adjustment& adjustment, float temperature) {
  Vec most = splat(-std::numeric_limits<float>::infinity());
  Ints where{}, lanes;
  for (int lane = 0; lane < LANES; ++lane) lanes[lane] = lane;
  const int64_t whole = vocab_size / LANES * LANES;
  const auto processed = [&](Vec raw, int64_t first, int64_t count) {
    const Vec capped = cap > 0 ? tanh(raw / cap) * cap : raw;
    return adjusted(capped, adjustment, first, count) / temperature;
  };
  for (int64_t i = 0; i < whole; i += LANES) {
    const Vec values = processed(load(logits + i), i, LANES);
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
    const int64_t rest = vocab_size - whole;
    const Vec values = processed(load_first(logits + whole, rest), whole, rest);
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

struct RowResult {
  int64_t argmax, sampled;
  float largest, entropy, total;
};

// 1. to 3. of one row. noise: null if it is greedy. kept: null, or where processed logits and weights are left.
RowResult vocabulary_row(
    float* logits, int64_t vocab_size, float cap, const Adjustment& adjustment, float temperature, const Philox* noise,
    KeptRow* kept) {
  const float none = -std::numeric_limits<float>::infinity();
  const Best top = process(logits, vocab_size, cap, adjustment, temperature);
  if (kept) kept->resize(vocab_size);
  Sums sums;
  Draw draw(noise ? *noise : Philox{}, top.value, none);
  for (int64_t first = 0; first < vocab_size; first += BLOCK) {
    float processed[BLOCK], weights[BLOCK];
    const int64_t count = std::min(BLOCK, vocab_size - first);
    std::fill(processed + count, processed + BLOCK, none);
    std::copy(logits + first, logits + first + count, processed);
    std::copy(processed, processed + BLOCK, weights);
    weigh(weights, top.value, sums);
    if (noise) draw.take(processed, weights, first);
    if (kept) {
      std::copy(processed, processed + BLOCK, &kept->processed[first]);
      std::copy(weights, weights + BLOCK, &kept->weights[first]);
    }
    std::copy(weights, weights + count, logits + first);
  }
  const float total = sum(sums.weights);
  const float entropy = std::log(total) - sum(sums.weighted) / total;
  return {top.token, noise ? draw.token() : top.token, top.value, entropy, total};
}

// Of all slots; see `tables.py`.
struct LogprobTables {
  const int64_t* counts;
  float* logprobs;
  int64_t* tokens;
  float* values;
  int64_t canvas_length, most;
};

// The log probabilities of a row, into its place. kept: null if only the argmax's is wanted.
void record(const LogprobTables& tables, int64_t slot, int64_t position, const RowResult& result, const KeptRow* kept) {
  const int64_t cell = slot * tables.canvas_length + position;
  const float logprob = -std::log(result.total);
  tables.logprobs[cell] = logprob;
  if (tables.counts[slot] == 0) return;
  std::vector<int64_t> tokens = most_likely(*kept, std::min(tables.counts[slot], kept->vocab_size));
  std::sort(tokens.begin(), tokens.end(), [&](int64_t a, int64_t b) { return kept->before(a, b); });
  for (size_t i = 0; i < tokens.size(); ++i) {
    tables.tokens[cell * tables.most + i] = tokens[i];
    tables.values[cell * tables.most + i] = kept->processed[tokens[i]] - result.largest + logprob;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> vocabulary(
    Tensor logits, double cap, Tensor temperature, Tensor bias, Tensor biased, Tensor repeated, Tensor penalties, Tensor slots,
    Tensor greedy, Tensor seeds, Tensor canvas_indices, Tensor steps, Tensor positions, Tensor top_k, Tensor top_p, Tensor min_p,
    Tensor counts, Tensor logprobs, Tensor tokens, Tensor values) {
  const int64_t num_rows = logits.size(0), vocab_size = logits.size(1);
  Tensor argmax = torch::stable::new_empty(seeds, {num_rows}), sampled = torch::stable::new_empty(seeds, {num_rows});
  Tensor entropy = torch::stable::new_empty(logits, {num_rows}), total = torch::stable::new_empty(logits, {num_rows});
  float* rows = logits.mutable_data_ptr<float>();
  const float *temperatures = temperature.const_data_ptr<float>(), *biases = bias.const_data_ptr<float>();
  const float* factors = penalties.const_data_ptr<float>();
  const int32_t* words = repeated.const_data_ptr<int32_t>();
  const int64_t num_words = repeated.size(1);
  const bool *is_greedy = greedy.const_data_ptr<bool>(), *has_bias = biased.const_data_ptr<bool>();
  const int64_t *seed = seeds.const_data_ptr<int64_t>(), *canvas_index = canvas_indices.const_data_ptr<int64_t>();
  const int64_t *step = steps.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  const int64_t *slot_of = slots.const_data_ptr<int64_t>(), *ks = top_k.const_data_ptr<int64_t>();
  const float *shares = top_p.const_data_ptr<float>(), *least_shares = min_p.const_data_ptr<float>();
  const LogprobTables tables{
      counts.const_data_ptr<int64_t>(), logprobs.mutable_data_ptr<float>(), tokens.mutable_data_ptr<int64_t>(),
      values.mutable_data_ptr<float>(), tokens.size(1), tokens.size(2)};
  int64_t *to_argmax = argmax.mutable_data_ptr<int64_t>(), *to_sampled = sampled.mutable_data_ptr<int64_t>();
  float *to_entropy = entropy.mutable_data_ptr<float>(), *to_total = total.mutable_data_ptr<float>();
#pragma omp parallel
  {
    KeptRow kept;
#pragma omp for
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t slot = slot_of[row];
      const Philox noise = Philox::gumbel(seed[row], canvas_index[row], step[row], position[row]);
      const Filters filters{ks[slot], shares[slot], least_shares[slot]};
      const bool filters_it = filters.any() && !is_greedy[row];
      KeptRow* keeps = filters_it || tables.counts[slot] > 0 ? &kept : nullptr;
      const Adjustment adjustment{
          factors[slot] != 1 ? words + slot * num_words : nullptr, factors[slot],
          has_bias[slot] ? biases + slot * vocab_size : nullptr};
      RowResult result = vocabulary_row(
          rows + row * vocab_size, vocab_size, static_cast<float>(cap), adjustment, temperatures[row],
          is_greedy[row] ? nullptr : &noise, keeps);
      if (filters_it) result.sampled = filtered(kept, filters, noise, result.largest, result.sampled);
      if (tables.counts[slot] >= 0) record(tables, slot, position[row], result, keeps);
      to_argmax[row] = result.argmax;
      to_sampled[row] = result.sampled;
      to_entropy[row] = result.entropy;
      to_total[row] = result.total;
    }
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
