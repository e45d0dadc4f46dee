// Layout of the activations that the forward saves for the backward.
#pragma once

#include <type_traits>

#include "attention.h"
#include "block_kinds.h"
#include "engine.h"
#include "gemm.h"
#include "schedule.h"
#include "workspace.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// The type of a block's saved x_hat. With norms before sublayers it is an operand of products.
// Behind them it is the residual stream itself, as it is in the final norm of a step: rounding it
// would be most of the error of the gradients where sublayers add little.
template <class T, class B>
using XHat = std::conditional_t<B::kNormBefore, T, float>;

// Activations of one item in one block of one loop step; null: not saved. `rows` are its tokens.
template <class T, class B>
struct BlockActivations {
  XHat<T, B>* x_hat_1;  // [rows, D], normalised by norm 1; null before sublayers in block 0
  T* qkv;               // [rows, 3 D]
  T* attn;              // [rows, D], attention before its output projection
  XHat<T, B>* x_hat_2;  // [rows, D], normalised by norm 2
  T* fc;                // [fc_width / 64][rows][64], the MLP's middle, in the order of tiles
  float* rstd_1;        // [rows]
  float* rstd_2;        // [rows]
  float* softmax;       // [sequences, H, 2, S], of attention

  // Of head `index` of the item, counted over its sequences.
  SoftmaxStatistics softmax_of(int64_t index, int64_t seq_len) const {
    if (!softmax) return {};
    float* maximum = softmax + index * 2 * seq_len;
    return {maximum, maximum + seq_len};
  }
};

// Activations of one item in the last norm of one loop step. x_hat gives z', which the next step
// starts from: x_hat_1 of a LayerNorm in its block 0 need not be saved.
struct FinalActivations {
  float* x_hat;  // [rows, D]
  float* rstd;   // [rows]
};

// An item's view of one step's activations over `n_tokens` tokens: a column of operands or floats
// holds one number for each of them.
template <class T, class B>
struct StepActivations {
  // Columns of operands in a block: qkv, attn and fc, and both x_hat unless they are floats; block 0
  // has none for x_hat_1.
  static int64_t block_operands(const LoopShape& p) {
    return (B::kNormBefore ? 6 : 4) * p.n_embd + p.fc_width;
  }
  static int64_t n_operands(const LoopShape& p) {
    return p.n_layer * block_operands(p) - (B::kNormBefore ? p.n_embd : 0);
  }
  // Columns of floats: x_hat of the final norm, or of all norms behind sublayers; softmax, rstd_1 and
  // rstd_2 of each block; rstd of the final norm.
  static int64_t n_x_hats(const LoopShape& p) { return B::kNormBefore ? 1 : 2 * p.n_layer; }
  static int64_t block_floats(const LoopShape& p) { return 2 * p.n_heads + 2; }
  static int64_t n_floats(const LoopShape& p) {
    return n_x_hats(p) * p.n_embd + p.n_layer * block_floats(p) + (B::kNormBefore ? 1 : 0);
  }

  const LoopShape& shape;
  int64_t n_tokens;
  int64_t first_token;
  T* operands;
  float* floats;

  BlockActivations<T, B> block(int64_t layer) const {
    const int64_t D = shape.n_embd, start = layer * block_operands(shape);
    const auto of_operands = [&](int64_t offset, int64_t width) {
      const int64_t column = start + offset - (B::kNormBefore ? D : 0);
      return operands + column * n_tokens + width * first_token;
    };
    float* s = floats_behind(layer);
    BlockActivations<T, B> block;
    block.rstd_1 = s + first_token;
    block.rstd_2 = s + n_tokens + first_token;
    block.softmax = s + 2 * n_tokens + 2 * shape.n_heads * first_token;
    if constexpr (B::kNormBefore) {
      block.x_hat_1 = layer > 0 ? of_operands(0, D) : nullptr;
      block.x_hat_2 = of_operands(D, D);
    } else {
      block.x_hat_1 = x_hat(2 * layer);
      block.x_hat_2 = x_hat(2 * layer + 1);
    }
    const int64_t next = B::kNormBefore ? 2 * D : 0;
    block.qkv = of_operands(next, 3 * D);
    block.attn = of_operands(next + 3 * D, D);
    block.fc = of_operands(next + 4 * D, shape.fc_width);
    return block;
  }

  FinalActivations final() const {
    if constexpr (B::kNormBefore) {
      return {x_hat(0), floats_behind(shape.n_layer) + first_token};
    } else {
      const BlockActivations<T, B> last = block(shape.n_layer - 1);
      return {last.x_hat_2, last.rstd_2};
    }
  }

  float* x_hat(int64_t index) const {
    return floats + shape.n_embd * (index * n_tokens + first_token);
  }
  float* floats_behind(int64_t layer) const {
    const int64_t column = n_x_hats(shape) * shape.n_embd + layer * block_floats(shape);
    return floats + column * n_tokens;
  }
};

// The item's part of what was saved at step `w` of the window.
template <class T, class B>
inline StepActivations<T, B> saved_step(const LoopShape& p, const SavedActivations& saved, int64_t w,
                                     const Item& item) {
  const int64_t n = p.n_tokens();
  return {p, n, item.first_token(),
          static_cast<T*>(saved.operands) + w * StepActivations<T, B>::n_operands(p) * n,
          saved.floats + w * StepActivations<T, B>::n_floats(p) * n};
}

// One item's activations in a workspace, for a backward that recomputes or follows at once.
template <class T, class B>
inline StepActivations<T, B> scratch_step(const LoopShape& p, Arena& arena) {
  const int64_t n = rows_per_item(p);
  T* operands = arena.take<T>(StepActivations<T, B>::n_operands(p) * n);
  return {p, n, 0, operands, arena.take<float>(StepActivations<T, B>::n_floats(p) * n)};
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
