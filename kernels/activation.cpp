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
void forward(const void* gate, const void* up, void* out, int64_t rows, int64_t width, int64_t gate_row, int64_t up_row,
             int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T *gates = static_cast<const T*>(gate) + row * gate_row, *ups = static_cast<const T*>(up) + row * up_row;
    T* to = static_cast<T*>(out) + row * width;
    for (int64_t i = 0; i < width; i += kLanes) {
      const Lanes g = load(gates + i);
      store(to + i, rounded<T>(g * sigmoid(g)) * load(ups + i));
    }
  }
}

// With s = sigmoid(g): dup = d g s, dgate = d u s (1 + g (1 - s))
template <typename T>
void backward(const void* gate, const void* up, const void* grad, void* dgate, void* dup, int64_t rows, int64_t width,
              int64_t gate_row, int64_t up_row, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T *gates = static_cast<const T*>(gate) + row * gate_row, *ups = static_cast<const T*>(up) + row * up_row;
    const T* grads = static_cast<const T*>(grad) + row * width;
    T *to_gate = static_cast<T*>(dgate) + row * width, *to_up = static_cast<T*>(dup) + row * width;
    for (int64_t i = 0; i < width; i += kLanes) {
      const Lanes g = load(gates + i), d = load(grads + i), s = sigmoid(g);
      store(to_up + i, d * (g * s));
      store(to_gate + i, d * load(ups + i) * (s * (g * (1.0f - s) + 1.0f)));
    }
  }
}

}  // namespace

extern "C" {

// gate and up: row r at r * gate_row and r * up_row; out (rows, width).
void swiglu_forward(const void* gate, const void* up, void* out, int64_t rows, int64_t width, int64_t gate_row,
                    int64_t up_row, int64_t is_bf16, int64_t threads) {
  (is_bf16 ? forward<Bf16> : forward<float>)(gate, up, out, rows, width, gate_row, up_row, threads);
}

// grad, dgate and dup (rows, width).
void swiglu_backward(const void* gate, const void* up, const void* grad, void* dgate, void* dup, int64_t rows,
                     int64_t width, int64_t gate_row, int64_t up_row, int64_t is_bf16, int64_t threads) {
  (is_bf16 ? backward<Bf16> : backward<float>)(gate, up, grad, dgate, dup, rows, width, gate_row, up_row, threads);
}
}
