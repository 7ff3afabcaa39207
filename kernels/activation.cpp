// SwiGLU and GeGLU: the native form of kernels/activation.py on a CPU. Arithmetic is in fp32; an element depends on its own
// gate and up only. Widths are multiples of 16.

#include <cstdint>

#include "builtin.h"
#include "lanes.h"

namespace {

inline Lanes sigmoid(Lanes x) {
  const Lanes e = exp_of(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : spread(1.0f)) / (e + 1.0f);
}

// An activation is x times a share of 0 to 1; `slope` is its derivative, given the share.

struct Silu {
  static inline Lanes share(Lanes x) { return sigmoid(x); }
  static inline Lanes slope(Lanes x, Lanes s) { return s * (x * (1.0f - s) + 1.0f); }
};

// (1 + tanh(u)) / 2 = sigmoid(2 u), which loses no digits where tanh is near -1
struct GeluTanh {
  static constexpr float kTwice = 1.5957691216f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
  static inline Lanes share(Lanes x) { return sigmoid(kTwice * (x * (kCubic * (x * x) + 1.0f))); }
  static inline Lanes slope(Lanes x, Lanes s) {
    return s + x * (s * (1.0f - s)) * (kTwice * (3.0f * kCubic * (x * x) + 1.0f));
  }
};

// The normal distribution: its tail is the density times a polynomial in 1 / (1 + 0.22 |x|), to 1e-9, fitted by least
// squares.
struct Gelu {
  static inline Lanes share(Lanes x) {
    const Lanes size = x < 0.0f ? -x : x, t = 1.0f / (0.22f * size + 1.0f);
    Lanes p = spread(-0.111117000f);
    for (float c : {0.49809288f, -0.65931211f, 0.67551923f, -0.24885234f, 0.18715853f, 0.06935912f, 0.08915168f})
      p = p * t + c;
    const Lanes tail = p * t * exp_of(-0.5f * (x * x));
    return x < 0.0f ? tail : 1.0f - tail;
  }
  static inline Lanes slope(Lanes x, Lanes s) { return s + x * (0.3989422804f * exp_of(-0.5f * (x * x))); }
};

struct Call {
  const void *gate, *up, *grad;
  void *out, *dgate, *dup;
  int64_t rows, width, gate_row, up_row;
};

template <typename T, typename Activation>
void forward(const Call& call, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < call.rows; ++row) {
    const T* gates = static_cast<const T*>(call.gate) + row * call.gate_row;
    const T* ups = static_cast<const T*>(call.up) + row * call.up_row;
    T* to = static_cast<T*>(call.out) + row * call.width;
    for (int64_t i = 0; i < call.width; i += kLanes) {
      const Lanes g = load(gates + i);
      store(to + i, rounded<T>(g * Activation::share(g)) * load(ups + i));
    }
  }
}

// dup = d act(g), dgate = d u act'(g)
template <typename T, typename Activation>
void backward(const Call& call, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < call.rows; ++row) {
    const T* gates = static_cast<const T*>(call.gate) + row * call.gate_row;
    const T* ups = static_cast<const T*>(call.up) + row * call.up_row;
    const T* grads = static_cast<const T*>(call.grad) + row * call.width;
    T* to_gate = static_cast<T*>(call.dgate) + row * call.width;
    T* to_up = static_cast<T*>(call.dup) + row * call.width;
    for (int64_t i = 0; i < call.width; i += kLanes) {
      const Lanes g = load(gates + i), d = load(grads + i), s = Activation::share(g);
      store(to_up + i, d * (g * s));
      store(to_gate + i, d * load(ups + i) * Activation::slope(g, s));
    }
  }
}

template <typename T>
void run(const Call& call, int64_t activation, int threads) {
  constexpr int64_t kSilu = 0, kGeluTanh = 1;
  if (activation == kSilu)
    (call.grad ? backward<T, Silu> : forward<T, Silu>)(call, threads);
  else if (activation == kGeluTanh)
    (call.grad ? backward<T, GeluTanh> : forward<T, GeluTanh>)(call, threads);
  else
    (call.grad ? backward<T, Gelu> : forward<T, Gelu>)(call, threads);
}

}  // namespace

extern "C" {

// gate and up: row r at r * gate_row and r * up_row; out (rows, width). activation: 0 SiLU, 1 GELU with tanh, 2 GELU.
void gated_forward(const void* gate, const void* up, void* out, int64_t activation, int64_t is_bf16,
                   int64_t threads, int64_t rows, int64_t width, int64_t gate_row, int64_t up_row) {
  const Call call{gate, up, nullptr, out, nullptr, nullptr, rows, width, gate_row, up_row};
  (is_bf16 ? run<Bf16> : run<float>)(call, activation, threads);
}

// grad, dgate and dup (rows, width).
void gated_backward(const void* gate, const void* up, const void* grad, void* dgate, void* dup,
                    int64_t activation, int64_t is_bf16, int64_t threads, int64_t rows, int64_t width, int64_t gate_row,
                    int64_t up_row) {
  const Call call{gate, up, grad, nullptr, dgate, dup, rows, width, gate_row, up_row};
  (is_bf16 ? run<Bf16> : run<float>)(call, activation, threads);
}
}

BUILTIN(gated_forward)
BUILTIN(gated_backward)
