// Causal attention of single query rows to their keys: the native form of kernels/attention.py on a CPU. Arithmetic is
// in fp32; keys and values may be bf16, or in pages int8 or fp8 (e4m3) with a scale for each position and head.
//
// A row's result is a function of its own q and of the k and v at its own positions, bit for bit: every row runs the
// same instructions over the same absolute blocks of 16 positions, whatever else is in the call and on however many
// threads; rows that are worked on together share loads, not sums. Masked positions have probability 0. Sums over keys:
// the probabilities' in 16 lanes by position modulo 16, the values' in two chains by its parity. The backward makes the
// probabilities again, and adds up the gradients of a key in the order of the queries.

#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#include "builtin.h"
#include "lanes.h"

namespace {

constexpr int kBlock = kLanes;         // positions
constexpr int kMostRows = 256;         // worked on together
constexpr int kMostTogether = 64;      // of several sequences
constexpr int kMostNumbers = 1 << 16;  // of a table, unless few rows have more

// Lane i of the result is the sum of all lanes of rows[i], added up as a tree.
inline Lanes sums_of(const Lanes* rows) {
  Lanes a[8], b[4], c[2];
  const Ints low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  const Ints high8 = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
  for (int i = 0; i < 8; ++i)
    a[i] = __builtin_shuffle(rows[i], rows[i + 8], low8) + __builtin_shuffle(rows[i], rows[i + 8], high8);
  const Ints low4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
  const Ints high4 = {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31};
  for (int i = 0; i < 4; ++i) b[i] = __builtin_shuffle(a[i], a[i + 4], low4) + __builtin_shuffle(a[i], a[i + 4], high4);
  const Ints low2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  const Ints high2 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  for (int i = 0; i < 2; ++i) c[i] = __builtin_shuffle(b[i], b[i + 2], low2) + __builtin_shuffle(b[i], b[i + 2], high2);
  const Ints even = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
  const Ints odd = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
  return __builtin_shuffle(c[0], c[1], even) + __builtin_shuffle(c[0], c[1], odd);
}

struct Int8 {
  int8_t bits;
};

struct Fp8 {  // e4m3 without infinities
  uint8_t bits;
};

// GCC widens bytes one by one unless they become halves first.
template <typename Half, typename Bytes>
inline Ints widened(Bytes bytes) {
  return __builtin_convertvector(__builtin_convertvector(bytes, typename Vector<Half, kLanes>::Type), Ints);
}

// Sixteen numbers as they are, each exact in fp32.
inline Lanes load(const Int8* from) {
  Vector<int8_t, kLanes>::Type bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(widened<int16_t>(bytes), Lanes);
}

inline Lanes load(const Fp8* from) {
  Vector<uint8_t, kLanes>::Type bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  const Ints words = widened<uint16_t>(bytes);
  const Ints normal = ((words & 0x7F) << 20) + (120 << 23);  // the exponent's bias is 7 there, 127 here
  Lanes x;
  std::memcpy(&x, &normal, sizeof x);
  x = (words & 0x78) == 0 ? __builtin_convertvector(words & 7, Lanes) * 0x1p-9f : x;
  return (words & 0x80) != 0 ? -x : x;
}

// Rounded to the nearest, ties to even; |x| is at most the format's largest number.
inline Ints nearest(Lanes x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_rintf(x[i]);  // an addition could be fused with the product before it
  return __builtin_convertvector(x, Ints);
}

inline void store(Int8* to, Lanes x) {
  const auto bytes = __builtin_convertvector(nearest(x), Vector<int8_t, kLanes>::Type);
  std::memcpy(to, &bytes, sizeof bytes);
}

inline void store(Fp8* to, Lanes x) {
  Ints bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Ints sign = (bits >> 24) & 0x80;
  bits = bits & 0x7FFFFFFF;
  Lanes size;
  std::memcpy(&size, &bits, sizeof size);
  const Ints normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3);
  const Ints code = size < 0x1p-6f ? nearest(size * 0x1p9f) : normal;
  const auto bytes = __builtin_convertvector(code | sign, Vector<uint8_t, kLanes>::Type);
  std::memcpy(to, &bytes, sizeof bytes);
}

// Numbers that are to be multiplied by a scale.
template <typename T>
struct Scaled {
  const T* at;
  float scale;
  Scaled operator+(int64_t n) const { return {at + n, scale}; }
};

template <typename T>
inline Lanes load(Scaled<T> from) {
  return load(from.at) * from.scale;
}

// What a `P`, a pointer or `Scaled`, points to, and how one is made.
template <typename P>
struct Place;

template <typename T>
struct Place<const T*> {
  typedef T Number;
  static const T* at(const void* numbers, const float*, int64_t number, int64_t) {
    return static_cast<const T*>(numbers) + number;
  }
};

