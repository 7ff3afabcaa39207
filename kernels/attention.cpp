// Causal attention of single query rows to their keys, in fp32: the native form of kernels/attention.py on a CPU.
//
// A row's result is a function of its own q and of the k and v at its own positions, bit for bit: every row runs the
// same instructions over the same absolute blocks of 16 positions, whatever else is in the call and on however many
// threads. Masked positions have probability 0 and add an exact 0. Sums over keys: the probabilities' in 16 lanes by
// position modulo 16, the values' in two chains by its parity.

#include <cstdint>
#include <cstring>

#include <algorithm>
#include <limits>
#include <vector>

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

namespace {

constexpr int kBlock = 16;  // positions, and lanes

inline Lanes load(const float* from) {
  Lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }

inline Lanes spread(float x) { return Lanes{} + x; }

// Lane i of the result is the sum of all lanes of rows[i], added up as a tree.
inline Lanes sums_of(const Lanes* rows) {
  Lanes a[8], b[4], c[2];
  const Ints low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  const Ints high8 = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
  for (int i = 0; i < 8; ++i)
    a[i] = __builtin_shuffle(rows[i], rows[i + 8], low8) + __builtin_shuffle(rows[i], rows[i + 8], high8);
  const Ints low4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
  const Ints high4 = {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31};
  for (int i = 0; i < 4; ++i)
    b[i] = __builtin_shuffle(a[i], a[i + 4], low4) + __builtin_shuffle(a[i], a[i + 4], high4);
  const Ints low2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  const Ints high2 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  for (int i = 0; i < 2; ++i)
    c[i] = __builtin_shuffle(b[i], b[i + 2], low2) + __builtin_shuffle(b[i], b[i + 2], high2);
  // lane 4 j + 2 i + {0, 1} of c[k] holds halves of row 8 * (j >> 1) + 4 * (j & 1) + 2 * i + k
  const Ints even = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
  const Ints odd = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
  return __builtin_shuffle(c[0], c[1], even) + __builtin_shuffle(c[0], c[1], odd);
}

// e^x for x <= 0, to 1 ulp or two; 0 below -87.
inline Lanes exp_of(Lanes x) {
  const Lanes magic = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Ints small = x < -87.0f;
  x = small ? spread(-87.0f) : x;
  const Lanes shifted = x * 1.44269504f + magic;
  const Lanes n = shifted - magic;
  Lanes r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  Lanes p = spread(1.98756915e-4f);
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 5.00000000e-1f;
  p = p * r * r + r + 1.0f;
  Ints bits, power;
  std::memcpy(&bits, &shifted, sizeof bits);
  power = (bits + (127 - 0x4B400000)) << 23;
  Lanes scale;
  std::memcpy(&scale, &power, sizeof scale);
  const Lanes value = p * scale;
  return small ? Lanes{} : value;
}

// Where the keys and values of one sequence and one head lie.
struct Sequence {
  const float* k;  // of the head
  const float* v;
  const int64_t* pages;  // null: packed
  int64_t page_tokens, page_floats, page_value_floats;  // from one page to the next
  int64_t stride, value_stride;
  int64_t start, prefix_start, prefix;  // packed: row of position `prefix`, row of position 0, length of the prefix

  // Position p for p in a block of 16 that is wholly in one page, or any p of a packed sequence.
  inline const float* key(int64_t p) const {
    if (pages) return k + pages[p / page_tokens] * page_floats + (p % page_tokens) * stride;
    return k + (p < prefix ? prefix_start + p : start + p - prefix) * stride;
  }
  inline const float* value(int64_t p) const {
    if (pages) return v + pages[p / page_tokens] * page_value_floats + (p % page_tokens) * value_stride;
    return v + (p < prefix ? prefix_start + p : start + p - prefix) * value_stride;
  }
};

// One query row at position `at`, seeing the positions from `first` on.
template <int kVectors>
void attend_row(const float* query, const Sequence& s, int64_t first, int64_t at, float scale, const float* sink,
                float* probs, float* out) {
  Lanes q[kVectors];
  for (int d = 0; d < kVectors; ++d) q[d] = load(query + d * kBlock);
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const float lowest = -std::numeric_limits<float>::infinity();
  const int64_t from = first / kBlock, to = at / kBlock + 1;  // blocks
  Lanes top = spread(lowest);
  for (int64_t block = from; block < to; ++block) {
    Lanes dots[kBlock];
    const int64_t begin = block * kBlock, last = std::min(at, begin + kBlock - 1);
    for (int i = 0; i < kBlock; ++i) {
      const float* key = s.key(std::min(begin + i, last));
      Lanes dot = q[0] * load(key);
      for (int d = 1; d < kVectors; ++d) dot = dot + q[d] * load(key + d * kBlock);
      dots[i] = dot;
    }
    const Ints position = lane + static_cast<int32_t>(begin - from * kBlock);
    const Ints seen = (position >= static_cast<int32_t>(first - from * kBlock)) &
                      (position <= static_cast<int32_t>(at - from * kBlock));
    const Lanes scores = seen ? sums_of(dots) * scale : spread(lowest);
    store(probs + (block - from) * kBlock, scores);
    top = scores > top ? scores : top;
    top = scores != scores ? scores : top;  // a NaN stays
  }
  float highest = sink ? *sink : lowest;
  for (int i = 0; i < kBlock; ++i) highest = (top[i] > highest || top[i] != top[i]) ? top[i] : highest;
  Lanes total = {};
  for (int64_t block = from; block < to; ++block) {
    float* at_block = probs + (block - from) * kBlock;
    const Lanes p = exp_of(load(at_block) - highest);
    store(at_block, p);
    total = total + p;
  }
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) total[i] = total[i] + total[i + half];
  float sum = total[0];
  if (sink) sum += exp_of(spread(*sink - highest))[0];
  Lanes even[kVectors] = {}, odd[kVectors] = {};
  for (int64_t block = from; block < to; ++block) {
    const float* p = probs + (block - from) * kBlock;
    const int64_t begin = block * kBlock, low = std::max(begin, first), last = std::min(at, begin + kBlock - 1);
    for (int i = 0; i < kBlock; i += 2) {
      const float* a = s.value(std::clamp(begin + i, low, last));
      const float* b = s.value(std::clamp(begin + i + 1, low, last));
      for (int d = 0; d < kVectors; ++d) {
        even[d] = even[d] + load(a + d * kBlock) * p[i];
        odd[d] = odd[d] + load(b + d * kBlock) * p[i + 1];
      }
    }
  }
  const float inverse = 1.0f / sum;
  for (int d = 0; d < kVectors; ++d) store(out + d * kBlock, (even[d] + odd[d]) * inverse);
}

