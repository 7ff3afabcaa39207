// RMSNorm of rows: the native form of kernels/norm.py on a CPU. Arithmetic is in fp32; a row's result depends on that
// row and the weight only. Widths are multiples of 16.

#include <algorithm>
#include <cmath>
#include <vector>

#include "builtin.h"
#include "lanes.h"

namespace {

constexpr int64_t kParts = 64;  // of the rows, whose gradients of the weight are added up one after another

template <typename T>
inline float scale_of(const T* x, int64_t width, float eps) {
  Lanes chains[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes)
    for (int c = 0; c < 4; ++c) {
      const Lanes v = load(x + i + c * kLanes);
      chains[c] = chains[c] + v * v;
    }
  for (; i < width; i += kLanes) {
    const Lanes v = load(x + i);
    chains[0] = chains[0] + v * v;
  }
  const float total = total_of((chains[0] + chains[1]) + (chains[2] + chains[3]));
  return 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
}

// Not inlined: with and without an addition before it, a row goes through the same instructions.
template <typename T>
__attribute__((noinline)) void norm_row(const T* x, const T* weight, T* out, int64_t width, float eps) {
  const float scale = scale_of(x, width, eps);
  for (int64_t i = 0; i < width; i += kLanes) store(out + i, rounded<T>(load(x + i) * scale) * load(weight + i));
}

// n = x s;  dx = s (g w - n mean(g w n));  dw += g n
template <typename T>
void row_gradients(const T* x, const T* weight, const T* grad, T* dx, float* dw, int64_t width, float eps) {
  const float scale = scale_of(x, width, eps);
  if (dx) {
    Lanes sum = {};
    for (int64_t i = 0; i < width; i += kLanes) sum = sum + load(grad + i) * load(weight + i) * (load(x + i) * scale);
    const float mean = total_of(sum) / static_cast<float>(width);
    for (int64_t i = 0; i < width; i += kLanes)
      store(dx + i, (load(grad + i) * load(weight + i) - load(x + i) * scale * mean) * scale);
  }
  if (dw)
    for (int64_t i = 0; i < width; i += kLanes) store(dw + i, load(dw + i) + load(grad + i) * (load(x + i) * scale));
}

template <typename T>
void forward(void* x, const void* weight, const void* change, void* out, int64_t tokens, int64_t heads, int64_t width,
             int64_t x_token, int64_t weight_head, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t head = 0; head < heads; ++head) {
      T* row = static_cast<T*>(x) + token * x_token + head * width;
      const int64_t place = (token * heads + head) * width;
      if (change) {
        const T* added = static_cast<const T*>(change) + place;
        for (int64_t i = 0; i < width; i += kLanes) store(row + i, load(row + i) + load(added + i));
      }
      norm_row(row, static_cast<const T*>(weight) + head * weight_head, static_cast<T*>(out) + place, width, eps);
    }
}

template <typename T>
void backward(const void* x, const void* weight, const void* grad, void* dx, float* dw, int64_t rows, int64_t width,
              float eps, int threads) {
  const int64_t parts = std::min(kParts, rows);
  std::vector<float> of_part(dw ? parts * width : 0);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row)
      row_gradients(static_cast<const T*>(x) + row * width, static_cast<const T*>(weight),
                    static_cast<const T*>(grad) + row * width, dx ? static_cast<T*>(dx) + row * width : nullptr,
                    dw ? of_part.data() + part * width : nullptr, width, eps);
  for (int64_t part = 0; dw && part < parts; ++part)
    for (int64_t i = 0; i < width; ++i) dw[i] += of_part[part * width + i];
}

}  // namespace

extern "C" {

// x: token t, head h at t * x_token + h * width; change (null, or as out): added to x first; weight: head h at
// h * weight_head; out (tokens, heads, width).
void rms_norm_forward(void* x, const void* weight, const void* change, void* out, int64_t tokens, int64_t heads,
                      int64_t width, int64_t x_token, int64_t weight_head, float eps, int64_t is_bf16,
                      int64_t threads) {
  (is_bf16 ? forward<Bf16> : forward<float>)(x, weight, change, out, tokens, heads, width, x_token, weight_head, eps,
                                             threads);
}

// x, grad and dx (rows, width), weight (width,), dw (width,) fp32 zeros; dx and dw may be null.
void rms_norm_backward(const void* x, const void* weight, const void* grad, void* dx, float* dw, int64_t rows,
                       int64_t width, float eps, int64_t is_bf16, int64_t threads) {
  (is_bf16 ? backward<Bf16> : backward<float>)(x, weight, grad, dx, dw, rows, width, eps, threads);
}
}

BUILTIN(rms_norm_forward)
BUILTIN(rms_norm_backward)
