// y = x W^T for few rows, and for weights of 8 or 4 bits: the native form of kernels/linear.py and kernels/quantized.py on a
// CPU. Numbers of low bits are exact in fp32 and bf16 and are multiplied by x as they are; the sum of a group is scaled
// once, in fp32. The sum over the inputs has one order, whatever the number of rows: that of oneDNN's kernels for many
// rows. bf16 rows go through the CPU's products of pairs where there are such.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "builtin.h"
#include "lanes.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

namespace {

constexpr int kBlock = 64;            // outputs whose weights lie together
constexpr int64_t kAtOnce = 1 << 17;  // numbers of x that are read by all blocks before the next: what a cache holds
typedef Vector<int16_t, kLanes>::Type Words;

inline Ints words_at(const uint8_t* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return __builtin_convertvector(words, Ints);
}

// How weights of two inputs, k and k + 1, are read (kPairBytes lie between pairs, kOutputBytes between outputs): of kVectors vectors of 16 outputs, for rows
// of fp32 one input at a time, for rows of bf16 both beside each other.
struct Bits32 {
  typedef float Scale;
  static constexpr int kPairBytes = 8 * kBlock, kOutputBytes = 4;
  static constexpr bool kIsScaled = false;
  template <int kVectors>
  static inline void read(const uint8_t* pair, int place, Lanes (&to)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) to[v] = load(reinterpret_cast<const float*>(pair) + place * kBlock + v * kLanes);
  }
};

struct Bits16 {
  typedef float Scale;
  static constexpr int kPairBytes = 4 * kBlock, kOutputBytes = 4;
  static constexpr bool kIsScaled = false;
  template <int kVectors>
  static inline void read(const uint8_t* pair, int place, Lanes (&to)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) {
      Ints both;
      std::memcpy(&both, pair + v * 4 * kLanes, sizeof both);
      both = place ? both & -65536 : both << 16;
      std::memcpy(&to[v], &both, sizeof both);
    }
  }
#if HAS_PAIRS
  template <int kVectors>
  static inline void read(const uint8_t* pair, __m512bh (&to)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) to[v] = (__m512bh)_mm512_loadu_si512(pair + v * 4 * kLanes);
  }
#endif
};

struct Bits8 {
  typedef float Scale;
  static constexpr int kPairBytes = 2 * kBlock, kOutputBytes = 2;
  static constexpr bool kIsScaled = true;
  template <int kVectors>
  static inline void read(const uint8_t* pair, int place, Lanes (&to)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) {
      const Ints both = words_at(pair + v * 2 * kLanes);
      to[v] = __builtin_convertvector(place ? both >> 8 : (both << 24) >> 24, Lanes);
    }
  }
#if HAS_PAIRS
  template <int kVectors>
  static inline void read(const uint8_t* pair, __m512bh (&to)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) {
      const __m128i* at = reinterpret_cast<const __m128i*>(pair + v * 2 * kLanes);
      const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at)));
      const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at + 1)));
      to[v] = _mm512_cvtne2ps_pbh(high, low);
    }
  }
#endif
};

struct Bits4 {
  typedef Bf16 Scale;
  static constexpr int kPairBytes = kBlock, kOutputBytes = 1;
  static constexpr bool kIsScaled = true;
  template <int kVectors>
  static inline void read(const uint8_t* pair, int place, Lanes (&to)[kVectors]) {
    const Lanes numbers = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    for (int v = 0; v < kVectors; v += 2) {
      const Ints codes = words_at(pair + v * kLanes) >> (place ? 8 : 0);
      to[v] = __builtin_shuffle(numbers, codes & 15);
      to[v + 1] = __builtin_shuffle(numbers, (codes >> 4) & 15);
    }
  }
#if HAS_PAIRS
  template <int kVectors>
  static inline void read(const uint8_t* pair, __m512bh (&to)[kVectors]) {
    alignas(32) static const uint16_t kNumbers[16] = {0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80,
                                                      0,      0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};
    const __m256i once = _mm256_load_si256(reinterpret_cast<const __m256i*>(kNumbers));
    const __m512i numbers = _mm512_broadcast_i64x4(once);  // the same for both values of a place's fifth bit
    for (int v = 0; v < kVectors; v += 2) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pair + v * kLanes));
      const __m512i codes = _mm512_cvtepu8_epi16(bytes);
      to[v] = (__m512bh)_mm512_permutexvar_epi16(codes, numbers);
      to[v + 1] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), numbers);
    }
  }
