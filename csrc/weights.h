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
        n_layer_(shape.n_layer),
        data_(arena.take<T>(n_layer_ * 12 * D_ * D_)) {}

  PackedMatrix<T> c_attn(int64_t layer) const { return matrix(layer, 0, 3, 1); }
  PackedMatrix<T> attn_c_proj(int64_t layer) const { return matrix(layer, 3, 1, 1); }
  PackedMatrix<T> c_fc(int64_t layer) const { return matrix(layer, 4, 4, 1); }
  PackedMatrix<T> mlp_c_proj(int64_t layer) const { return matrix(layer, 8, 1, 4); }

  void pack(const Block<const float>* blocks, int thread, int n_threads) const {
    for (int64_t layer = 0; layer < n_layer_; ++layer) {
      pack_share(blocks[layer].c_attn_weight, c_attn(layer), thread, n_threads);
      pack_share(blocks[layer].attn_c_proj_weight, attn_c_proj(layer), thread, n_threads);
      pack_share(blocks[layer].c_fc_weight, c_fc(layer), thread, n_threads);
      pack_share(blocks[layer].mlp_c_proj_weight, mlp_c_proj(layer), thread, n_threads);
    }
  }

 private:
  // Weights of a Linear from n_in * D to n_out * D features, at `offset` D * D in the block.
  PackedMatrix<T> matrix(int64_t layer, int64_t offset, int64_t n_out, int64_t n_in) const {
    T* data = data_ + (layer * 12 + offset) * D_ * D_;
    return direction_ == kForward ? PackedMatrix<T>{data, n_in * D_, n_out * D_}
                                  : PackedMatrix<T>{data, n_out * D_, n_in * D_};
  }

  void pack_share(const float* weight, const PackedMatrix<T>& dst, int thread,
                  int n_threads) const {
    const Range panels = split(dst.n_panels(), thread, n_threads);
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      if (direction_ == kForward) {
        pack_linear(weight, dst, p);
      } else {
        pack_linear_backward(weight, dst, p);
      }
    }
  }

  Direction direction_;
  int64_t D_;
  int64_t n_layer_;
  T* data_;
};

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
