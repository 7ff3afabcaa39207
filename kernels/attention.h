// What attention.cpp is asked for.

#pragma once

#include <cstdint>

extern "C" {

// What attention_forward and attention_backward return; kMissing: there is no function for heads of that size.
enum { kDone = 0, kMissing = 1, kNoMemory = 2 };

struct AttentionCall {
  const float* q;  // token t, head h at t * q_token + h * dim
  const void* k;   // packed: token t, head h at t * k_token + h * dim; pages: (P, heads, page, dim)
  const void* v;
  float* out;             // (tokens, query heads, dim)
  const float* sinks;     // (query heads,) or null
  const int64_t* starts;  // of sequences: row of the first query
  const int64_t* query_lens;
  const int64_t* context_lens;
  const int64_t* page_table;     // (sequences, table_width) or null
  const int64_t* prefix_starts;  // packed: row of position 0 of what a sequence goes on from, or null
  const float* grad;             // the backward's: of out
  float* dq;                     // (tokens, query heads, dim)
  float* dk;                     // (tokens, heads, dim), zeros at first
  float* dv;
  float* dsinks;          // (tokens, query heads)
  const float* k_scales;  // of int8 and fp8: (P, heads, page)
  const float* v_scales;
  int64_t sequences, heads, group, dim, q_token, k_token, v_token, table_width, page_tokens;
  int64_t window;  // 0: none
  int64_t threads;
  int64_t numbers;  // k and v: 0 fp32, 1 bf16; in pages 2 int8, 3 fp8
  float scale;
};
}
