// Weights as right-hand matrices of products, packed once per call and shared by all threads.
#pragma once

#include "engine.h"
#include "pack.h"
#include "workspace.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// The four matrices of every block, for the forward (x w^T) or the backward (dy w).
template <class T>
class PackedWeights {
 public:
  enum Direction { kForward, kBackward };

  PackedWeights(Arena& arena, const LoopShape& shape, Direction direction)
      : direction_(direction),
        D_(shape.n_embd),
        F_(shape.n_hidden),
        fc_width_(shape.fc_width),
        n_layer_(shape.n_layer),
        fc_order_(fc_order(shape)),
        data_(arena.take<T>(n_layer_ * block_size())) {}

  PackedMatrix<T> c_attn(int64_t layer) const { return matrix(layer, 0, 3 * D_, D_); }
  PackedMatrix<T> attn_c_proj(int64_t layer) const { return matrix(layer, 3 * D_ * D_, D_, D_); }
  PackedMatrix<T> c_fc(int64_t layer) const { return matrix(layer, 4 * D_ * D_, fc_width_, D_); }
  PackedMatrix<T> mlp_c_proj(int64_t layer) const {
    return matrix(layer, (4 * D_ + fc_width_) * D_, D_, F_);
  }

  void pack(const Block<const float>* blocks, int thread, int n_threads) const {
    for (int64_t layer = 0; layer < n_layer_; ++layer) {
      const Block<const float>& w = blocks[layer];
      pack_share(w.c_attn_weight, RowOrder{}, c_attn(layer), thread, n_threads);
      pack_share(w.attn_c_proj_weight, RowOrder{}, attn_c_proj(layer), thread, n_threads);
      pack_share(w.c_fc_weight, fc_order_, c_fc(layer), thread, n_threads);
      pack_share(w.mlp_c_proj_weight, RowOrder{}, mlp_c_proj(layer), thread, n_threads);
    }
  }

 private:
  int64_t block_size() const { return (4 * D_ + fc_width_ + F_) * D_; }

  // Weights of a Linear from n_in to n_out features, at `offset` in the block.
  PackedMatrix<T> matrix(int64_t layer, int64_t offset, int64_t n_out, int64_t n_in) const {
    T* data = data_ + layer * block_size() + offset;
    return direction_ == kForward ? PackedMatrix<T>{data, n_in, n_out}
                                  : PackedMatrix<T>{data, n_out, n_in};
  }

  void pack_share(const float* weight, RowOrder order, const PackedMatrix<T>& dst, int thread,
                  int n_threads) const {
    const Range panels = split(dst.n_panels(), thread, n_threads);
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      if (direction_ == kForward) {
        pack_linear(weight, order, dst, p);
      } else {
        pack_linear_backward(weight, order, dst, p);
      }
    }
  }

  Direction direction_;
  int64_t D_;
  int64_t F_;
  int64_t fc_width_;
  int64_t n_layer_;
  RowOrder fc_order_;
  T* data_;
};

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
