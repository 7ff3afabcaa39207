// Rotary position embedding of halves: the native form of kernels/rotary.py on a CPU. Arithmetic is in fp32; an element
// depends on its own pair, cos and sin only. Heads are multiples of 16 wide.

#include <cstdint>

#include "lanes.h"

namespace {

// (a, b) -> (a cos_a - b sin_a, b cos_b + a sin_b), or with that map transposed, which is its gradient. The two halves
// of a head lie in one vector where the head has 16 numbers, so vectors have 8.
typedef float Eight __attribute__((vector_size(32)));

inline Eight load8(const float* from) {
  Eight x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Eight load8(const Bf16* from) {
  typedef uint16_t Eight16 __attribute__((vector_size(16)));
  typedef uint32_t Eight32 __attribute__((vector_size(32)));
  Eight16 halves;
  std::memcpy(&halves, from, sizeof halves);
  const Eight32 words = __builtin_convertvector(halves, Eight32) << 16;
  Eight x;
  std::memcpy(&x, &words, sizeof x);
  return x;
}

inline void store8(float* to, Eight x) { std::memcpy(to, &x, sizeof x); }

inline void store8(Bf16* to, Eight x) {
  Lanes wide = {};
  std::memcpy(&wide, &x, sizeof x);
  Bf16 held[kLanes];
  store(held, wide);
  std::memcpy(to, held, kLanes / 2 * sizeof(Bf16));
}

template <typename T, bool kTransposed>
void rotate(const T* x, const T* cos, const T* sin, T* out, int64_t tokens, int64_t heads, int64_t dim, int64_t x_token,
            int64_t out_token, int threads) {
  const int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t token = 0; token < tokens; ++token) {
    const T *c = cos + token * dim, *s = sin + token * dim;
    for (int64_t head = 0; head < heads; ++head) {
      const T* from = x + token * x_token + head * dim;
      T* to = out + token * out_token + head * dim;
      for (int64_t i = 0; i < half; i += kLanes / 2) {
        const Eight a = load8(from + i), b = load8(from + half + i);
        const Eight cos_a = load8(c + i), cos_b = load8(c + half + i);
        const Eight sin_a = load8(s + i), sin_b = load8(s + half + i);
        store8(to + i, kTransposed ? a * cos_a + b * sin_b : a * cos_a - b * sin_a);
        store8(to + half + i, kTransposed ? b * cos_b - a * sin_a : b * cos_b + a * sin_b);
      }
    }
  }
}

template <typename T>
void rotate_any(const void* x, const void* cos, const void* sin, void* out, int64_t tokens, int64_t heads, int64_t dim,
                int64_t x_token, int64_t out_token, int64_t transposed, int threads) {
  (transposed ? rotate<T, true> : rotate<T, false>)(static_cast<const T*>(x), static_cast<const T*>(cos),
                                                    static_cast<const T*>(sin), static_cast<T*>(out), tokens, heads,
                                                    dim, x_token, out_token, threads);
}

}  // namespace

extern "C" {

// x and out: token t, head h at t * x_token + h * dim and t * out_token + h * dim, the same memory or none of it;
// cos, sin (tokens, dim).
void rotary(const void* x, const void* cos, const void* sin, void* out, int64_t tokens, int64_t heads, int64_t dim,
            int64_t x_token, int64_t out_token, int64_t transposed, int64_t is_bf16, int64_t threads) {
  (is_bf16 ? rotate_any<Bf16> : rotate_any<float>)(x, cos, sin, out, tokens, heads, dim, x_token, out_token, transposed,
                                                   threads);
}
}
