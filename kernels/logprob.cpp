// Log-softmax of rows of logits at given tokens, its entropy and its slopes: the native form of kernels/logprob.py on a
// CPU. A row is read from memory once and written nowhere; its numbers depend on that row only, and are the same for fp32
// and bf16 logits of the same value. Exponentials are fp32 and of differences to the largest logit so far; sums of a block
// are fp32, those of blocks fp64.

#include <algorithm>
#include <cmath>
#include <limits>

#include "builtin.h"
#include "lanes.h"

namespace {

constexpr int kChains = 4;        // sums that are made side by side
constexpr int64_t kBlock = 2048;  // logits that are held at a time; a multiple of kChains vectors
const Ints kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr float kLowest = -std::numeric_limits<float>::max();

// Logits or slopes of one row up to a whole number of vectors; what lies beyond the end is not touched.
template <typename T>
inline Lanes load_some(const T* from, int64_t count, float beyond) {
  if (count >= kLanes) return load(from);
  Lanes x = spread(beyond);
  for (int64_t i = 0; i < count; ++i) x[i] = number(from[i]);
  return x;
}

template <typename T>
inline void store_some(T* to, int64_t count, Lanes x) {
  if (count >= kLanes) return store(to, x);
  T held[kLanes];
  store(held, x);
  std::memcpy(to, held, count * sizeof(T));
}

struct Row {
  float top = kLowest;
  double total = 0, weighted = 0;  // sums of e^z and z e^z, z = logit / temperature - top
};

// Adds `vectors` vectors of scores, a multiple of kChains, none of which is above row.top.
template <bool kEntropy>
inline void add(Row& row, const float* scores, int64_t vectors) {
  Lanes totals[kChains] = {}, weighted[kChains] = {};
  for (int64_t v = 0; v < vectors; v += kChains)
    for (int c = 0; c < kChains; ++c) {
      const Lanes z = load(scores + (v + c) * kLanes) - row.top, e = exp_of(z);
      totals[c] += e;
      if (kEntropy) weighted[c] += e * (z < -100.0f ? Lanes{} : z);  // e is 0 there, and z may be infinite
    }
  row.total += total_of((totals[0] + totals[1]) + (totals[2] + totals[3]));
  if (kEntropy) row.weighted += total_of((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
}

template <bool kEntropy, typename T>
Row sums_of(const T* logits, int64_t width, float temperature) {
  alignas(64) float scores[kBlock];
  Row row;
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    const int64_t count = std::min(kBlock, width - begin), step = kChains * kLanes;
    const int64_t whole = (count + step - 1) / step * step;
    Lanes most = spread(kNone);
    for (int64_t i = 0; i < whole; i += kLanes) {
      Lanes x = i < count ? load_some(logits + begin + i, count - i, kNone) : spread(kNone);
      if (temperature != 1.0f) x = x / temperature;
      if (i + kLanes > count) x = kLane < static_cast<int32_t>(count - i) ? x : spread(kNone);  // -inf / inf is none
      store(scores + i, x);
      most = larger(most, x);
    }
    const float top = largest_of(most);
    if (top > row.top) {
      const double lower = static_cast<double>(row.top) - top, factor = std::exp(lower);
      if (kEntropy) row.weighted = factor * (row.weighted + lower * row.total);
      row.total *= factor;
      row.top = top;
    }
    add<kEntropy>(row, scores, whole / kLanes);
  }
  return row;
}

struct Call {
  const void* logits;
  const int64_t* targets;
  const float* temperatures;  // null: `temperature` for all rows
  int64_t rows, width, row_step;
  float temperature;

  float at(int64_t row) const { return temperatures ? temperatures[row] : temperature; }
  template <typename T>
  const T* logits_of(int64_t row) const {
    return static_cast<const T*>(logits) + row * row_step;
  }
};

template <bool kEntropy, typename T>
void forward(const Call& call, float* logprobs, float* entropies, float* sums, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < call.rows; ++r) {
    const T* logits = call.logits_of<T>(r);
    const Row row = sums_of<kEntropy>(logits, call.width, call.at(r));
    const double log_total = std::log(row.total);
    const float score = number(logits[call.targets[r]]) / call.at(r);
    logprobs[r] = static_cast<float>(static_cast<double>(score) - row.top - log_total);
    if (kEntropy) entropies[r] = static_cast<float>(log_total - row.weighted / row.total);
    if (!sums) continue;
    sums[2 * r] = row.top;
    sums[2 * r + 1] = static_cast<float>(row.total);
  }
}

// With p the softmax: p_j (-g - h (log p_j + H)), and g more at the target. `out` may be the logits.
template <bool kEntropy, typename T>
void slopes(const Call& call, const float* sums, const float* entropies, const float* grads, const float* entropy_grads,
            T* out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < call.rows; ++r) {
    const T* logits = call.logits_of<T>(r);
    const float temperature = call.at(r), top = sums[2 * r], total = sums[2 * r + 1], grad = grads[r];
    const float share = 1.0f / total, of_entropy = kEntropy ? entropy_grads[r] : 0.0f;
    const float constant = kEntropy ? entropies[r] - std::log(total) : 0.0f;
    const auto slope = [&](Lanes x) {
      if (temperature != 1.0f) x = x / temperature;
      const Lanes z = x - top, p = exp_of(z) * share;
      if (!kEntropy) return p * -grad;
      return p * (-grad - of_entropy * ((z < -100.0f ? Lanes{} : z) + constant));
    };
    const Lanes at_target = slope(spread(number(logits[call.targets[r]]))) + grad;
    T* to = out + r * call.width;
    int64_t i = 0;
    for (; i + kLanes <= call.width; i += kLanes) store(to + i, slope(load(logits + i)));
    if (i < call.width) store_some(to + i, call.width - i, slope(load_some(logits + i, call.width - i, kNone)));
    store_some(to + call.targets[r], 1, at_target);
  }
}

