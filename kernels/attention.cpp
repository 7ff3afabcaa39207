// Causal attention of single query rows to their keys: the native form of kernels/attention.py on a CPU. Arithmetic is in
// fp32; keys and values may be bf16.
//
// A row's result is a function of its own q and of the k and v at its own positions, bit for bit: every row runs the
// same instructions over the same absolute blocks of 16 positions, whatever else is in the call and on however many
// threads. Masked positions have probability 0. Sums over keys: the probabilities' in 16 lanes by
// position modulo 16, the values' in two chains by its parity. The backward makes the probabilities again, and adds up
// the gradients of a key in the order of the queries.

#include <algorithm>
#include <limits>
#include <vector>

#include "lanes.h"

namespace {

constexpr int kBlock = kLanes;  // positions

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
  const Ints even = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
  const Ints odd = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
  return __builtin_shuffle(c[0], c[1], even) + __builtin_shuffle(c[0], c[1], odd);
}

// Where the keys and values of one sequence and one head lie, position by position.
template <typename T>
struct Sequence {
  const T* const* keys;
  const T* const* values;
};

// The positions that a query row sees, in blocks of 16.
struct Range {
  int64_t first, at, from, to;  // first and last position; first block, and the one after the last
  Range(int64_t first, int64_t at) : first(first), at(at), from(first / kBlock), to(at / kBlock + 1) {}
  int64_t last(int64_t block) const { return std::min(at, block * kBlock + kBlock - 1); }
  int64_t low(int64_t block) const { return std::max(first, block * kBlock); }
};

// Products of x with the rows of a block's positions; what lies beyond [low, last] repeats its nearest row.
template <typename T, int kVectors>
inline Lanes products(const Lanes* x, const T* const* rows, int64_t begin, int64_t low, int64_t last) {
  Lanes of_row[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const T* row = rows[std::clamp(begin + i, low, last)];
    Lanes product = x[0] * load(row);
    for (int d = 1; d < kVectors; ++d) product = product + x[d] * load(row + d * kBlock);
    of_row[i] = product;
  }
  return sums_of(of_row);
}

// Unnormalised probabilities of the positions of a range, and what they add up to, the sink's share included.
template <typename T, int kVectors>
float probabilities(const float* query, const Sequence<T>& s, const Range& range, float scale, const float* sink,
                    float* probs, float* sink_prob) {
  Lanes q[kVectors];
  for (int d = 0; d < kVectors; ++d) q[d] = load(query + d * kBlock);
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const float lowest = -std::numeric_limits<float>::infinity();
  Lanes top = spread(lowest);
  for (int64_t block = range.from; block < range.to; ++block) {
    const int64_t begin = block * kBlock, low = range.low(block), last = range.last(block);
    const Ints seen = (lane >= static_cast<int32_t>(low - begin)) & (lane <= static_cast<int32_t>(last - begin));
    const Lanes scores = seen ? products<T, kVectors>(q, s.keys, begin, low, last) * scale : spread(lowest);
    store(probs + (block - range.from) * kBlock, scores);
    top = scores > top ? scores : top;
    top = scores != scores ? scores : top;  // a NaN stays
  }
  float highest = sink ? *sink : lowest;
  for (int i = 0; i < kBlock; ++i) highest = (top[i] > highest || top[i] != top[i]) ? top[i] : highest;
  Lanes total = {};
  for (int64_t block = range.from; block < range.to; ++block) {
    float* at_block = probs + (block - range.from) * kBlock;
    const Lanes p = exp_of(load(at_block) - highest);
    store(at_block, p);
    total = total + p;
  }
  *sink_prob = sink ? exp_of(spread(*sink - highest))[0] : 0.0f;
  return total_of(total) + *sink_prob;
}

template <typename T, int kVectors>
inline void add_value(Lanes* sum, const T* value, float weight) {
  for (int d = 0; d < kVectors; ++d) sum[d] = sum[d] + load(value + d * kBlock) * weight;
}

