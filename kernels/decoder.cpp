// All layers of a decoder of Llama's kind over a few new tokens, in one call: for one sequence, or some, calling each
// operation from Python takes longer than doing it. The operations are those of the other files, called by their
// addresses in the order and on the memory in which rlhf/models/fused.py calls them, so the bits are the same.

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

#include "attention.h"
#include "builtin.h"
#include "lanes.h"

extern "C" {

struct Operations {
  void (*norm)(void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, float, int64_t,
               int64_t);
  void (*linear)(const void*, const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t,
                 int64_t, int64_t);
  void (*rotary)(const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                 int64_t, int64_t);
  void (*gated)(const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
  void (*write)(const char*, const int64_t*, char*, int64_t, int64_t, int64_t, int64_t);
  void (*write_quantised)(const void*, const int64_t*, void*, float*, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, float, float);
  int (*attention)(const AttentionCall*);
};

struct Product {  // as linear_forward takes it
  const void *weights, *scales, *bias;
  int64_t in, outs, group, bits;
};

struct Layer {
  const void *input_norm, *post_norm;
  const void* head_norm;  // (query heads + heads, dim), or null
  void *k_pages, *v_pages;
  float *k_scales, *v_scales;  // or null
  Product qkv, out, gate_up, down;
  int64_t window;  // 0: none
  float input_eps, post_eps, head_eps, scale;
};

struct LayersCall {
  const Operations* operations;
  const Layer* layers;
  const AttentionCall* attention;  // what is the same in all layers
  const void *cos, *sin;           // (tokens, dim)
  const int64_t* rows;             // (tokens * heads): where keys and values are written
  void* x;                         // (tokens, hidden), becomes the sum before the last MLP
  void* change;                    // (tokens, hidden), that MLP's
  void *normed, *projected, *rotated, *attended, *gate_up, *gated;  // room
  float *query, *out;              // (tokens, query heads, dim), of a dtype that is not fp32
  int64_t count, tokens, repeats, hidden, is_bf16, activation;
  int64_t products_alone, numbers_alone, threads;  // up to which one thread works, and how many do else
  float most, inverse;                             // of int8 and fp8 pages
};
}

namespace {

template <typename T>
class Decoder {
 public:
  explicit Decoder(const LayersCall& call)
      : c_(call), do_(*call.operations), heads_(call.attention->heads), dim_(call.attention->dim),
        query_heads_(heads_ * call.attention->group) {}

  void run() {
    for (int64_t i = 0; i < c_.count; ++i) layer(c_.layers[i], i > 0);
  }

 private:
  void layer(const Layer& layer, bool has_change) {
    norm(layer.input_norm, layer.input_eps, has_change);
    product(layer.qkv, c_.normed, c_.projected);
    attend(layer);
    product(layer.out, c_.attended, c_.change);
    norm(layer.post_norm, layer.post_eps, true);
    product(layer.gate_up, c_.normed, c_.gate_up);
    const int64_t width = layer.down.in;
    do_.gated(c_.gate_up, static_cast<T*>(c_.gate_up) + width, c_.gated, c_.activation, c_.is_bf16,
              threads_for(c_.tokens * width), c_.tokens, width, 2 * width, 2 * width);
    product(layer.down, c_.gated, c_.change);
  }

  void norm(const void* weight, float eps, bool has_change) {
    do_.norm(c_.x, weight, has_change ? c_.change : nullptr, c_.normed, c_.tokens, 1, c_.hidden, c_.hidden, 0, eps,
             c_.is_bf16, threads_for(c_.tokens * c_.hidden));
  }

  void product(const Product& p, const void* x, void* to) {
    const bool alone = c_.tokens * p.outs * p.in <= c_.products_alone;
    do_.linear(x, p.weights, p.scales, p.bias, to, c_.tokens, p.in, p.outs, p.group, p.bits, c_.is_bf16,
               alone ? 1 : c_.threads);
  }

  // Norms and rotates the heads of q and k, writes k and v to their pages, and attends.
  void attend(const Layer& layer) {
    const int64_t both = query_heads_ + heads_, width = both + heads_, numbers = c_.tokens * both * dim_;
    T *projected = static_cast<T*>(c_.projected), *rotated = projected;
    int64_t token = width * dim_;
    if (layer.head_norm) {
      rotated = static_cast<T*>(c_.rotated);
      do_.norm(projected, layer.head_norm, nullptr, rotated, c_.tokens, both, dim_, token, dim_, layer.head_eps,
               c_.is_bf16, threads_for(numbers));
      token = both * dim_;
    }
    do_.rotary(rotated, c_.cos, c_.sin, rotated, c_.tokens, both, dim_, token, token, 0, c_.is_bf16,
               threads_for(numbers));
    write(rotated + query_heads_ * dim_, token, layer.k_pages, layer.k_scales);
    write(projected + both * dim_, width * dim_, layer.v_pages, layer.v_scales);
    AttentionCall call = *c_.attention;
    call.k = layer.k_pages;
    call.v = layer.v_pages;
    call.k_scales = layer.k_scales;
    call.v_scales = layer.v_scales;
    call.window = layer.window;
    call.scale = layer.scale;
    look(rotated, token, call);
  }

  void look(const float* q, int64_t token, AttentionCall& call) {
    call.q = q;
    call.q_token = token;
    call.out = static_cast<float*>(c_.attended);
    attended(do_.attention(&call));
    repeat(call.out);
  }

  void look(const Bf16* q, int64_t token, AttentionCall& call) {
    const int64_t width = query_heads_ * dim_;
    for (int64_t t = 0; t < c_.tokens; ++t)
      for (int64_t i = 0; i < width; i += kLanes) store(c_.query + t * width + i, load(q + t * token + i));
    call.q = c_.query;
    call.q_token = width;
    call.out = c_.out;
    attended(do_.attention(&call));
    repeat(c_.out);
    Bf16* to = static_cast<Bf16*>(c_.attended);
    for (int64_t i = 0; i < c_.tokens * width; i += kLanes) {
      const auto halves = nearest_halves(load(c_.out + i));
      std::memcpy(to + i, &halves, sizeof halves);
    }
  }

  static void attended(int answer) {
    if (answer == kNoMemory) throw std::bad_alloc();
    if (answer != kDone) throw std::invalid_argument("attention.cpp has nothing for heads of that size");
  }

  // The last token's result for those that only fill a bucket.
  void repeat(float* out) {
    const int64_t width = query_heads_ * dim_, last = c_.tokens - c_.repeats - 1;
    for (int64_t t = last + 1; t < c_.tokens; ++t) std::memcpy(out + t * width, out + last * width, width * sizeof *out);
  }

  void write(const T* from, int64_t token, void* pages, float* scales) {
    if (scales)
      do_.write_quantised(from, c_.rows, pages, scales, c_.tokens, heads_, token, dim_, c_.is_bf16,
                          c_.attention->numbers == 3, c_.most, c_.inverse);
    else
      do_.write(reinterpret_cast<const char*>(from), c_.rows, static_cast<char*>(pages), c_.tokens, heads_,
                token * sizeof(T), dim_ * sizeof(T));
  }

  int64_t threads_for(int64_t numbers) const { return numbers <= c_.numbers_alone ? 1 : c_.threads; }

  const LayersCall& c_;
  const Operations& do_;
  const int64_t heads_, dim_, query_heads_;
};

}  // namespace

extern "C" {

void run_layers(const LayersCall* call) {
  if (call->is_bf16)
    Decoder<Bf16>(*call).run();
  else
    Decoder<float>(*call).run();
}
}

BUILTIN(run_layers)