template <typename T>
struct Place<Scaled<T>> {
  typedef T Number;
  static Scaled<T> at(const void* numbers, const float* scales, int64_t number, int64_t row) {
    return {static_cast<const T*>(numbers) + number, scales[row]};
  }
};

// Where the keys and values of one sequence and one head lie, position by position.
template <typename P>
struct Sequence {
  const P* keys;
  const P* values;
};

// The positions that a query row sees, in blocks of 16.
struct Range {
  int64_t first, at, from, to;  // first and last position; first block, and the one after the last
  Range(int64_t first, int64_t at) : first(first), at(at), from(first / kBlock), to(at / kBlock + 1) {}
  int64_t last(int64_t block) const { return std::min(at, block * kBlock + kBlock - 1); }
  int64_t low(int64_t block) const { return std::max(first, block * kBlock); }
  // Of a block's lanes, those of positions that are seen.
  Ints seen(int64_t block) const {
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int64_t begin = block * kBlock;
    return (lane >= static_cast<int32_t>(low(block) - begin)) & (lane <= static_cast<int32_t>(last(block) - begin));
  }
};

// A query row; the last three are the backward's.
struct Row {
  Range range;
  const float* query;
  const float* sink;  // or null
  float* out;
  const float* grad;
  float* dq;
  float* dsink;  // or null
  int64_t sequence;  // of those that are worked on together, which one's
};

// Rows of one head that are worked on together, later ones further on in their sequence. None's numbers depend on the
// others.
typedef std::vector<Row> Rows;

// A number for each row and each position of the blocks that the rows see.
struct Table {
  std::vector<float> numbers;
  int64_t from = 0, width = 0;

  void fit(const Rows& rows) {
    from = rows.front().range.from;
    int64_t to = 0;
    for (const Row& row : rows) to = std::max(to, row.range.to);
    width = (to - from) * kBlock;
    const size_t size = rows.size() * width;
    if (numbers.size() < size) numbers.resize(size);
  }
  float* of(int64_t row) { return numbers.data() + row * width - from * kBlock; }  // [position]
};

struct Work {
  Rows rows;
  Table probs, slopes;
};

// Calls `run` with each block, and the first row that sees it and the one after the last.
template <typename Function>
inline void each_block(const Rows& rows, Function run) {
  size_t first = 0, end = 0;
  for (int64_t block = rows.front().range.from; block < rows.back().range.to; ++block) {
    while (end < rows.size() && rows[end].range.from <= block) ++end;
    while (rows[first].range.to <= block) ++first;
    run(block, first, end);
  }
}

// Products of x with the rows of a block's positions; what lies beyond [low, last] repeats its nearest row.
template <typename P, int kVectors>
inline Lanes products(const Lanes* x, const P* at, int64_t begin, int64_t low, int64_t last) {
  Lanes of_row[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const P row = at[std::clamp(begin + i, low, last)];
    Lanes product = {};  // every term is added in one rounding, the first to 0
    for (int d = 0; d < kVectors; ++d) product = product + x[d] * load(row + d * kBlock);
    of_row[i] = product;
  }
  return sums_of(of_row);
}

// Exchanges lane i | kStep of rows[i] with lane i of rows[i | kStep], and so for all.
template <int kStep>
inline void exchange(Lanes* rows) {
  Ints low, high;
  for (int i = 0; i < kBlock; ++i) {
    low[i] = i & kStep ? kBlock + i - kStep : i;
    high[i] = i & kStep ? kBlock + i : i + kStep;
  }
  for (int i = 0; i < kBlock; ++i)
    if (!(i & kStep)) {
      const Lanes a = rows[i], b = rows[i + kStep];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + kStep] = __builtin_shuffle(a, b, high);
    }
}

// columns[d], lane i: number d of the row of position begin + i.
template <typename P, int kVectors>
inline void columns_of(const P* at, int64_t begin, int64_t low, int64_t last, Lanes* columns) {
  for (int d = 0; d < kVectors; ++d) {
    Lanes* rows = columns + d * kBlock;
    for (int i = 0; i < kBlock; ++i) rows[i] = load(at[std::clamp(begin + i, low, last)] + d * kBlock);
    exchange<8>(rows);
    exchange<4>(rows);
    exchange<2>(rows);
    exchange<1>(rows);
  }
}

// `products` of kRows rows, with the positions' numbers in columns: the same additions in the same order. kFrom is what
// is left to add: lanes i, i + kFrom, ... of a row's products.
template <int kVectors, int kRows, int kFrom>
__attribute__((always_inline)) inline void products_of(const float* const* x, const Lanes* columns, int i,
                                                       Lanes* sums) {
  Lanes other[kRows];
  if constexpr (kFrom == kBlock) {
    for (int r = 0; r < kRows; ++r) sums[r] = Lanes{};
    for (int d = i; d < kVectors * kBlock; d += kBlock) {
      const Lanes column = columns[d];
      for (int r = 0; r < kRows; ++r) sums[r] = sums[r] + column * x[r][d];
    }
  } else {
    products_of<kVectors, kRows, kFrom * 2>(x, columns, i, sums);
    products_of<kVectors, kRows, kFrom * 2>(x, columns, i + kFrom, other);
    for (int r = 0; r < kRows; ++r) sums[r] = sums[r] + other[r];
  }
}