using Row = void (*)(const float*, const Sequence&, int64_t, int64_t, float, const float*, float*, float*);

Row row_function(int64_t dim) {
  switch (dim / kBlock) {
    case 1: return attend_row<1>;
    case 2: return attend_row<2>;
    case 3: return attend_row<3>;
    case 4: return attend_row<4>;
    case 5: return attend_row<5>;
    case 6: return attend_row<6>;
    case 8: return attend_row<8>;
    case 16: return attend_row<16>;
    default: return nullptr;
  }
}

}  // namespace

extern "C" {

struct AttentionCall {
  const float* q;    // token t, head h at t * q_token + h * dim
  const float* k;    // packed: token t, head h at t * kv_token + h * dim; pages: (P, heads, page, dim)
  const float* v;
  float* out;        // (tokens, query heads, dim)
  const float* sinks;  // (query heads,) or null
  const int64_t* starts;        // of sequences: row of the first query
  const int64_t* query_lens;
  const int64_t* context_lens;
  const int64_t* page_table;    // (sequences, table_width) or null
  const int64_t* prefix_starts;  // packed: row of position 0 of what a sequence goes on from, or null
  int64_t sequences, heads, group, dim, q_token, k_token, v_token, table_width, page_tokens;
  int64_t window;  // 0: none
  int64_t threads;
  float scale;
};

int attend_f32(const AttentionCall* c) {
  const Row row = row_function(c->dim);
  if (!row || c->dim % kBlock) return 1;
  struct Piece {
    int64_t sequence, first, count;
  };
  std::vector<Piece> pieces;
  constexpr int64_t kQueries = 64;
  int64_t longest = 0;
  for (int64_t s = 0; s < c->sequences; ++s) {
    longest = std::max(longest, c->context_lens[s]);
    for (int64_t first = 0; first < c->query_lens[s]; first += kQueries)
      pieces.push_back({s, first, std::min(kQueries, c->query_lens[s] - first)});
  }
  const int64_t work = static_cast<int64_t>(pieces.size()) * c->heads;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min(c->threads, work)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> probs((longest / kBlock + 2) * kBlock);
#pragma omp for schedule(dynamic, 4)
    for (int64_t item = 0; item < work; ++item) {
      const Piece& piece = pieces[item / c->heads];
      const int64_t head = item % c->heads, n = piece.sequence;
      const int64_t prefix = c->context_lens[n] - c->query_lens[n];
      Sequence s;
      if (c->page_table) {
        s = {c->k + head * c->page_tokens * c->dim, c->v + head * c->page_tokens * c->dim,
             c->page_table + n * c->table_width, c->page_tokens, c->heads * c->page_tokens * c->dim,
             c->heads * c->page_tokens * c->dim, c->dim, c->dim, 0, 0, 0};
      } else {
        s = {c->k + head * c->dim, c->v + head * c->dim, nullptr, 0, 0, 0, c->k_token, c->v_token, c->starts[n],
             c->prefix_starts ? c->prefix_starts[n] : 0, prefix};
      }
      for (int64_t i = piece.first; i < piece.first + piece.count; ++i) {
        const int64_t token = c->starts[n] + i, at = prefix + i;
        const int64_t first = c->window ? std::max<int64_t>(0, at - c->window + 1) : 0;
        for (int64_t g = 0; g < c->group; ++g) {
          const int64_t h = head * c->group + g;
          row(c->q + token * c->q_token + h * c->dim, s, first, at, c->scale, c->sinks ? c->sinks + h : nullptr,
              probs.data(), c->out + (token * c->heads * c->group + h) * c->dim);
        }
      }
    }
  }
  return 0;
}
}