#endif
};

// A reading of some outputs of a block jumps, which the CPU does not foresee: asks for the weights of kVectors vectors kAhead
// bytes later. Whole blocks lie one after another, and asking costs more than it gives.
template <typename Bits, int kVectors>
inline void fetch(const uint8_t* weights) {
  constexpr int kAhead = 4096, kLine = 64;
  if (kVectors * kLanes == kBlock) return;
  for (int input = 0; input < Bits::kPairBytes; input += Bits::kOutputBytes * kBlock)
    for (int i = 0; i < Bits::kOutputBytes * kLanes * kVectors; i += kLine)
      __builtin_prefetch(weights + kAhead + input + i);
}

// Where a block is read several times, some of its outputs or some of the rows at a time, each reading asks for its part of
// the next block, so that memory is read all the while and in order.
struct Next {
  const uint8_t* at;
  int64_t step;  // bytes for each pair of inputs

  inline void fetch() {
    constexpr int kLine = 64, kIntoL2 = 2;
    for (int64_t i = 0; i < step; i += kLine) __builtin_prefetch(at + i, 0, kIntoL2);
    at += step;
  }
};

// The first `count` numbers of a vector; the others are 0.
template <typename X>
inline Lanes load_first(const X* from, int64_t count) {
  if (count == kLanes) return load(from);
  X all[kLanes] = {};
  std::memcpy(all, from, count * sizeof(X));
  return load(all);
}

template <typename X>
inline void store_first(X* to, Lanes x, int64_t count) {
  if (count == kLanes) return store(to, x);
  X all[kLanes];
  store(all, x);
  std::memcpy(to, all, count * sizeof(X));
}

struct Call {
  const void *x, *weights, *scales, *bias;
  void* out;
  int64_t rows, in, outs, group;
};

// sums[m][v] += the products of `pairs` pairs of inputs with x (pairs, kRows, 2).
template <typename Bits, typename X, int kRows, int kVectors>
inline void multiply(const X* x, const uint8_t* weights, int64_t pairs, Next& next, Lanes (&sums)[kRows][kVectors]) {
  for (int64_t p = 0; p < pairs; ++p, weights += Bits::kPairBytes, x += 2 * kRows) {
    fetch<Bits, kVectors>(weights);
    next.fetch();
    for (int place = 0; place < 2; ++place) {
      Lanes w[kVectors];
      Bits::read(weights, place, w);
      for (int m = 0; m < kRows; ++m) {
        const Lanes a = spread(number(x[2 * m + place]));
        for (int v = 0; v < kVectors; ++v) sums[m][v] += a * w[v];
      }
    }
  }
}

#if HAS_PAIRS
template <typename Bits, int kRows, int kVectors>
inline void multiply(const Bf16* x, const uint8_t* weights, int64_t pairs, Next& next,
                     Lanes (&sums)[kRows][kVectors]) {
  for (int64_t p = 0; p < pairs; ++p, weights += Bits::kPairBytes, x += 2 * kRows) {
    fetch<Bits, kVectors>(weights);
    next.fetch();
    __m512bh w[kVectors];
    Bits::read(weights, w);
    for (int m = 0; m < kRows; ++m) {
      int32_t pair;
      std::memcpy(&pair, x + 2 * m, sizeof pair);
      const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < kVectors; ++v) sums[m][v] = (Lanes)_mm512_dpbf16_ps((__m512)sums[m][v], w[v], a);
    }
  }
}
#endif