// Products of one row's query with what lies at the positions of its blocks from `from` on.
template <typename P, int kVectors>
inline void products_alone(const Row& row, const float* Row::* x, const P* at, int64_t from, float* out) {
  Lanes own[kVectors];
  for (int d = 0; d < kVectors; ++d) own[d] = load(row.*x + d * kBlock);
  for (int64_t block = from; block < row.range.to; ++block)
    store(out + block * kBlock,
          products<P, kVectors>(own, at, block * kBlock, row.range.low(block), row.range.last(block)));
}

// Products of rows first .. end with the columns of one block, to `out` of each.
template <int kVectors>
inline void products_beside(const Rows& rows, const float* Row::* x, const Lanes* columns, size_t first, size_t end,
                            int64_t begin, Table& out) {
  constexpr int kRows = 4;
  size_t r = first;
  Lanes sums[kRows];
  for (; r + kRows <= end; r += kRows) {
    const float* own[kRows];
    for (int i = 0; i < kRows; ++i) own[i] = rows[r + i].*x;
    products_of<kVectors, kRows, 1>(own, columns, 0, sums);
    for (int i = 0; i < kRows; ++i) store(out.of(r + i) + begin, sums[i]);
  }
  for (; r < end; ++r) {
    const float* own = rows[r].*x;
    products_of<kVectors, 1, 1>(&own, columns, 0, sums);
    store(out.of(r) + begin, sums[0]);
  }
}

// Products of every row's x (its query or its grad) with what lies at the positions of the blocks that it sees.
template <typename P, int kVectors>
void all_products(const Rows& rows, const float* Row::* x, const P* at, Table& out) {
  constexpr size_t kWorthColumns = 8;  // rows
  if (rows.size() < kWorthColumns) {
    for (size_t r = 0; r < rows.size(); ++r)
      products_alone<P, kVectors>(rows[r], x, at, rows[r].range.from, out.of(r));
    return;
  }
  each_block(rows, [&](int64_t block, size_t first, size_t end) {
    const int64_t begin = block * kBlock;
    Lanes columns[kVectors * kBlock];
    columns_of<P, kVectors>(at, begin, rows[first].range.low(block), rows[end - 1].range.last(block), columns);
    products_beside<kVectors>(rows, x, columns, first, end, begin, out);
  });
}

// Turns a row's products into unnormalised probabilities and returns what they add up to, the sink's share included.
float probabilities(const Row& row, float scale, float* probs, float* sink_prob) {
  const float lowest = -std::numeric_limits<float>::infinity();
  Lanes top = spread(lowest);
  for (int64_t block = row.range.from; block < row.range.to; ++block) {
    float* here = probs + block * kBlock;
    const Lanes scores = row.range.seen(block) ? load(here) * scale : spread(lowest);
    store(here, scores);
    top = scores > top ? scores : top;
    top = scores != scores ? scores : top;  // a NaN stays
  }
  float highest = row.sink ? *row.sink : lowest;
  for (int i = 0; i < kBlock; ++i) highest = (top[i] > highest || top[i] != top[i]) ? top[i] : highest;
  Lanes total = {};
  for (int64_t block = row.range.from; block < row.range.to; ++block) {
    float* here = probs + block * kBlock;
    const Lanes p = exp_of(load(here) - highest);
    store(here, p);
    total = total + p;
  }
  *sink_prob = row.sink ? exp_of(spread(*row.sink - highest))[0] : 0.0f;
  return total_of(total) + *sink_prob;
}

// chains[position & 1][r] += weights[position] at[position] for the positions of one row in [from, to).
template <typename P, int kVectors, int kRows>
inline void add_alone(const P* at, const float* weights, int64_t from, int64_t to, int r,
                      Lanes (*chains)[kRows][kVectors]) {
  for (int64_t position = from; position < to; ++position)
    for (int d = 0; d < kVectors; ++d) {
      Lanes& sum = chains[position & 1][r][d];
      sum = sum + load(at[position] + d * kBlock) * weights[position];
    }
}