template <typename T, int kVectors>
void attend_row(const float* query, const Sequence<T>& s, const Range& range, float scale, const float* sink,
                float* probs, float* out) {
  float sink_prob;
  const float sum = probabilities<T, kVectors>(query, s, range, scale, sink, probs, &sink_prob);
  const float* p = probs - range.from * kBlock;
  Lanes chains[2][kVectors] = {};
  int64_t position = range.first;
  if (position & 1) add_value<T, kVectors>(chains[1], s.values[position], p[position]), ++position;
  for (; position < range.at; position += 2) {
    add_value<T, kVectors>(chains[0], s.values[position], p[position]);
    add_value<T, kVectors>(chains[1], s.values[position + 1], p[position + 1]);
  }
  if (position == range.at) add_value<T, kVectors>(chains[0], s.values[position], p[position]);
  const float inverse = 1.0f / sum;
  for (int d = 0; d < kVectors; ++d) store(out + d * kBlock, (chains[0][d] + chains[1][d]) * inverse);
}

// With p the probabilities, g the gradient of the output and c = sum_j p_j (g v_j): dv_j += p_j g,
// ds_j = p_j (g v_j - c) scale, dq = sum_j ds_j k_j, dk_j += ds_j q; returns the sink's -p_sink c.
template <int kVectors>
float row_gradients(const float* query, const float* grad, const Sequence<float>& s, const Range& range, float scale,
                    const float* sink, float* probs, float* slopes, float* dq, float* const* dk, float* const* dv) {
  float sink_prob;
  const float sum = probabilities<float, kVectors>(query, s, range, scale, sink, probs, &sink_prob);
  const float inverse = 1.0f / sum;
  Lanes g[kVectors], q[kVectors], to_q[kVectors] = {}, mean = {};
  for (int d = 0; d < kVectors; ++d) g[d] = load(grad + d * kBlock), q[d] = load(query + d * kBlock);
  for (int64_t block = range.from; block < range.to; ++block) {
    const int64_t begin = block * kBlock, low = range.low(block), last = range.last(block);
    float* at_block = probs + (block - range.from) * kBlock;
    const Lanes p = load(at_block) * inverse;
    const Lanes slope = products<float, kVectors>(g, s.values, begin, low, last);
    store(at_block, p);
    store(slopes + (block - range.from) * kBlock, slope);
    mean = mean + p * slope;
  }
  const float c = total_of(mean);
  for (int64_t block = range.from; block < range.to; ++block) {
    const int64_t begin = block * kBlock, low = range.low(block), last = range.last(block);
    const float* p = probs + (block - range.from) * kBlock;
    float* slope = slopes + (block - range.from) * kBlock;
    store(slope, load(p) * (load(slope) - c) * scale);
    for (int64_t position = low; position <= last; ++position) {
      const float ds = slope[position - begin], weight = p[position - begin];
      const float* key = s.keys[position];
      float *of_key = dk[position], *of_value = dv[position];
      for (int d = 0; d < kVectors; ++d) {
        to_q[d] = to_q[d] + load(key + d * kBlock) * ds;
        store(of_key + d * kBlock, load(of_key + d * kBlock) + q[d] * ds);
        store(of_value + d * kBlock, load(of_value + d * kBlock) + g[d] * weight);
      }
    }
  }
  for (int d = 0; d < kVectors; ++d) store(dq + d * kBlock, to_q[d]);
  return -sink_prob * inverse * c;
}

// The function for heads of `dim` numbers; null where there is none.
#define FOR_DIM(dim, name, ...)              \
  ((dim) == 16    ? name<__VA_ARGS__ 1>      \
   : (dim) == 32  ? name<__VA_ARGS__ 2>      \
   : (dim) == 48  ? name<__VA_ARGS__ 3>      \
   : (dim) == 64  ? name<__VA_ARGS__ 4>      \
   : (dim) == 80  ? name<__VA_ARGS__ 5>      \
   : (dim) == 96  ? name<__VA_ARGS__ 6>      \
   : (dim) == 128 ? name<__VA_ARGS__ 8>      \
   : (dim) == 256 ? name<__VA_ARGS__ 16>     \
                  : nullptr)