// kRows rows x (in / 2, kRows, 2) from `row` on, and kVectors vectors of 16 outputs from `output` on, in one block.
template <typename X, typename Bits, int kRows, int kVectors>
void tile(const Call& call, const X* x, int64_t row, int64_t output, Next next) {
  const int64_t block = output / kBlock, inside = output % kBlock, groups = (call.in + call.group - 1) / call.group;
  const uint8_t* weights = static_cast<const uint8_t*>(call.weights) + block * (call.in / 2) * Bits::kPairBytes +
                           inside * Bits::kOutputBytes;
  const typename Bits::Scale* scales =
      static_cast<const typename Bits::Scale*>(call.scales) + block * groups * kBlock + inside;
  Lanes totals[kRows][kVectors] = {};
  for (int64_t g = 0; g < groups; ++g, scales += kBlock) {
    Lanes sums[kRows][kVectors] = {};
    const int64_t pairs = std::min(call.group, call.in - g * call.group) / 2;
    multiply<Bits>(x + g * call.group * kRows, weights, pairs, next, sums);
    weights += pairs * Bits::kPairBytes;
    for (int v = 0; v < kVectors; ++v) {
      const Lanes scale = Bits::kIsScaled ? load(scales + v * kLanes) : spread(1.0f);
      for (int m = 0; m < kRows; ++m) totals[m][v] += sums[m][v] * scale;
    }
  }
  for (int v = 0; v < kVectors && output + v * kLanes < call.outs; ++v) {
    const int64_t at = output + v * kLanes, count = std::min<int64_t>(kLanes, call.outs - at);
    const Lanes bias = call.bias ? load_first(static_cast<const X*>(call.bias) + at, count) : Lanes{};
    for (int m = 0; m < kRows; ++m)
      store_first(static_cast<X*>(call.out) + (row + m) * call.outs + at, totals[m][v] + bias, count);
  }
}

// Rows row .. row + count of x, with pairs of one k beside each other: (in / 2, count, 2).
template <typename X>
void beside(const Call& call, int64_t row, int64_t count, X* to) {
  for (int64_t m = 0; m < count; ++m) {
    const X* from = static_cast<const X*>(call.x) + (row + m) * call.in;
    for (int64_t p = 0; p < call.in / 2; ++p) std::memcpy(to + 2 * (p * count + m), from + 2 * p, 2 * sizeof(X));
  }
}

// How rows are cut into tiles of at most kMost. Of 7 rows and 2 vectors of outputs GCC does not keep the products of pairs in
// registers: there is no such tile. The bits do not depend on the cut.
template <typename X, typename Bits>
struct Cut {
  static constexpr int64_t kMost = 12;
  static constexpr bool kIsOfPairs = HAS_PAIRS && std::is_same<X, Bf16>::value;
  static constexpr bool kReadsTwo = std::is_same<Bits, Bits4>::value;  // vectors at least
  static constexpr int kVectorsOf7 = kIsOfPairs && !kReadsTwo ? 1 : 2;
  int64_t rows, tiles;

  explicit Cut(int64_t rows)
      : rows(rows), tiles(kIsOfPairs && kReadsTwo && rows == 7 ? 2 : (rows + kMost - 1) / kMost) {}
  int64_t begin(int64_t tile) const {
    const int64_t even = rows * tile / tiles;
    if (tile != 1 || tiles != 2) return even;
    return rows == 7 ? 4 : rows == 13 || rows == 15 ? 5 : rows == 14 ? 6 : even;
  }
};

