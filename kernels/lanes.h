// Floats side by side, sixteen unless said otherwise, loaded from and stored to fp32 or bf16: what the C++ forms of the
// operations share.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
#define HAS_WIDENING 1
#else
#define HAS_WIDENING 0
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#define HAS_ROUNDING_TO_BF16 1
#else
#define HAS_ROUNDING_TO_BF16 0
#endif

namespace {

constexpr int kLanes = 16;
constexpr float kNone = -std::numeric_limits<float>::infinity();

template <typename T, int kCount>
struct Vector {
  typedef T Type __attribute__((vector_size(kCount * sizeof(T))));
};

struct Bf16 {
  uint16_t bits;
};

inline float number(float x) { return x; }
inline float number(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <int kCount = kLanes>
inline typename Vector<float, kCount>::Type load(const float* from) {
  typename Vector<float, kCount>::Type x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <int kCount>
inline typename Vector<float, kCount>::Type floats_of(typename Vector<uint16_t, kCount>::Type halves) {
#if HAS_WIDENING  // in one instruction, where GCC takes four
  if constexpr (kCount == 16)
    return (typename Vector<float, kCount>::Type)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16);
#endif
  typedef typename Vector<uint32_t, kCount>::Type Words;
  const Words words = __builtin_convertvector(halves, Words) << 16;
  typename Vector<float, kCount>::Type x;
  std::memcpy(&x, &words, sizeof x);
  return x;
}

template <int kCount = kLanes>
inline typename Vector<float, kCount>::Type load(const Bf16* from) {
  typename Vector<uint16_t, kCount>::Type halves;
  std::memcpy(&halves, from, sizeof halves);
  return floats_of<kCount>(halves);
}

template <typename Floats>
inline void store(float* to, Floats x) {
  std::memcpy(to, &x, sizeof x);
}

// Rounded to the nearest, ties to even, as torch does; NaN stays NaN.
template <typename Floats>
inline typename Vector<uint16_t, sizeof(Floats) / sizeof(float)>::Type nearest_halves(Floats x) {
  constexpr int kCount = sizeof x / sizeof(float);
  typedef typename Vector<uint32_t, kCount>::Type Words;
  Words words;
  std::memcpy(&words, &x, sizeof words);
  words = (words + 0x7FFF + ((words >> 16) & 1)) >> 16;
  words = x != x ? Words{} + 0x7FC0 : words;
  return __builtin_convertvector(words, typename Vector<uint16_t, kCount>::Type);
}

// The same; where the CPU has an instruction for it, what is below the smallest normal number becomes 0.
template <typename Floats>
inline typename Vector<uint16_t, sizeof(Floats) / sizeof(float)>::Type halves_of(Floats x) {
#if HAS_ROUNDING_TO_BF16
  if constexpr (sizeof x == 16 * sizeof(float))
    return (typename Vector<uint16_t, 16>::Type)_mm512_cvtneps_pbh((__m512)x);
#endif
  return nearest_halves(x);
}

template <typename Floats>
inline void store(Bf16* to, Floats x) {
  const auto halves = halves_of(x);
  std::memcpy(to, &halves, sizeof halves);
}

typedef Vector<float, kLanes>::Type Lanes;
typedef Vector<int32_t, kLanes>::Type Ints;

inline Lanes spread(float x) { return Lanes{} + x; }

inline Lanes larger(Lanes a, Lanes b) { return b > a ? b : a; }  // a where b is NaN

inline float largest_of(Lanes x) {
  float most = kNone;
  for (int i = 0; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// x as a T would hold it.
template <typename T>
inline Lanes rounded(Lanes x);
template <>
inline Lanes rounded<Bf16>(Lanes x) {
  return floats_of<kLanes>(halves_of(x));
}
template <>
inline Lanes rounded<float>(Lanes x) {
  return x;
}

// The sum of all lanes, added up as a tree.
inline float total_of(Lanes x) {
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = x[i] + x[i + half];
  return x[0];
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

}  // namespace