// The first row whose target is no token; -1 where there is none.
int64_t misfit(const Call& call) {
  for (int64_t r = 0; r < call.rows; ++r)
    if (call.targets[r] < 0 || call.targets[r] >= call.width) return r;
  return -1;
}

}  // namespace

extern "C" {

// logits (rows, width), row r at r * row_step; targets (rows,); temperatures (rows,) or null. Written, (rows,) each:
// logprobs; entropies or null; sums (rows, 2) or null, the largest score and the sum of e^(score - largest), for
// logprob_slopes. Nothing is written where a target is outside [0, width): *bad is the first such row, else -1.
void logprob_forward(const void* logits, const int64_t* targets, const float* temperatures, float* logprobs,
                     float* entropies, float* sums, int64_t* bad, int64_t rows, int64_t width, int64_t row_step,
                     float temperature, int64_t is_bf16, int64_t threads) {
  const Call call{logits, targets, temperatures, rows, width, row_step, temperature};
  *bad = misfit(call);
  if (*bad >= 0) return;
  if (is_bf16)
    (entropies ? forward<true, Bf16> : forward<false, Bf16>)(call, logprobs, entropies, sums, threads);
  else
    (entropies ? forward<true, float> : forward<false, float>)(call, logprobs, entropies, sums, threads);
}

// grads (rows,) of the log-probs and entropy_grads (rows,) of the entropies or null, both over the temperature -> out
// (rows, width) of the logits' dtype. Targets are those that logprob_forward took.
void logprob_slopes(const void* logits, const int64_t* targets, const float* temperatures, const float* sums,
                    const float* entropies, const float* grads, const float* entropy_grads, void* out, int64_t rows,
                    int64_t width, int64_t row_step, float temperature, int64_t is_bf16, int64_t threads) {
  const Call call{logits, targets, temperatures, rows, width, row_step, temperature};
  if (is_bf16)
    (entropy_grads ? slopes<true, Bf16> : slopes<false, Bf16>)(call, sums, entropies, grads, entropy_grads,
                                                               static_cast<Bf16*>(out), threads);
  else
    (entropy_grads ? slopes<true, float> : slopes<false, float>)(call, sums, entropies, grads, entropy_grads,
                                                                 static_cast<float*>(out), threads);
}
}

BUILTIN(logprob_forward)
BUILTIN(logprob_slopes)
