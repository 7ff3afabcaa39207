// Rotary position embedding of halves: the native form of kernels/rotary.py on a CPU. Arithmetic is in fp32; an element
// depends on its own pair, cos and sin only. Heads are multiples of 16 wide.

#include <cstdint>

#include "builtin.h"
#include "lanes.h"

namespace {

// (a, b) -> (a cos_a - b sin_a, b cos_b + a sin_b), or with that map transposed, which is its gradient.
template <typename T, bool kTransposed>
void rotate(const void* x, const void* cos, const void* sin, void* out, int64_t tokens, int64_t heads, int64_t dim,
            int64_t x_token, int64_t out_token, int threads) {
  constexpr int kCount = kLanes / 2;  // at once: of a head of 16 numbers one half has 8
  const int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t token = 0; token < tokens; ++token) {
    const T *c = static_cast<const T*>(cos) + token * dim, *s = static_cast<const T*>(sin) + token * dim;
    for (int64_t head = 0; head < heads; ++head) {
      const T* from = static_cast<const T*>(x) + token * x_token + head * dim;
      T* to = static_cast<T*>(out) + token * out_token + head * dim;
      for (int64_t i = 0; i < half; i += kCount) {
        const auto a = load<kCount>(from + i), b = load<kCount>(from + half + i);
        const auto cos_a = load<kCount>(c + i), cos_b = load<kCount>(c + half + i);
        const auto sin_a = load<kCount>(s + i), sin_b = load<kCount>(s + half + i);
        store(to + i, kTransposed ? a * cos_a + b * sin_b : a * cos_a - b * sin_a);
        store(to + half + i, kTransposed ? b * cos_b - a * sin_a : b * cos_b + a * sin_b);
      }
    }
  }
}

}  // namespace

extern "C" {

// x and out: token t, head h at t * x_token + h * dim and t * out_token + h * dim, the same memory or none of it;
// cos, sin (tokens, dim).
void rotary(const void* x, const void* cos, const void* sin, void* out, int64_t tokens, int64_t heads, int64_t dim,
            int64_t x_token, int64_t out_token, int64_t transposed, int64_t is_bf16, int64_t threads) {
  const auto run = is_bf16 ? (transposed ? rotate<Bf16, true> : rotate<Bf16, false>)
                           : (transposed ? rotate<float, true> : rotate<float, false>);
  run(x, cos, sin, out, tokens, heads, dim, x_token, out_token, threads);
}
}

BUILTIN(rotary)