// sums[r] = sum over positions of weights[r][position] at[position] for kRows rows from `row` on, even and odd
// positions apart. Positions that all of them see are gone through together.
template <typename P, int kVectors, int kRows>
inline void weighted_sums(const Rows& rows, size_t row, Table& weights, const P* at, Lanes (*sums)[kVectors]) {
  const int64_t from = rows[row + kRows - 1].range.first, to = std::max(from, rows[row].range.at + 1);
  Lanes edges[2][kRows][kVectors] = {};
  const float* own[kRows];
  for (int r = 0; r < kRows; ++r) {
    own[r] = weights.of(row + r);
    const Range& range = rows[row + r].range;
    add_alone<P, kVectors, kRows>(at, own[r], range.first, std::min(from, range.at + 1), r, edges);
  }
  Lanes chains[2][kRows][kVectors];
  std::memcpy(chains, edges, sizeof chains);
  const auto add = [&](int odd, int64_t position) {
    for (int d = 0; d < kVectors; ++d) {
      const Lanes value = load(at[position] + d * kBlock);
      for (int r = 0; r < kRows; ++r) chains[odd][r][d] = chains[odd][r][d] + value * own[r][position];
    }
  };
  int64_t position = from;
  if (position < to && position & 1) add(1, position++);
  for (; position + 1 < to; position += 2) {
    add(0, position);
    add(1, position + 1);
  }
  if (position < to) add(0, position);
  std::memcpy(edges, chains, sizeof chains);
  for (int r = 0; r < kRows; ++r) {
    add_alone<P, kVectors, kRows>(at, own[r], std::max(to, rows[row + r].range.first), rows[row + r].range.at + 1, r,
                                  edges);
    for (int d = 0; d < kVectors; ++d) sums[r][d] = edges[0][r][d] + edges[1][r][d];
  }
}

// Rows whose sums the registers hold.
template <int kVectors>
constexpr int kMostSums = kVectors <= 2 ? 4 : kVectors <= 6 ? 2 : 1;

// Calls `done` with each row's number and its weighted sum.
template <typename P, int kVectors, typename Function>
void each_weighted_sum(const Rows& rows, Table& weights, const P* at, Function done) {
  constexpr int kMost = kMostSums<kVectors>;
  Lanes sums[kMost][kVectors];
  size_t row = 0;
  for (; row + kMost <= rows.size(); row += kMost) {
    weighted_sums<P, kVectors, kMost>(rows, row, weights, at, sums);
    for (int r = 0; r < kMost; ++r) done(row + r, sums[r]);
  }
  for (; row < rows.size(); ++row) {
    weighted_sums<P, kVectors, 1>(rows, row, weights, at, sums);
    done(row, sums[0]);
  }
}

// `all_products` of rows of several sequences whose first `shared` blocks are the same memory, which all of them see.
template <typename P, int kVectors>
void shared_products(const Rows& rows, const Sequence<P>* s, int64_t shared, Table& out) {
  for (int64_t block = 0; block < shared; ++block) {
    const int64_t begin = block * kBlock;
    Lanes columns[kVectors * kBlock];
    columns_of<P, kVectors>(s[0].keys, begin, begin, begin + kBlock - 1, columns);
    products_beside<kVectors>(rows, &Row::query, columns, 0, rows.size(), begin, out);
  }
  for (size_t r = 0; r < rows.size(); ++r)
    products_alone<P, kVectors>(rows[r], &Row::query, s[rows[r].sequence].keys, shared, out.of(r));
}

// `weighted_sums` of such rows: the shared positions together, then each one's own.
template <typename P, int kVectors, int kRows>
inline void shared_sums(const Rows& rows, size_t row, Table& weights, const Sequence<P>* s, int64_t shared,
                        Lanes (*sums)[kVectors]) {
  Lanes chains[2][kRows][kVectors] = {};
  const float* own[kRows];
  for (int r = 0; r < kRows; ++r) own[r] = weights.of(row + r);
  const P* at = s[0].values;
  for (int64_t position = 0; position < shared * kBlock; position += 2)
    for (int odd = 0; odd < 2; ++odd)
      for (int d = 0; d < kVectors; ++d) {
        const Lanes value = load(at[position + odd] + d * kBlock);
        for (int r = 0; r < kRows; ++r) chains[odd][r][d] = chains[odd][r][d] + value * own[r][position + odd];
      }
  Lanes edges[2][kRows][kVectors];
  std::memcpy(edges, chains, sizeof chains);
  for (int r = 0; r < kRows; ++r) {
    const Row& of = rows[row + r];
    add_alone<P, kVectors, kRows>(s[of.sequence].values, own[r], shared * kBlock, of.range.at + 1, r, edges);
    for (int d = 0; d < kVectors; ++d) sums[r][d] = edges[0][r][d] + edges[1][r][d];
  }
}