// Tile number `t` of the `tiles` that the rows are cut into.
template <typename X, typename Bits>
void rows_of_block(const Call& call, const X* x, int64_t row, int64_t count, int64_t output, int64_t t, int64_t tiles) {
  constexpr int kVectorsOf7 = Cut<X, Bits>::kVectorsOf7;
  const int64_t bytes = call.in / 2 * Bits::kPairBytes;
  const uint8_t* following = static_cast<const uint8_t*>(call.weights) + (output / kBlock + 1) * bytes;
#define TILE(rows, vectors)                                                                          \
  case rows:                                                                                         \
    for (int64_t v = 0; v < kBlock && output + v < call.outs; v += vectors * kLanes) {               \
      constexpr int64_t kParts = kBlock / (vectors * kLanes);                                        \
      const int64_t readings = tiles * kParts, reading = t * kParts + v / (vectors * kLanes);        \
      const Next next{following + bytes / readings * reading,                                        \
                      readings == 1 ? 0 : Bits::kPairBytes / readings};                              \
      tile<X, Bits, rows, vectors>(call, x, row, output + v, next);                                  \
    }                                                                                                \
    break;
  switch (count) {
    TILE(1, 4) TILE(2, 4) TILE(3, 4) TILE(4, 4) TILE(5, 4)
    TILE(6, 2) TILE(7, kVectorsOf7) TILE(8, 2) TILE(9, 2) TILE(10, 2) TILE(11, 2) TILE(12, 2)
  }
#undef TILE
}

template <typename X, typename Bits>
void linear(const Call& call, int threads) {
  constexpr int64_t kMost = Cut<X, Bits>::kMost;
  const int64_t blocks = (call.outs + kBlock - 1) / kBlock;
  const int64_t part = std::min(call.rows, std::max(kMost, kAtOnce / call.in / kMost * kMost));
  const std::unique_ptr<X[]> copy(call.rows == 1 ? nullptr : new X[part * call.in]);
  for (int64_t first = 0; first < call.rows; first += part) {
    const int64_t rows = std::min(part, call.rows - first);
    const Cut<X, Bits> cut(rows);
    const int64_t tiles = cut.tiles;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      if (copy) {
#pragma omp for
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t from = cut.begin(t), to = cut.begin(t + 1);
          beside(call, first + from, to - from, copy.get() + from * call.in);
        }
      }
#pragma omp for
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t from = cut.begin(t), to = cut.begin(t + 1);
          const X* x = copy ? copy.get() + from * call.in : static_cast<const X*>(call.x);
          rows_of_block<X, Bits>(call, x, first + from, to - from, block * kBlock, t, tiles);
        }
    }
  }
}

}  // namespace

extern "C" {

// x (rows, in), out (rows, outs), bias (outs) or null: fp32, or all bf16. Weights in whole blocks of 64 outputs, of which
// those below `outs` are written: of x's own dtype as oneDNN packs them, fp32 (blocks, in, 64) or bf16 (blocks, in / 2, 64, 2); of 8
// bits (blocks, in / 2, 64, 2) with fp32 scales (blocks, in / group, 64); of 4 bits (blocks, in / 2, 2, 16, 2) bytes,
// whose low halves are the outputs 0..15 of 32 and the high ones 16..31, plus 8 each, with bf16 scales. Sums of `group`
// inputs are made by themselves and added in their order. in and group are even.
void linear_forward(const void* x, const void* weights, const void* scales, const void* bias, void* out, int64_t rows,
                    int64_t in, int64_t outs, int64_t group, int64_t bits, int64_t is_bf16, int64_t threads) {
  const Call call{x, weights, scales, bias, out, rows, in, outs, group};
  if (bits == 8)
    (is_bf16 ? linear<Bf16, Bits8> : linear<float, Bits8>)(call, threads);
  else if (bits == 4)
    (is_bf16 ? linear<Bf16, Bits4> : linear<float, Bits4>)(call, threads);
  else if (is_bf16)
    linear<Bf16, Bits16>(call, threads);
  else
    linear<float, Bits32>(call, threads);
}
}

BUILTIN(linear_forward)
