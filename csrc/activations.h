// Layout of the activations that the forward saves for the backward.
#pragma once

#include "engine.h"
#include "gemm.h"
#include "schedule.h"
#include "workspace.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// Activations of one item in one block of one loop step; null: not saved. `rows` are its tokens.
template <class T>
struct BlockActivations {
  T* x_hat_1;          // [rows, D], normalised by LayerNorm 1; null in block 0
  T* qkv;              // [rows, 3 D]
  T* attn;             // [rows, D], attention before its output projection
  T* x_hat_2;          // [rows, D], normalised by LayerNorm 2
  T* fc;               // [4 D / 64][rows][64], before GELU, in the order of the products' tiles
  float* rstd_1;       // [rows]
  float* rstd_2;       // [rows]
  float* log_sum_exp;  // [sequences, H, S], of attention, in base 2
};

// Activations of one item in the final LayerNorm of one loop step. x_hat gives z', which the next
// step starts from: x_hat_1 of its block 0 need not be saved.
template <class T>
struct FinalActivations {
  T* x_hat;      // [rows, D]
  float* rstd;   // [rows]
};

// An item's view of one step's activations over `n_tokens` tokens: activations
// [10 L, n_tokens * D] of T and statistics [(H + 2) L + 1, n_tokens] of float.
template <class T>
struct StepActivations {
  static constexpr int64_t kWidths = 10;  // D-wide columns of a block: 1 + 3 + 1 + 1 + 4

  static int64_t n_activations(const LoopShape& p, int64_t n_tokens) {
    return kWidths * p.n_layer * p.n_embd * n_tokens;
  }
  static int64_t n_statistics(const LoopShape& p, int64_t n_tokens) {
    return ((p.n_heads + 2) * p.n_layer + 1) * n_tokens;
  }

  const LoopShape& shape;
  int64_t n_tokens;
  int64_t first_token;
  T* activations;
  float* statistics;

  BlockActivations<T> block(int64_t layer) const {
    const int64_t D = shape.n_embd, H = shape.n_heads;
    T* a = activations + layer * kWidths * D * n_tokens;
    float* s = statistics + layer * (H + 2) * n_tokens;
    const auto column = [&](int64_t offset, int64_t width) {
      return a + D * (offset * n_tokens + width * first_token);
    };
    return {layer > 0 ? column(0, 1) : nullptr,
            column(1, 3),
            column(4, 1),
            column(5, 1),
            column(6, 4),
            s + first_token,
            s + n_tokens + first_token,
            s + 2 * n_tokens + H * first_token};
  }

  FinalActivations<T> final() const {
    float* s = statistics + (shape.n_heads + 2) * shape.n_layer * n_tokens;
    T* x_hat = activations + shape.n_embd * first_token;  // in place of block 0's x_hat_1
    return {x_hat, s + first_token};
  }
};

// The item's part of what was saved at step `w` of the window.
template <class T>
inline StepActivations<T> saved_step(const LoopShape& p, const SavedActivations& saved, int64_t w,
                                     const Item& item) {
  const int64_t n = p.n_tokens();
  return {p, n, item.first_token(),
          static_cast<T*>(saved.activations) + w * StepActivations<T>::n_activations(p, n),
          saved.statistics + w * StepActivations<T>::n_statistics(p, n)};
}

// One item's activations in a workspace, for a backward that recomputes or follows at once.
template <class T>
inline StepActivations<T> scratch_step(const LoopShape& p, Arena& arena) {
  const int64_t n = rows_per_item(p);
  T* activations = arena.take<T>(StepActivations<T>::n_activations(p, n));
  return {p, n, 0, activations, arena.take<float>(StepActivations<T>::n_statistics(p, n))};
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