template <typename P, int kVectors>
void attend_rows(Work& work, const Sequence<P>* s, int64_t shared, float scale) {
  Rows& rows = work.rows;
  work.probs.fit(rows);
  if (shared)
    shared_products<P, kVectors>(rows, s, shared, work.probs);
  else
    all_products<P, kVectors>(rows, &Row::query, s[0].keys, work.probs);
  float inverse[kMostRows], sink_prob;
  for (size_t r = 0; r < rows.size(); ++r)
    inverse[r] = 1.0f / probabilities(rows[r], scale, work.probs.of(r), &sink_prob);
  const auto done = [&](size_t r, const Lanes* sum) {
    for (int d = 0; d < kVectors; ++d) store(rows[r].out + d * kBlock, sum[d] * inverse[r]);
  };
  if (!shared) return each_weighted_sum<P, kVectors>(rows, work.probs, s[0].values, done);
  constexpr int kMost = kMostSums<kVectors>;
  Lanes sums[kMost][kVectors];
  size_t row = 0;
  for (; row + kMost <= rows.size(); row += kMost) {
    shared_sums<P, kVectors, kMost>(rows, row, work.probs, s, shared, sums);
    for (int r = 0; r < kMost; ++r) done(row + r, sums[r]);
  }
  for (; row < rows.size(); ++row) {
    shared_sums<P, kVectors, 1>(rows, row, work.probs, s, shared, sums);
    done(row, sums[0]);
  }
}

// to[position] += sum over rows of weights[row][position] x(row).
template <int kVectors>
void add_weighted(const Rows& rows, const float* Row::* x, Table& weights, float* const* to) {
  constexpr int kPositions = kVectors <= 4 ? 4 : kVectors <= 8 ? 2 : 1;  // whose sums the registers hold
  each_block(rows, [&](int64_t block, size_t first, size_t end) {
    const int64_t low = rows[first].range.low(block), last = rows[end - 1].range.last(block);
    for (int64_t begin = block * kBlock; begin <= last; begin += kPositions) {
      Lanes sums[kPositions][kVectors] = {};
      for (size_t r = first; r < end; ++r) {
        const float* weight = weights.of(r) + begin;
        for (int d = 0; d < kVectors; ++d) {
          const Lanes own = load(rows[r].*x + d * kBlock);
          for (int i = 0; i < kPositions; ++i) sums[i][d] = sums[i][d] + own * weight[i];
        }
      }
      for (int i = 0; i < kPositions; ++i)
        if (begin + i >= low && begin + i <= last)
          for (int d = 0; d < kVectors; ++d) {
            float* place = to[begin + i] + d * kBlock;
            store(place, load(place) + sums[i][d]);
          }
    }
  });
}

// With p the probabilities, g the gradient of the output and c = sum_j p_j (g v_j): dv_j += p_j g,
// ds_j = p_j (g v_j - c) scale, dq = sum_j ds_j k_j, dk_j += ds_j q; the sink's is -p_sink c.
template <int kVectors>
void rows_gradients(Work& work, const Sequence<const float*>& s, float scale, float* const* dk, float* const* dv) {
  Rows& rows = work.rows;
  work.probs.fit(rows);
  work.slopes.fit(rows);
  all_products<const float*, kVectors>(rows, &Row::query, s.keys, work.probs);
  all_products<const float*, kVectors>(rows, &Row::grad, s.values, work.slopes);
  for (size_t r = 0; r < rows.size(); ++r) {
    const Range& range = rows[r].range;
    float *probs = work.probs.of(r), *slopes = work.slopes.of(r), sink_prob;
    const float inverse = 1.0f / probabilities(rows[r], scale, probs, &sink_prob);
    Lanes mean = {};
    for (int64_t block = range.from; block < range.to; ++block) {
      const Lanes p = load(probs + block * kBlock) * inverse;
      const Lanes slope = range.seen(block) ? load(slopes + block * kBlock) : Lanes{};
      store(probs + block * kBlock, p);
      store(slopes + block * kBlock, slope);
      mean = mean + p * slope;
    }
    const float c = total_of(mean);
    for (int64_t block = range.from; block < range.to; ++block) {
      float* slope = slopes + block * kBlock;
      store(slope, load(probs + block * kBlock) * (load(slope) - c) * scale);
    }
    if (rows[r].dsink) *rows[r].dsink = -sink_prob * inverse * c;
  }
  add_weighted<kVectors>(rows, &Row::grad, work.probs, dv);
  add_weighted<kVectors>(rows, &Row::query, work.slopes, dk);
  each_weighted_sum<const float*, kVectors>(rows, work.slopes, s.keys, [&](size_t r, const Lanes* sum) {
    for (int d = 0; d < kVectors; ++d) store(rows[r].dq + d * kBlock, sum[d]);
  });
}

// The function for heads of `dim` numbers; null where there is none.
#define FOR_DIM(dim, name, ...)          \
  ((dim) == 16    ? name<__VA_ARGS__ 1>  \
   : (dim) == 32  ? name<__VA_ARGS__ 2>  \
   : (dim) == 48  ? name<__VA_ARGS__ 3>  \
   : (dim) == 64  ? name<__VA_ARGS__ 4>  \
   : (dim) == 80  ? name<__VA_ARGS__ 5>  \
   : (dim) == 96  ? name<__VA_ARGS__ 6>  \
   : (dim) == 112 ? name<__VA_ARGS__ 7>  \
   : (dim) == 128 ? name<__VA_ARGS__ 8>  \
   : (dim) == 160 ? name<__VA_ARGS__ 10> \
   : (dim) == 192 ? name<__VA_ARGS__ 12> \
   : (dim) == 256 ? name<__VA_ARGS__ 16> \
                  : nullptr)

