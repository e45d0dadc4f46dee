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
// step starts from: x_hat_1 of its block 0 need not be saved. No product has x_hat as an operand:
// it is fp32, as where sublayers add little to large embeddings its rounding would be most of the
// error of the gradients.
struct FinalActivations {
  float* x_hat;  // [rows, D]
  float* rstd;   // [rows]
};

// An item's view of one step's activations over `n_tokens` tokens: operands
// [10 L - 1, n_tokens * D] of T and floats [D + (H + 2) L + 1, n_tokens].
template <class T>
struct StepActivations {
  static constexpr int64_t kWidths = 10;  // D-wide columns of a block: 1 + 3 + 1 + 1 + 4

  static int64_t n_operands(const LoopShape& p, int64_t n_tokens) {
    return (kWidths * p.n_layer - 1) * p.n_embd * n_tokens;
  }
  static int64_t n_floats(const LoopShape& p, int64_t n_tokens) {
    return (p.n_embd + (p.n_heads + 2) * p.n_layer + 1) * n_tokens;
  }

  const LoopShape& shape;
  int64_t n_tokens;
  int64_t first_token;
  T* operands;
  float* floats;

  BlockActivations<T> block(int64_t layer) const {
    const int64_t D = shape.n_embd, H = shape.n_heads;
    float* s = floats + (D + layer * (H + 2)) * n_tokens;
    const auto column = [&](int64_t offset, int64_t width) {
      const int64_t index = layer * kWidths - 1 + offset;  // block 0 has no column 0
      return operands + D * (index * n_tokens + width * first_token);
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

  FinalActivations final() const {
    const int64_t D = shape.n_embd, offset = D + (shape.n_heads + 2) * shape.n_layer;
    return {floats + D * first_token, floats + offset * n_tokens + first_token};
  }
};

// The item's part of what was saved at step `w` of the window.
template <class T>
inline StepActivations<T> saved_step(const LoopShape& p, const SavedActivations& saved, int64_t w,
                                     const Item& item) {
  const int64_t n = p.n_tokens();
  return {p, n, item.first_token(),
          static_cast<T*>(saved.operands) + w * StepActivations<T>::n_operands(p, n),
          saved.floats + w * StepActivations<T>::n_floats(p, n)};
}

// One item's activations in a workspace, for a backward that recomputes or follows at once.
template <class T>
inline StepActivations<T> scratch_step(const LoopShape& p, Arena& arena) {
  const int64_t n = rows_per_item(p);
  T* operands = arena.take<T>(StepActivations<T>::n_operands(p, n));
  return {p, n, 0, operands, arena.take<float>(StepActivations<T>::n_floats(p, n))};
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
