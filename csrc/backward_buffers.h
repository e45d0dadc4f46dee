// Buffers of the backward, besides gradient sums and saved activations.
#pragma once

#include "attention_backward.h"
#include "gemm.h"
#include "schedule.h"
#include "workspace.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// Gradients that the team of an item shares; fp32 for the residual stream.
template <class T>
struct BackwardBuffers {
  float* dx;      // [rows, D], at the point that the backward has reached
  float* dx_sum;  // [rows, D], of x0, summed over steps
  T* d_attn;      // [rows, D], of attention before its output projection
  T* d_qkv;       // [rows, 3 D]

  BackwardBuffers(Arena& arena, const LoopShape& p)
      : dx(arena.take<float>(rows_per_item(p) * p.n_embd)),
        dx_sum(arena.take<float>(rows_per_item(p) * p.n_embd)),
        d_attn(arena.take<T>(rows_per_item(p) * p.n_embd)),
        d_qkv(arena.take<T>(rows_per_item(p) * p.n_embd * 3)) {}
};

// Buffers of one thread, for a chunk of at most kChunkRows rows.
template <class T>
struct BackwardScratch {
  static constexpr int64_t kChunkRows = 256;

  int64_t max_rows;  // of a chunk; even
  float* tile;       // [kTileRows][kPanel]
  T* dx_operand;     // [max_rows, D], dx as left-hand matrix
  T* x_hat;          // [max_rows, D], of a LayerNorm, recomputed
  T* h;              // [max_rows, D], a sublayer's input, recomputed
  T* d_fc;           // [max_rows, fc_width]
  float* dy;         // [max_rows, D], gradient of h; before that, z
  T* left;           // [D][max_rows], transposed left-hand side of a weight's gradient
  T* right;          // [max_rows, F or 3 D] in panels, the right-hand side
  T* d_fc_right;     // [max_rows, fc_width], likewise
  AttentionBackwardScratch<T> attention;

  BackwardScratch(Arena& arena, const LoopShape& p)
      : max_rows((std::min(kChunkRows, rows_per_item(p)) + 1) / 2 * 2),
        tile(arena.take<float>(kTileRows * kPanel)),
        dx_operand(arena.take<T>(max_rows * p.n_embd)),
        x_hat(arena.take<T>(max_rows * p.n_embd)),
        h(arena.take<T>(max_rows * p.n_embd)),
        d_fc(arena.take<T>(max_rows * p.fc_width)),
        dy(arena.take<float>(max_rows * p.n_embd)),
        left(arena.take<T>(max_rows * p.n_embd)),
        right(arena.take<T>(max_rows * std::max(p.n_hidden, 3 * p.n_embd))),
        d_fc_right(arena.take<T>(max_rows * p.fc_width)),
        attention(arena, p.seq_len, p.head_dim()) {}
};

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