struct Piece {
  int64_t sequence, first, count;   // queries of one sequence
  int64_t sequences = 1, shared = 0;  // or the only queries of so many, whose first blocks are the same pages
};

// Where position p of a packed sequence lies.
int64_t row_of(const AttentionCall& c, int64_t n, int64_t p) {
  const int64_t prefix = c.context_lens[n] - c.query_lens[n];
  return p < prefix ? c.prefix_starts[n] + p : c.starts[n] + p - prefix;
}

// Calls `run` with each page of a sequence: the row where its part of one head begins, and its first position and the
// one after its last.
template <typename Function>
void each_page(const AttentionCall& c, int64_t n, int64_t head, Function run) {
  const int64_t* pages = c.page_table + n * c.table_width;
  for (int64_t page = 0; page * c.page_tokens < c.context_lens[n]; ++page) {
    const int64_t begin = page * c.page_tokens;
    run((pages[page] * c.heads + head) * c.page_tokens, begin, std::min(c.context_lens[n], begin + c.page_tokens));
  }
}

// Asks for the keys and values of one sequence and head from a position on, so that they are near when their turn comes:
// pages lie anywhere.
template <typename T>
void fetch(const AttentionCall& c, int64_t n, int64_t head, int64_t from) {
  constexpr int64_t kLine = 64 / sizeof(T), kMost = 4096;  // of a page: what follows is found by the machine itself
  const T *k = static_cast<const T*>(c.k), *v = static_cast<const T*>(c.v);
  each_page(c, n, head, [&](int64_t row, int64_t begin, int64_t end) {
    if (end <= from) return;
    for (int64_t i = 0; i < std::min((end - begin) * c.dim, kMost); i += kLine) {
      __builtin_prefetch(k + row * c.dim + i);
      __builtin_prefetch(v + row * c.dim + i);
    }
  });
}

// Places of a sequence's positions under one head; made once for all its queries.
template <typename P>
struct Places {
  std::vector<P> keys, values;
  explicit Places(int64_t longest) : keys(longest), values(longest) {}

