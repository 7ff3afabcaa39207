// One token of each row of logits: the native form of kernels/sampling.py on a CPU. Arithmetic is in fp32, sums over a
// row in two levels; a row's token is a function of that row, its key, its position and its parameters only.
//
// The noise of a token takes two logarithms, and few tokens can win: a bound of the score plus noise, made without one,
// passes over 64 tokens at a time that all stay below the best so far. Cuts are thresholds of the score: a bound that
// is quickly found leaves few tokens, among which the threshold is selected or bisected; nothing is sorted.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "builtin.h"
#include "lanes.h"

namespace {

typedef Vector<uint32_t, kLanes>::Type Words;

constexpr float kLn2 = 0.693147181f;
constexpr int kChunk = 4;   // vectors that are passed over together
constexpr int kGroup = 64;  // vectors whose sums and largest numbers are taken together
constexpr int kLevels = 6;  // distances from the largest score at which the mass is looked at: 1, 2, 4, ... nats

inline Words counts() { return Words{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

inline bool any(Ints mask) {
  uint64_t parts[kLanes / 2];
  std::memcpy(parts, &mask, sizeof parts);
  uint64_t all = 0;
  for (uint64_t part : parts) all |= part;
  return all;
}

template <typename To, typename From>
inline To same_bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "bits are neither added nor lost");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// -- noise ------------------------------------------------------------------------------------------------------------

struct Key {
  uint32_t low, high;
};

// kernels/random.py's random_bits.
inline Key key_of(int64_t seed, int64_t position) {
  uint64_t x = static_cast<uint64_t>(seed) + (static_cast<uint64_t>(position) + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  x ^= x >> 31;
  return {static_cast<uint32_t>(x), static_cast<uint32_t>(x >> 32)};
}

// kernels/random.py's token_words.
inline Words words_of(Words tokens, Key key) {
  Words x = tokens * 0x9E3779B9u + key.low;
  x = (x ^ (x >> 17)) * 0xED5AD4BBu;
  x = ((x ^ (x >> 11)) + key.high) * 0xAC4C1B51u;
  x = (x ^ (x >> 15)) * 0x31848BABu;
  return x ^ (x >> 14);
}

inline Lanes uniform_of(Words words) {
  const Lanes x = (__builtin_convertvector(words, Lanes) + 0.5f) * 0x1p-32f;
  return x < 1.0f ? x : spread(1.0f - 0x1p-24f);
}

// k log 2 + log(1 + f) for f in [-0.293, 0.415], which is 2 atanh(f / (2 + f)).
inline Lanes log_of_parts(Lanes k, Lanes f) {
  const Lanes s = f / (2.0f + f), z = s * s;
  const Lanes tail = z * (z * (z * (z * (1.0f / 9) + 1.0f / 7) + 1.0f / 5) + 1.0f / 3);
  return k * kLn2 + 2.0f * (s + s * tail);
}

// A number as 2^k (1 + f), f in [-0.293, 0.415].
inline void parts_of(Lanes x, Lanes* k, Lanes* f) {
  const Ints bits = same_bits<Ints>(x), power = (bits - 0x3F3504F3) >> 23;
  *k = __builtin_convertvector(power, Lanes);
  *f = same_bits<Lanes>(bits - (power << 23)) - 1.0f;
}

// scores - log(e) with the words' exponential variables e. Not inlined: every token's noise goes through the same
// instructions.
__attribute__((noinline)) Lanes with_noise(Lanes scores, Words words) {
  const Lanes x = uniform_of(words);
  const Ints small = x < 0.292893f;  // 1 - x would lose bits
  Lanes k, f;
  parts_of(1.0f - x, &k, &f);
  const Lanes e = -log_of_parts(small ? Lanes{} : k, small ? -x : f);
  parts_of(e, &k, &f);
  return scores - log_of_parts(k, f);
}

// No less than with_noise: e >= x, log2(1 + f) >= f for f in [0, 1), and what rounding adds is far below 1e-4.
inline Lanes bound_of(Lanes scores, Words words) {
  const Lanes exponent_and_fraction = __builtin_convertvector(same_bits<Ints>(uniform_of(words)), Lanes);
  return scores + (127.0f * kLn2 + 1e-4f - exponent_and_fraction * (kLn2 * 0x1p-23f));
}

// -- where the scores of a row are ------------------------------------------------------------------------------------

// Logits of any width, read as logits / temperature.
template <typename T>
struct Logits {
  const T* at;
  float temperature;
  int64_t width;

  int64_t size() const { return (width + kLanes - 1) / kLanes * kLanes; }
  Lanes scores(int64_t i) const {
    Lanes x = {};
    if (i + kLanes <= width) {
      x = load(at + i);
    } else {
      T held[kLanes] = {};
      std::memcpy(held, at + i, (width - i) * sizeof(T));
      const Words here = counts() + static_cast<uint32_t>(i);
      x = here < static_cast<uint32_t>(width) ? load(held) : spread(kNone);
    }
    return temperature == 1.0f ? x : x / temperature;
  }
  Words tokens(int64_t i) const { return counts() + static_cast<uint32_t>(i); }
};

// Scores in memory, -inf up to a whole vector; of all tokens where `named` is null.
struct Scores {
  const float* at;
  const uint32_t* named;
  int64_t count;

  int64_t size() const { return count; }
  Lanes scores(int64_t i) const { return load(at + i); }
  Words tokens(int64_t i) const {
    if (!named) return counts() + static_cast<uint32_t>(i);
    Words words;
    std::memcpy(&words, named + i, sizeof words);
    return words;
  }
};

struct Best {
  float score = kNone;
  uint32_t token = 0;
};

// The token of the largest score plus noise, or score; of equal ones the lowest. 0 where there is none.
template <bool kNoise, typename Source>
Best best_of(const Source& source, Key key, float floor) {
  Lanes best = spread(kNone);
  Words best_token = {};
  float most = kNone;
  const auto look = [&](int64_t i, int vectors) {
    Lanes scores[kChunk];
    Words tokens[kChunk], words[kChunk];
    Ints hit = {};
    for (int v = 0; v < vectors; ++v) {
      const Lanes x = source.scores(i + v * kLanes);
      scores[v] = x >= floor ? x : spread(kNone);
      tokens[v] = source.tokens(i + v * kLanes);
      if (kNoise) words[v] = words_of(tokens[v], key);
      hit |= (kNoise ? bound_of(scores[v], words[v]) : scores[v]) > most;
    }
    if (!any(hit)) return;
    for (int v = 0; v < vectors; ++v) {
      const Lanes value = kNoise ? with_noise(scores[v], words[v]) : scores[v];
      best_token = value > best ? tokens[v] : best_token;
      best = larger(best, value);
    }
    most = largest_of(best);
  };
  const int64_t size = source.size();
  int64_t i = 0;
  for (; i + kChunk * kLanes <= size; i += kChunk * kLanes) look(i, kChunk);
  for (; i < size; i += kLanes) look(i, 1);
  Best found;
  for (int lane = 0; lane < kLanes; ++lane)
    if (best[lane] > found.score || (best[lane] == found.score && most > kNone && best_token[lane] < found.token))
      found = {best[lane], best_token[lane]};
  return found;
}

// -- cuts -------------------------------------------------------------------------------------------------------------

struct Cuts {
  int64_t top_k;    // 0 = all
  double top_p;     // >= 1 = all
  float log_min_p;  // -inf = all
  bool any() const { return top_k > 0 || top_p < 1 || log_min_p > kNone; }
};

// Memory of one thread.
struct Work {
  std::vector<float> scores, masses, kept, group;
  std::vector<uint32_t> named;

  float* room(std::vector<float>& of, size_t size) {
    if (of.size() < size) of.resize(size);
    return of.data();
  }
};

// Sums of vectors: short ones in fp32, these in fp64.
struct Sum {
  double whole = 0;
  Lanes part = {};
  void add(Lanes x) { part = part + x; }
  void fold() {
    whole += total_of(part);
    part = Lanes{};
  }
};

// The sum of the masses whose score is at least `floor`.
double mass_from(const float* scores, const float* masses, int64_t count, float floor) {
  Sum sum;
  for (int64_t begin = 0; begin < count; begin += kGroup * kLanes) {
    const int64_t end = std::min(count, begin + kGroup * kLanes);
    for (int64_t i = begin; i < end; i += kLanes) sum.add(load(scores + i) >= floor ? load(masses + i) : Lanes{});
    sum.fold();
  }
  return sum.whole;
}

// Floats in their order as integers, and back.
inline int64_t order_of(float x) {
  const int32_t bits = same_bits<int32_t>(x);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
inline float at_order(int64_t order) {
  const int32_t bits = static_cast<int32_t>(order);
  return same_bits<float>(bits ^ ((bits >> 31) & 0x7FFFFFFF));
}

// The largest threshold at or above `low` whose mass is still at least `wanted`: a score.
float threshold_of(const float* scores, const float* masses, int64_t count, double wanted, float low, float top) {
  int64_t from = order_of(low), to = order_of(top) + 1;
  while (to - from > 1) {
    const int64_t middle = from + (to - from) / 2;
    (mass_from(scores, masses, count, at_order(middle)) >= wanted ? from : to) = middle;
  }
  return at_order(from);
}

// Not above the k-th largest score: the k-th largest of the largest scores of as many groups as there are.
float bound_of_top_k(const float* scores, int64_t size, int64_t k, Work& work) {
  const int64_t groups = (size + kGroup * kLanes - 1) / (kGroup * kLanes) * kLanes;
  if (groups < 2 * k) return kNone;
  float* most = work.room(work.group, groups);
  for (int64_t g = 0; g * kLanes < groups; ++g) {
    Lanes of_lane = spread(kNone);
    const int64_t end = std::min(size, (g + 1) * kGroup * kLanes);
    for (int64_t i = g * kGroup * kLanes; i < end; i += kLanes) of_lane = larger(of_lane, load(scores + i));
    store(most + g * kLanes, of_lane);
  }
  std::nth_element(most, most + k - 1, most + groups, std::greater<float>());
  return most[k - 1];
}

// The mass of a row, and a threshold, a whole distance from the top, whose mass is at least the share p of it.
double bound_of_top_p(const float* scores, int64_t size, float top, double p, float* bound) {
  Sum sums[kLevels + 1];
  for (int64_t begin = 0; begin < size; begin += kGroup * kLanes) {
    const int64_t end = std::min(size, begin + kGroup * kLanes);
    for (int64_t i = begin; i < end; i += kLanes) {
      const Lanes x = load(scores + i) - top, mass = x == x ? exp_of(x) : Lanes{};
      for (int level = 0; level < kLevels; ++level)
        sums[level].add(x >= -static_cast<float>(1 << level) ? mass : Lanes{});
      sums[kLevels].add(mass);
    }
    for (Sum& sum : sums) sum.fold();
  }
  const double total = sums[kLevels].whole;
  for (int level = 0; level < kLevels; ++level)
    if (sums[level].whole >= p * total * (1 + 1e-5)) {
      // the difference was rounded: a little below, no score that it took is left out
      *bound = top - static_cast<float>(1 << level) - 1e-5f * (std::fabs(top) + (1 << level));
      return total;
    }
  *bound = kNone;
  return total;
}

// Of the scores those from `bound` on, with their tokens.
Scores kept_from(const float* scores, int64_t size, float bound, Work& work) {
  if (bound == kNone) return {scores, nullptr, size};
  int64_t count = 0;
  float* kept = work.room(work.kept, size + kLanes);
  if (work.named.size() < static_cast<size_t>(size + kLanes)) work.named.resize(size + kLanes);
  uint32_t* named = work.named.data();
  const auto look = [&](int64_t i, int vectors) {
    Ints hit = {};
    for (int v = 0; v < vectors; ++v) hit |= load(scores + i + v * kLanes) >= bound;
    if (!any(hit)) return;
    for (int64_t j = i; j < i + vectors * kLanes; ++j)
      if (scores[j] >= bound) {
        kept[count] = scores[j];
        named[count++] = static_cast<uint32_t>(j);
      }
  };
  int64_t i = 0;
  for (; i + kChunk * kLanes <= size; i += kChunk * kLanes) look(i, kChunk);
  for (; i < size; i += kLanes) look(i, 1);
  for (; count % kLanes; ++count) kept[count] = kNone, named[count] = 0;
  return {kept, named, count};
}

float kth_of(const Scores& of, int64_t k, Work& work) {
  // what NaN and -inf leave
  float* copy = work.room(work.group, of.count);
  const int64_t count = std::copy_if(of.at, of.at + of.count, copy, [](float score) { return score > kNone; }) - copy;
  if (count < k) return kNone;
  std::nth_element(copy, copy + k - 1, copy + count, std::greater<float>());
  return copy[k - 1];
}

struct Drawn {
  int64_t token;
  float logprob;  // under the distribution drawn from
};

// From the scores of a row, whole vectors of them, with bans and cuts.
Drawn draw_cut(const float* scores, int64_t size, const Cuts& cuts, Key key, Work& work) {
  Lanes of_lane = spread(kNone);
  for (int64_t i = 0; i < size; i += kLanes) of_lane = larger(of_lane, load(scores + i));
  const float top = largest_of(of_lane), min_p_floor = top + cuts.log_min_p;
  const bool nucleus = cuts.top_p < 1;
  float bound = kNone;
  double total = 0;
  if (cuts.top_k)
    bound = bound_of_top_k(scores, size, cuts.top_k, work);
  else if (nucleus)
    total = bound_of_top_p(scores, size, top, cuts.top_p, &bound);
  else
    bound = min_p_floor;
  const Scores kept = kept_from(scores, size, bound, work);
  float floor = cuts.top_k ? kth_of(kept, cuts.top_k, work) : bound;
  float* masses = work.room(work.masses, kept.count);
  for (int64_t i = 0; i < kept.count; i += kLanes) {
    const Lanes x = kept.scores(i);
    store(masses + i, x >= floor ? exp_of(x - top) : Lanes{});
  }
  if (nucleus) {
    if (cuts.top_k) total = mass_from(kept.at, masses, kept.count, kNone);
    floor = threshold_of(kept.at, masses, kept.count, cuts.top_p * total, floor, top);
  }
  floor = std::max(floor, min_p_floor);
  const Best best = best_of<true>(kept, key, floor);
  const double mass = mass_from(kept.at, masses, kept.count, floor);
  const float score = scores[best.token];
  return {best.token, static_cast<float>(static_cast<double>(score) - top - std::log(mass))};
}

struct Call {
  const void* logits;
  const int64_t *keys, *positions;
  const float* temperature;
  const int64_t* top_k;  // this and what follows may be null
  const double* top_p;
  const float* log_min_p;
  const int64_t *ban_starts, *banned;
  int64_t* tokens;
  float* processed;
  int64_t rows, width;

  Cuts cuts(int64_t row) const {
    Cuts cuts{top_k ? top_k[row] : 0, top_p ? top_p[row] : 1.0, log_min_p ? log_min_p[row] : kNone};
    if (cuts.top_k >= width) cuts.top_k = 0;
    return cuts;
  }
  int64_t bans(int64_t row) const { return ban_starts ? ban_starts[row + 1] - ban_starts[row] : 0; }
};

template <typename T>
void draw_row(const Call& call, int64_t row, Work& work) {
  const float temperature = call.temperature[row];
  const bool greedy = temperature == 0;
  const T* at = static_cast<const T*>(call.logits) + row * call.width;
  const Logits<T> logits{at, greedy ? 1.0f : temperature, call.width};
  const Key key = key_of(call.keys[row], call.positions[row]);
  const Cuts cuts = call.cuts(row);
  if (!call.bans(row) && (greedy || !cuts.any())) {
    call.tokens[row] = (greedy ? best_of<false>(logits, key, kNone) : best_of<true>(logits, key, kNone)).token;
    return;
  }
  const int64_t size = logits.size();
  float* scores = work.room(work.scores, size);
  for (int64_t i = 0; i < size; i += kLanes) store(scores + i, logits.scores(i));
  for (int64_t i = 0; i < call.bans(row); ++i) scores[call.banned[call.ban_starts[row] + i]] = kNone;
  if (greedy) {
    call.tokens[row] = best_of<false>(Scores{scores, nullptr, size}, key, kNone).token;
    return;
  }
  const Drawn drawn = draw_cut(scores, size, cuts, key, work);
  call.tokens[row] = drawn.token;
  call.processed[row] = drawn.logprob;
}

template <typename T>
void draw(const Call& call, int threads) {
  Memory memory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Work work;
#pragma omp for schedule(dynamic, 1)
    for (int64_t row = 0; row < call.rows; ++row) memory.with([&] { draw_row<T>(call, row, work); });
  }
  memory.check();
}

}  // namespace

extern "C" {

// logits (rows, width); keys, positions, temperature (0 = greedy), top_k (0 = all), top_p (1 = all), log_min_p (-inf =
// all): (rows,); the tokens banned of row r: banned[ban_starts[r]] up to banned[ban_starts[r + 1]]. All from top_k to
// banned may be null. tokens (rows,); processed (rows,) is written where a row has bans or cuts and is not greedy.
void sample_rows(const void* logits, const int64_t* keys, const int64_t* positions, const float* temperature,
                 const int64_t* top_k, const double* top_p, const float* log_min_p, const int64_t* ban_starts,
                 const int64_t* banned, int64_t* tokens, float* processed, int64_t rows, int64_t width, int64_t is_bf16,
                 int64_t threads) {
  const Call call{logits, keys,       positions, temperature, top_k,     top_p, log_min_p,
                  ban_starts, banned, tokens,    processed,   rows, width};
  (is_bf16 ? draw<Bf16> : draw<float>)(call, threads);
}
}

BUILTIN(sample_rows)