struct Piece {
  int64_t sequence, first, count;  // queries of one sequence
};

}  // namespace

extern "C" {

struct AttentionCall {
  const float* q;    // token t, head h at t * q_token + h * dim
  const void* k;     // packed: token t, head h at t * k_token + h * dim; pages: (P, heads, page, dim)
  const void* v;
  float* out;        // (tokens, query heads, dim)
  const float* sinks;            // (query heads,) or null
  const int64_t* starts;         // of sequences: row of the first query
  const int64_t* query_lens;
  const int64_t* context_lens;
  const int64_t* page_table;     // (sequences, table_width) or null
  const int64_t* prefix_starts;  // packed: row of position 0 of what a sequence goes on from, or null
  const float* grad;             // the backward's: of out
  float* dq;                     // (tokens, query heads, dim)
  float* dk;                     // (tokens, heads, dim), zeros at first
  float* dv;
  float* dsinks;                 // (tokens, query heads)
  int64_t sequences, heads, group, dim, q_token, k_token, v_token, table_width, page_tokens;
  int64_t window;  // 0: none
  int64_t threads;
  int64_t is_bf16;  // k and v
  float scale;
};
}

namespace {

// Where position p of a packed sequence lies.
int64_t row_of(const AttentionCall& c, int64_t n, int64_t p) {
  const int64_t prefix = c.context_lens[n] - c.query_lens[n];
  return p < prefix ? c.prefix_starts[n] + p : c.starts[n] + p - prefix;
}

// Calls `run` with each page of a sequence: where its part of one head begins, and its first position and the one after its
// last.
template <typename Function>
void each_page(const AttentionCall& c, int64_t n, int64_t head, Function run) {
  const int64_t* pages = c.page_table + n * c.table_width;
  for (int64_t page = 0; page * c.page_tokens < c.context_lens[n]; ++page) {
    const int64_t begin = page * c.page_tokens;
    run((pages[page] * c.heads + head) * c.page_tokens * c.dim, begin,
        std::min(c.context_lens[n], begin + c.page_tokens));
  }
}

// Asks for the keys and values of one sequence and head, so that they are near when their turn comes: pages lie anywhere.
template <typename T>
void fetch(const AttentionCall& c, int64_t n, int64_t head) {
  constexpr int64_t kLine = 64 / sizeof(T), kMost = 4096;  // of a page: what follows is found by the machine itself
  const T *k = static_cast<const T*>(c.k), *v = static_cast<const T*>(c.v);
  each_page(c, n, head, [&](int64_t at, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < std::min((end - begin) * c.dim, kMost); i += kLine) {
      __builtin_prefetch(k + at + i);
      __builtin_prefetch(v + at + i);
    }
  });
}

// Addresses of a sequence's positions under one head; made once for all its queries.
template <typename T>
struct Addresses {
  std::vector<const T*> keys, values;
  explicit Addresses(int64_t longest) : keys(longest), values(longest) {}

  Sequence<T> of(const AttentionCall& c, int64_t n, int64_t head) {
    const T *k = static_cast<const T*>(c.k), *v = static_cast<const T*>(c.v);
    const int64_t length = c.context_lens[n];
    if (c.page_table) {
      each_page(c, n, head, [&](int64_t at, int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          keys[p] = k + at + (p - begin) * c.dim;
          values[p] = v + at + (p - begin) * c.dim;
        }
      });
    } else {
      for (int64_t p = 0; p < length; ++p) {
        keys[p] = k + row_of(c, n, p) * c.k_token + head * c.dim;
        values[p] = v + row_of(c, n, p) * c.v_token + head * c.dim;
      }
    }
    return {keys.data(), values.data()};
  }
};

Range range_of(const AttentionCall& c, int64_t n, int64_t query) {
  const int64_t at = c.context_lens[n] - c.query_lens[n] + query;
  return {c.window ? std::max<int64_t>(0, at - c.window + 1) : 0, at};
}

int64_t longest_of(const AttentionCall& c) {
  return (*std::max_element(c.context_lens, c.context_lens + c.sequences) / kBlock + 2) * kBlock;
}