  Sequence<P> of(const AttentionCall& c, int64_t n, int64_t head, int64_t from = 0) {
    const int64_t length = c.context_lens[n];
    if (c.page_table) {
      each_page(c, n, head, [&](int64_t row, int64_t begin, int64_t end) {
        if (end <= from) return;
        for (int64_t p = begin; p < end; ++p, ++row) {
          keys[p] = Place<P>::at(c.k, c.k_scales, row * c.dim, row);
          values[p] = Place<P>::at(c.v, c.v_scales, row * c.dim, row);
        }
      });
    } else {
      for (int64_t p = 0; p < length; ++p) {
        keys[p] = Place<P>::at(c.k, nullptr, row_of(c, n, p) * c.k_token + head * c.dim, 0);
        values[p] = Place<P>::at(c.v, nullptr, row_of(c, n, p) * c.v_token + head * c.dim, 0);
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

// Queries of one sequence that are worked on together.
std::vector<Piece> pieces_of(const AttentionCall& c, int64_t n) {
  const int64_t span = std::min(c.context_lens[n], c.window ? c.window : c.context_lens[n]) + 2 * kBlock;
  const int64_t most = std::max<int64_t>(1, kMostRows / c.group);
  const int64_t size = std::clamp<int64_t>(kMostNumbers / (span * c.group), std::min<int64_t>(4, most), most);
  std::vector<Piece> pieces;
  for (int64_t first = 0; first < c.query_lens[n]; first += size)
    pieces.push_back({n, first, std::min(size, c.query_lens[n] - first)});
  return pieces;
}

// Pages that two sequences begin with, both beyond their last position excluded.
int64_t pages_in_common(const AttentionCall& c, int64_t n, int64_t m) {
  const int64_t *a = c.page_table + n * c.table_width, *b = c.page_table + m * c.table_width;
  const int64_t most = std::min(c.context_lens[n], c.context_lens[m]) / c.page_tokens;
  int64_t pages = 0;
  while (pages < most && a[pages] == b[pages]) ++pages;
  return pages;
}

// The decoding sequences from n on that begin with the same pages, as the samples of a group do: one piece, in which these
// are read once.
Piece group_of(const AttentionCall& c, int64_t n) {
  Piece piece{n, 0, c.query_lens[n]};
  const int64_t most = std::max<int64_t>(1, kMostTogether / c.group);
  if (!c.page_table || c.window || c.page_tokens % kBlock) return piece;
  int64_t pages = 0;
  for (int64_t m = n + 1; m < c.sequences && m < n + most && c.query_lens[n] == 1 && c.query_lens[m] == 1; ++m) {
    const int64_t common = pages_in_common(c, n, m);
    if (!common || (pages && common < pages)) break;
    pages = pages ? pages : common;
    ++piece.sequences;
  }
  piece.shared = pages * (c.page_tokens / kBlock);
  return piece;
}

// The rows of a piece under one head of k and v.
void rows_of(const AttentionCall& c, const Piece& piece, int64_t head, Rows& rows) {
  rows.clear();
  for (int64_t n = 0; n < piece.sequences; ++n)
    for (int64_t i = piece.first; i < piece.first + piece.count; ++i) {
      const int64_t token = c.starts[piece.sequence + n] + i;
      const Range range = range_of(c, piece.sequence + n, i);
      for (int64_t h = head * c.group; h < (head + 1) * c.group; ++h) {
        const int64_t place = token * c.heads * c.group + h;
        rows.push_back({range, c.q + token * c.q_token + h * c.dim, c.sinks ? c.sinks + h : nullptr,
                        c.out + place * c.dim, c.grad + place * c.dim, c.dq + place * c.dim,
                        c.dsinks ? c.dsinks + place : nullptr, n});
      }
    }
}

// What a thread has of its own: made where its exceptions are caught.
template <typename P>
struct Thread {
  Work work;
  std::vector<Places<P>> places;  // of sequences that are worked on together
  std::vector<Sequence<P>> sequences;
  Thread(int64_t longest, int64_t together) : places(together, Places<P>(longest)), sequences(together) {}
};

template <typename P, typename Function>
int attend(const AttentionCall& c, Function attend_them) {
  if (!attend_them || c.group > kMostRows) return kMissing;
  if (!c.sequences) return kDone;
  std::vector<Piece> pieces;
  int64_t together = 1;
  for (int64_t n = 0; n < c.sequences; ++n) {
    const Piece group = group_of(c, n);
    if (group.sequences > 1) {
      pieces.push_back(group);
      together = std::max(together, group.sequences);
      n += group.sequences - 1;
    } else {
      for (const Piece& piece : pieces_of(c, n)) pieces.push_back(piece);
    }
  }
  const int64_t work = static_cast<int64_t>(pieces.size()) * c.heads, longest = longest_of(c);
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min(c.threads, work)));
  Memory memory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::unique_ptr<Thread<P>> own;
    memory.with([&] { own.reset(new Thread<P>(longest, together)); });
#pragma omp for schedule(dynamic, 4)
    for (int64_t item = 0; item < work; ++item)
      memory.with([&] {
        const Piece& piece = pieces[item / c.heads];
        const int64_t head = item % c.heads;
        if (c.page_table && item + 1 < work) {
          const Piece& next = pieces[(item + 1) / c.heads];
          for (int64_t n = 0; n < next.sequences; ++n)
            fetch<typename Place<P>::Number>(c, next.sequence + n, (item + 1) % c.heads, n ? next.shared * kBlock : 0);
        }
        rows_of(c, piece, head, own->work.rows);
        for (int64_t n = 0; n < piece.sequences; ++n)
          own->sequences[n] = own->places[n].of(c, piece.sequence + n, head, n ? piece.shared * kBlock : 0);
        attend_them(own->work, own->sequences.data(), piece.shared, c.scale);
      });
  }
  return memory.wanting() ? kNoMemory : kDone;
}

// What `run` returns; want of memory is a result, as no exception is to leave what ctypes calls.
template <typename Function>
int caught(Function run) {
  try {
    return run();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (const std::length_error&) {
    return kNoMemory;
  }
}

int forward(const AttentionCall& c) {
  if (c.numbers == 3) return attend<Scaled<Fp8>>(c, FOR_DIM(c.dim, attend_rows, Scaled<Fp8>, ));
  if (c.numbers == 2) return attend<Scaled<Int8>>(c, FOR_DIM(c.dim, attend_rows, Scaled<Int8>, ));
  if (c.numbers == 1) return attend<const Bf16*>(c, FOR_DIM(c.dim, attend_rows, const Bf16*, ));
  return attend<const float*>(c, FOR_DIM(c.dim, attend_rows, const float*, ));
}

struct BackwardThread {
  Work work;
  Places<const float*> places;
  std::vector<float*> dk, dv;
  explicit BackwardThread(int64_t longest) : places(longest), dk(longest), dv(longest) {}
};

// The gradients of sequence `n` under one head of k and v.
template <typename Function>
void sequence_gradients(const AttentionCall& c, int64_t n, int64_t head, BackwardThread& own, Function add_gradients) {
  const Sequence<const float*> s = own.places.of(c, n, head);
  for (int64_t p = 0; p < c.context_lens[n]; ++p) {
    const int64_t place = (row_of(c, n, p) * c.heads + head) * c.dim;
    own.dk[p] = c.dk + place;
    own.dv[p] = c.dv + place;
  }
  for (const Piece& piece : pieces_of(c, n)) {
    rows_of(c, piece, head, own.work.rows);
    add_gradients(own.work, s, c.scale, own.dk.data(), own.dv.data());
  }
}

// A sequence that others go on from has keys that several of them change: then one thread has a head.
int backward(const AttentionCall& c) {
  const auto add_gradients = FOR_DIM(c.dim, rows_gradients, );
  if (!add_gradients || c.numbers || c.page_table || c.group > kMostRows) return kMissing;
  if (!c.sequences) return kDone;
  const int64_t parts = c.prefix_starts ? 1 : c.sequences, work = parts * c.heads, longest = longest_of(c);
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min(c.threads, work)));
  Memory memory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::unique_ptr<BackwardThread> own;
    memory.with([&] { own.reset(new BackwardThread(longest)); });
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < work; ++item)
      memory.with([&] {
        const int64_t head = item % c.heads, part = item / c.heads;
        for (int64_t n = c.prefix_starts ? 0 : part; n < (c.prefix_starts ? c.sequences : part + 1); ++n)
          sequence_gradients(c, n, head, *own, add_gradients);
      });
  }
  return memory.wanting() ? kNoMemory : kDone;
}

}  // namespace

