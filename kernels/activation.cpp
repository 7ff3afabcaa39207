// SwiGLU: the native form of kernels/activation.py on a CPU. Arithmetic is in fp32; an element depends on its own gate
// and up only. Widths are multiples of 16.

#include <cstdint>

#include "lanes.h"

namespace {

inline Lanes sigmoid(Lanes x) {
  const Lanes e = exp_of(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : spread(1.0f)) / (e + 1.0f);
}

template <typename T>
void forward(const T* gate, const T* up, T* out, int64_t rows, int64_t width, int64_t gate_row, int64_t up_row,
             int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < width; i += kLanes) {
      const Lanes g = load(gate + row * gate_row + i);
      store(out + row * width + i, rounded<T>(g * sigmoid(g)) * load(up + row * up_row + i));
    }
}

// With s = sigmoid(g): dup = d g s, dgate = d u s (1 + g (1 - s))
template <typename T>
void backward(const T* gate, const T* up, const T* grad, T* dgate, T* dup, int64_t rows, int64_t width,
              int64_t gate_row, int64_t up_row, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t at = row * width + i;
      const Lanes g = load(gate + row * gate_row + i), d = load(grad + at), s = sigmoid(g);
      store(dup + at, d * (g * s));
      store(dgate + at, d * load(up + row * up_row + i) * (s * (g * (1.0f - s) + 1.0f)));
    }
}

}  // namespace

extern "C" {

// gate and up: row r at r * gate_row and r * up_row; out (rows, width).
void swiglu_forward(const void* gate, const void* up, void* out, int64_t rows, int64_t width, int64_t gate_row,
                    int64_t up_row, int64_t is_bf16, int64_t threads) {
  if (is_bf16)
    forward(static_cast<const Bf16*>(gate), static_cast<const Bf16*>(up), static_cast<Bf16*>(out), rows, width,
            gate_row, up_row, threads);
  else
    forward(static_cast<const float*>(gate), static_cast<const float*>(up), static_cast<float*>(out), rows, width,
            gate_row, up_row, threads);
}

// grad, dgate and dup (rows, width).
void swiglu_backward(const void* gate, const void* up, const void* grad, void* dgate, void* dup, int64_t rows,
                     int64_t width, int64_t gate_row, int64_t up_row, int64_t is_bf16, int64_t threads) {
  if (is_bf16)
    backward(static_cast<const Bf16*>(gate), static_cast<const Bf16*>(up), static_cast<const Bf16*>(grad),
             static_cast<Bf16*>(dgate), static_cast<Bf16*>(dup), rows, width, gate_row, up_row, threads);
  else
    backward(static_cast<const float*>(gate), static_cast<const float*>(up), static_cast<const float*>(grad),
             static_cast<float*>(dgate), static_cast<float*>(dup), rows, width, gate_row, up_row, threads);
}
}