template <typename T, typename Function>
int attend(const AttentionCall& c, Function row) {
  if (!row) return 1;
  constexpr int64_t kQueries = 64;  // of one piece, which a thread takes at once
  std::vector<Piece> pieces;
  for (int64_t n = 0; n < c.sequences; ++n)
    for (int64_t first = 0; first < c.query_lens[n]; first += kQueries)
      pieces.push_back({n, first, std::min(kQueries, c.query_lens[n] - first)});
  const int64_t work = static_cast<int64_t>(pieces.size()) * c.heads, longest = longest_of(c);
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min(c.threads, work)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> probs(longest);
    Addresses<T> addresses(longest);
#pragma omp for schedule(dynamic, 4)
    for (int64_t item = 0; item < work; ++item) {
      const Piece& piece = pieces[item / c.heads];
      const int64_t head = item % c.heads, n = piece.sequence;
      if (c.page_table && item + 1 < work) fetch<T>(c, pieces[(item + 1) / c.heads].sequence, (item + 1) % c.heads);
      const Sequence<T> s = addresses.of(c, n, head);
      for (int64_t i = piece.first; i < piece.first + piece.count; ++i) {
        const int64_t token = c.starts[n] + i;
        const Range range = range_of(c, n, i);
        for (int64_t h = head * c.group; h < (head + 1) * c.group; ++h)
          row(c.q + token * c.q_token + h * c.dim, s, range, c.scale, c.sinks ? c.sinks + h : nullptr, probs.data(),
              c.out + (token * c.heads * c.group + h) * c.dim);
      }
    }
  }
  return 0;
}

}  // namespace

extern "C" {

int attention_forward(const AttentionCall* c) {
  if (c->is_bf16) return attend<Bf16>(*c, FOR_DIM(c->dim, attend_row, Bf16, ));
  return attend<float>(*c, FOR_DIM(c->dim, attend_row, float, ));
}

// Packed fp32 only. A sequence that others go on from has keys that several of them change: then one thread has a head.
int attention_backward(const AttentionCall* c) {
  const auto row = FOR_DIM(c->dim, row_gradients, );
  if (!row || c->is_bf16 || c->page_table) return 1;
  const int64_t parts = c->prefix_starts ? 1 : c->sequences, work = parts * c->heads, longest = longest_of(*c);
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min(c->threads, work)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> probs(longest), slopes(longest);
    std::vector<float*> dk(longest), dv(longest);
    Addresses<float> addresses(longest);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < work; ++item) {
      const int64_t head = item % c->heads, part = item / c->heads;
      for (int64_t n = c->prefix_starts ? 0 : part; n < (c->prefix_starts ? c->sequences : part + 1); ++n) {
        const Sequence<float> s = addresses.of(*c, n, head);
        for (int64_t p = 0; p < c->context_lens[n]; ++p) {
          const int64_t place = (row_of(*c, n, p) * c->heads + head) * c->dim;
          dk[p] = c->dk + place;
          dv[p] = c->dv + place;
        }
        for (int64_t i = 0; i < c->query_lens[n]; ++i) {
          const int64_t token = c->starts[n] + i;
          const Range range = range_of(*c, n, i);
          for (int64_t h = head * c->group; h < (head + 1) * c->group; ++h) {
            const int64_t place = token * c->heads * c->group + h;
            const float sink = row(c->q + token * c->q_token + h * c->dim, c->grad + place * c->dim, s, range, c->scale,
                                   c->sinks ? c->sinks + h : nullptr, probs.data(), slopes.data(),
                                   c->dq + place * c->dim, dk.data(), dv.data());
            if (c->dsinks) c->dsinks[place] = sink;
          }
        }
      }
    }
  }
  return 0;
}

// Rows of `bytes` bytes: token t, head h from t * from_token + h * bytes to row rows[t * heads + h].
void write_rows(const char* from, const int64_t* rows, char* to, int64_t tokens, int64_t heads, int64_t from_token,
                int64_t bytes) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < heads; ++h)
      std::memcpy(to + rows[t * heads + h] * bytes, from + t * from_token + h * bytes, bytes);
}
}