extern "C" {

int attention_forward(const AttentionCall* c) {
  return caught([&] { return forward(*c); });
}

// Packed fp32 only.
int attention_backward(const AttentionCall* c) {
  return caught([&] { return backward(*c); });
}

// Throws std::invalid_argument where one of `count` rows is not among the first `end`.
void check_rows(const int64_t* rows, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i)
    if (static_cast<uint64_t>(rows[i]) >= static_cast<uint64_t>(end))
      throw std::invalid_argument("rows[" + std::to_string(i) + "] = " + std::to_string(rows[i]) + " of pages that have " +
                                  std::to_string(end));
}

// Rows of `bytes` bytes: token t, head h from t * from_token + h * bytes to row rows[t * heads + h].
void write_rows(const char* from, const int64_t* rows, char* to, int64_t tokens, int64_t heads, int64_t from_token,
                int64_t bytes) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < heads; ++h)
      std::memcpy(to + rows[t * heads + h] * bytes, from + t * from_token + h * bytes, bytes);
}
}

namespace {

// A row of `dim` numbers as T, the largest of them as `most`, and the scale that gives them back.
template <typename From, typename T>
float quantise(const From* from, T* to, int64_t dim, float most, float inverse) {
  Lanes top = {};
  Ints wrong = {};
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Lanes x = load(from + d), size = x < 0 ? -x : x;
    top = size > top ? size : top;
    wrong |= (x - x) != 0;  // infinite or not a number
  }
  float largest = 0;
  for (int i = 0; i < kLanes; ++i) {
    if (wrong[i]) largest = std::numeric_limits<float>::quiet_NaN();
    if (top[i] > largest) largest = top[i];
  }
  const float factor = most / std::max(1e-30f, largest);
  for (int64_t d = 0; d < dim; d += kLanes) store(to + d, largest == largest ? load(from + d) * factor : Lanes{});
  return largest * inverse;
}

template <typename From, typename T>
void write_quantised_rows(const From* from, const int64_t* rows, T* to, float* scales, int64_t tokens, int64_t heads,
                          int64_t from_token, int64_t dim, float most, float inverse) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t row = rows[t * heads + h];
      scales[row] = quantise(from + t * from_token + h * dim, to + row * dim, dim, most, inverse);
    }
}

}  // namespace

extern "C" {

// `write_rows` of fp32 or bf16 numbers into rows of `dim` int8 or fp8 numbers, a multiple of 16, and their scales.
void write_quantised(const void* from, const int64_t* rows, void* to, float* scales, int64_t tokens, int64_t heads,
                     int64_t from_token, int64_t dim, int64_t is_bf16, int64_t is_fp8, float most, float inverse) {
  const auto write = [&](auto x, auto y) {
    write_quantised_rows(x, rows, y, scales, tokens, heads, from_token, dim, most, inverse);
  };
  const auto *wide = static_cast<const float*>(from);
  const auto *half = static_cast<const Bf16*>(from);
  auto *fp8 = static_cast<Fp8*>(to);
  auto *int8 = static_cast<Int8*>(to);
  if (is_bf16 && is_fp8) write(half, fp8);
  else if (is_bf16) write(half, int8);
  else if (is_fp8) write(wide, fp8);
  else write(wide, int8);
}
}

BUILTIN(check_rows)
BUILTIN(write_rows)
BUILTIN(write_quantised)
