// The loop's backward: forward.h in reverse, step by step over the window.
//
// Products are of two kinds: gradients of inputs, dx = dy w, tile by tile like the forward's; and
// gradients of weights, dw = dy^T x, summed per thread (weight_gradients.h) a chunk of rows at a
// time. Every phase but attention works on rows.
#pragma once

#include "activations.h"
#include "attention_backward.h"
#include "backward_buffers.h"
#include "block_kinds.h"
#include "injection.h"
#include "rotation.h"
#include "weight_gradients.h"
#include "weights.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// Input z of a step, [rows, D]: itself, or x_hat of the norm that made it.
struct StepInput {
  const float* z;  // null: recomputed from x_hat
  const float* x_hat;
};

// One loop step on one item, by one member of its team. B: the kind of block.
template <class T, class B>
class BackwardStep {
  using Norm = typename B::Norm;
  using Mlp = typename B::Mlp;

 public:
  BackwardStep(const LoopShape& shape, const Inputs& inputs, const PackedWeights<T>& weights,
               const Gradients& gradients, const BackwardBuffers<T>& buffers,
               const BackwardScratch<T>& scratch, const ThreadSums& sums, const Item& item,
               const Team& team)
      : shape_(shape),
        inputs_(inputs),
        weights_(weights),
        gradients_(gradients),
        buffers_(buffers),
        scratch_(scratch),
        sums_(sums),
        item_(item),
        team_(team),
        D_(shape.n_embd),
        rows_(team.share(item.rows(), 2)) {}

  void begin_item() const {
    clear_rows(buffers_.dx);
    clear_rows(buffers_.dx_sum);
    if (has_embedding_sums()) clear_rows(gradients_.embeddings + first());
  }

  // Adds `grad`, of the step's output, to dx, the gradient of z'; turns dx into the gradient of z.
  // grad: the item's, [rows, D], or [rows, n_outputs] with a read-out.
  void run(const float* grad, const StepInput& input, const StepActivations<T, B>& saved) const {
    if (shape_.n_outputs == 0) {
      add_rows(grad, buffers_.dx);
    } else {
      read_out(grad, saved.final());
    }
    if constexpr (B::kNormBefore) final_norm(saved.final());
    for (int64_t layer = shape_.n_layer - 1; layer >= 0; --layer) {
      const BlockActivations<T, B> block = saved.block(layer);
      for_each_chunk([&](Range chunk) {
        if constexpr (!B::kNormBefore) norm_after(block.x_hat_2, block.rstd_2, chunk);
        mlp(layer, block, chunk);
        if constexpr (!B::kNormBefore) norm_after(block.x_hat_1, block.rstd_1, chunk);
        attention_projection(layer, block, chunk);
      });
      team_.wait();  // for all rows' d_attn
      attention(block);
      team_.wait();  // for all heads' d_qkv
      for_each_chunk([&](Range chunk) { qkv(layer, saved, input, chunk); });
      if (gradients_.embeddings && shape_.injection == Injection::kEveryBlock) {
        add_rows(buffers_.dx, gradients_.embeddings + first());
      }
    }
    add_rows(buffers_.dx, buffers_.dx_sum);
    if (shape_.injection == Injection::kMul) {
      for_each_chunk([&](Range chunk) { multiply_by_embeddings(input, chunk); });
    }
  }

  void end_item() const {
    for (int64_t i = rows_.begin; i < rows_.end; ++i) {
      const float* row = buffers_.dx_sum + i * D_;
      float* position = sums_.positions + i % shape_.seq_len * D_;
      for (int64_t j = 0; j < D_; j += kVec) add_to(position + j, Vec::loadu(row + j));
    }
    if (gradients_.embeddings && shape_.injection == Injection::kAdd) {
      copy_rows(buffers_.dx_sum, gradients_.embeddings + first());
    }
    if (gradients_.state) copy_rows(buffers_.dx, gradients_.state + first());
    sums_.end_item();
  }

 private:
  bool has_embedding_sums() const {
    return gradients_.embeddings && (shape_.injection == Injection::kMul ||
                                     shape_.injection == Injection::kEveryBlock);
  }
  int64_t first() const { return item_.first_token() * D_; }

  template <class F>
  void for_each_chunk(F&& f) const {
    const int64_t n = rows_.size(), size = scratch_.max_rows;
    const int64_t n_chunks = (n + size - 1) / size;
    for (int64_t i = 0; i < n_chunks; ++i) {
      const Range part = split(n, i, n_chunks, 2);
      f(Range{rows_.begin + part.begin, rows_.begin + part.end});
    }
  }

  // predictions = z' w^T + bias: adds to dx of z', from grad [rows, n_outputs].
  void read_out(const float* grad, const FinalActivations& final) const {
    const int64_t D = D_, n_outputs = shape_.n_outputs;
    const Norm norm = last_norm();
    float* dx = buffers_.dx;
    for (int64_t o = 0; o < n_outputs; ++o) {
      const float* weight = inputs_.read_out_weight + o * D;
      float* weight_sum = sums_.item_vectors.read_out_weight() + o * D;
      for (int64_t j = 0; j < D; j += kVec) {
        const Vec w = Vec::loadu(weight + j);
        Vec total(0.f);
        for (int64_t i = rows_.begin; i < rows_.end; ++i) {
          const Vec g(grad[i * n_outputs + o]);
          const Vec x_hat = Vec::loadu(final.x_hat + i * D + j);
          total = at::vec::fmadd(g, norm(x_hat, j), total);
          add_to(dx + i * D + j, g * w);
        }
        add_to(weight_sum + j, total);
      }
      double bias = 0.0;  // terms may nearly cancel
      for (int64_t i = rows_.begin; i < rows_.end; ++i) bias += grad[i * n_outputs + o];
      sums_.item_vectors.read_out_bias()[o] += static_cast<float>(bias);
    }
  }

  [[gnu::flatten]] void final_norm(const FinalActivations& final) const {
    const NormBackward<float> in{final.x_hat, final.rstd, buffers_.dx,
                                 sums_.item_vectors.ln_f_weight(),
                                 sums_.item_vectors.ln_f_bias()};
    const int64_t D = D_;
    const float* dz = buffers_.dx;
    norm_backward<false>(last_norm(), in, D, rows_,
                         [=](int64_t i, int64_t j) { return Vec::loadu(dz + i * D + j); });
  }

  // The norm that makes z'.
  Norm last_norm() const { return {inputs_.ln_f_weight, inputs_.ln_f_bias}; }

  // x = norm(y): turns dx of x into that of y.
  [[gnu::flatten]] void norm_after(const float* x_hat, const float* rstd, Range chunk) const {
    const NormBackward<float> in{x_hat, rstd, buffers_.dx, nullptr, nullptr};
    const int64_t D = D_;
    const float* dy = buffers_.dx;
    norm_backward<false>(Norm{nullptr, nullptr}, in, D, chunk,
                         [=](int64_t i, int64_t j) { return Vec::loadu(dy + i * D + j); });
  }

  // The MLP with its residual: turns dx of its sum into dx of x1.
  void mlp(int64_t layer, const BlockActivations<T, B>& block, Range chunk) const {
    const Block<const float>& w = inputs_.blocks[layer];
    const Block<float> grad = sums_.item_vectors.block(layer);
    const Block<float>& wanted = gradients_.blocks[layer];
    const BlockSums& sums = sums_.blocks[layer];
    const int64_t m = chunk.size(), width = shape_.fc_width;
    dx_to_operand(chunk, grad.mlp_c_proj_bias);
    const PackedMatrix<T> hidden{scratch_.right, scratch_.max_rows, shape_.n_hidden};
    const PackedMatrix<T> d_fc{scratch_.d_fc_right, scratch_.max_rows, width};
    multiply(scratch_.dx_operand, D_, weights_.mlp_c_proj(layer), {0, m}, scratch_.tile,
             [&](const Tile& tile) {
               const int64_t row = tile.rows.begin;
               Mlp::backward(tile, block.fc + (chunk.begin + row) * kPanel, item_.rows() * kPanel,
                             MlpGradient<T>{scratch_.d_fc + row * width, width, d_fc, hidden,
                                            grad.c_fc_bias});
             });
    if (wanted.mlp_c_proj_weight) {
      add_weight_gradient(sums.mlp_c_proj, scratch_.dx_operand, hidden, m);
    }
    add_input_gradient(scratch_.d_fc, weights_.c_fc(layer), chunk);
    const auto* x_hat = (B::kNormBefore ? block.x_hat_2 : block.x_hat_1) + chunk.begin * D_;
    const Norm norm_2{w.ln_2_weight, w.ln_2_bias};
    if (wanted.c_fc_weight) {
      restore_norm(x_hat, norm_2, m, scratch_.h);
      add_weight_gradient(sums.c_fc_t, scratch_.h, d_fc, m);
    }
    if constexpr (B::kNormBefore) {
      norm_before(norm_2, x_hat, block.rstd_2, grad.ln_2_weight, grad.ln_2_bias, chunk);
    }
  }

  // The gradient of a sublayer's input, dy w: in scratch dy where a norm made the input, else added
  // to dx of the chunk.
  void add_input_gradient(const T* dy, const PackedMatrix<T>& w, Range chunk) const {
    float* to = B::kNormBefore ? scratch_.dy : buffers_.dx + chunk.begin * D_;
    multiply_into(dy, w.depth, w, {0, chunk.size()}, to, !B::kNormBefore);
  }

  // x1 = x0 + Wo attn + bias: fills d_attn.
  void attention_projection(int64_t layer, const BlockActivations<T, B>& block, Range chunk) const {
    dx_to_operand(chunk, sums_.item_vectors.block(layer).attn_c_proj_bias);
    if (gradients_.blocks[layer].attn_c_proj_weight) {
      const PackedMatrix<T> attn{scratch_.right, scratch_.max_rows, D_};
      pack_rows(block.attn + chunk.begin * D_, D_, chunk.size(), attn);
      add_weight_gradient(sums_.blocks[layer].attn_c_proj, scratch_.dx_operand, attn,
                          chunk.size());
    }
    multiply(scratch_.dx_operand, D_, weights_.attn_c_proj(layer), {0, chunk.size()},
             scratch_.tile, [&](const Tile& tile) {
               for (int64_t r = 0; r < tile.rows.size(); ++r) {
                 T* row = buffers_.d_attn + (chunk.begin + tile.rows.begin + r) * D_;
                 for (int64_t j = 0; j < tile.columns.size(); j += kStride) {
                   const float* from = tile.data + r * kPanel + j;
                   Operand<T>::store(row + tile.columns.begin + j, Vec::loadu(from),
                                     Vec::loadu(from + kVec));
                 }
               }
             });
  }

  void attention(const BlockActivations<T, B>& block) const {
    const int64_t S = shape_.seq_len, H = shape_.n_heads, head_dim = shape_.head_dim();
    const Range heads = team_.share(item_.n_sequences * H);
    for (int64_t index = heads.begin; index < heads.end; ++index) {
      const int64_t row = index / H * S, column = index % H * head_dim;
      const T* q = block.qkv + row * 3 * D_ + column;
      const Head<T> head{q, q + D_, q + 2 * D_, 3 * D_, S, head_dim};
      const auto backward = [&](auto attention_backward) {
        T* dq = buffers_.d_qkv + row * 3 * D_ + column;
        attention_backward(head, block.attn + row * D_ + column,
                           buffers_.d_attn + row * D_ + column, D_, block.softmax_of(index, S), dq,
                           dq + D_, dq + 2 * D_, rotation_of(shape_, inputs_), scratch_.attention);
      };
      if (shape_.mask == Mask::kCausal) {
        backward(attention_backward<Mask::kCausal, T>);
      } else {
        backward(attention_backward<Mask::kFull, T>);
      }
    }
  }

  // q, k and v: turns dx of x1, before its norm if it has one, into dx of x0.
  void qkv(int64_t layer, const StepActivations<T, B>& saved, const StepInput& input,
           Range chunk) const {
    const BlockActivations<T, B> block = saved.block(layer);
    const Block<const float>& w = inputs_.blocks[layer];
    const Block<float> grad = sums_.item_vectors.block(layer);
    const bool wanted = gradients_.blocks[layer].c_attn_weight;
    const int64_t width = 3 * D_, m = chunk.size();
    const T* d_qkv = buffers_.d_qkv + chunk.begin * width;
    const Norm norm_1{w.ln_1_weight, w.ln_1_bias};
    const T* x_hat = scratch_.x_hat;
    if constexpr (!B::kNormBefore) {
      if (wanted) block_input(layer, saved, input, chunk);
    } else {
      add_column_sums(d_qkv, m, width, grad.c_attn_bias);
      if (layer == 0) {
        norm_step_input(input, norm_1, chunk);
      } else {
        x_hat = block.x_hat_1 + chunk.begin * D_;
        if (wanted) restore_norm(x_hat, norm_1, m, scratch_.h);
      }
    }
    if (wanted) {
      const PackedMatrix<T> d_qkv_right{scratch_.right, scratch_.max_rows, width};
      pack_rows(d_qkv, width, m, d_qkv_right);
      add_weight_gradient(sums_.blocks[layer].c_attn_t, scratch_.h, d_qkv_right, m);
    }
    add_input_gradient(d_qkv, weights_.c_attn(layer), chunk);
    if constexpr (B::kNormBefore) {
      norm_before(norm_1, x_hat, block.rstd_1, grad.ln_1_weight, grad.ln_1_bias, chunk);
    }
  }

  // Recomputes h = x0 of a block without a norm before attention.
  [[gnu::flatten]] void block_input(int64_t layer, const StepActivations<T, B>& saved,
                                    const StepInput& input, Range chunk) const {
    const int64_t D = D_;
    const auto store = [&](auto x_0) {
      copy_to_operands({0, chunk.size()}, D, x_0, scratch_.dy, scratch_.h);
    };
    if (layer == 0) {
      with_step_input(shape_, inputs_, item_.first_token() + chunk.begin, step_input(input, chunk),
                      store);
      return;
    }
    const float* x = saved.block(layer - 1).x_hat_2 + chunk.begin * D;
    const float* e = inputs_.embeddings + first() + chunk.begin * D;
    const bool every_block = shape_.injection == Injection::kEveryBlock;
    store([=](int64_t i, int64_t j) {
      const Vec x_0 = Vec::loadu(x + i * D + j);
      return every_block ? x_0 + Vec::loadu(e + i * D + j) : x_0;
    });
  }

  // x0 = z e + p: turns dx of x0 into dx of z; adds to the gradient of e.
  void multiply_by_embeddings(const StepInput& input, Range chunk) const {
    const float* z = step_input(input, chunk);
    float* dx_of_chunk = buffers_.dx + chunk.begin * D_;
    const int64_t offset = first() + chunk.begin * D_;
    float* of_embeddings = gradients_.embeddings ? gradients_.embeddings + offset : nullptr;
    for (int64_t at = 0; at < chunk.size() * D_; at += kVec) {
      const Vec dx = Vec::loadu(dx_of_chunk + at);
      if (of_embeddings) add_to(of_embeddings + at, dx * Vec::loadu(z + at));
      (dx * Vec::loadu(inputs_.embeddings + offset + at)).store(dx_of_chunk + at);
    }
  }

  // The chunk's rows of z.
  const float* step_input(const StepInput& input, Range chunk) const {
    const int64_t first = chunk.begin * D_;
    if (input.z) return input.z + first;
    restore_norm(input.x_hat + first, last_norm(), chunk.size(), scratch_.dy);
    return scratch_.dy;
  }

  // Recomputes x_hat and h of a step's first LayerNorm.
  [[gnu::flatten]] void norm_step_input(const StepInput& input, const Norm& norm,
                                        Range chunk) const {
    const float* z = step_input(input, chunk);
    with_step_input(shape_, inputs_, item_.first_token() + chunk.begin, z, [&](auto x_0) {
      normalize_to_operands({0, chunk.size()}, D_, shape_.norm_eps, scratch_.dy, x_0, norm,
                            scratch_.x_hat, scratch_.h, nullptr);
    });
  }

  // dx_operand = dx of the chunk; column_sums += its sum over rows, if there are biases.
  void dx_to_operand(Range chunk, float* column_sums) const {
    const int64_t D = D_, m = chunk.size();
    const float* from = buffers_.dx + chunk.begin * D;
    T* to = scratch_.dx_operand;
    for (int64_t j = 0; j < D; j += kStride) {
      Vec total_0(0.f), total_1(0.f);
      for (int64_t i = 0; i < m; ++i) {
        const Vec dx_0 = Vec::loadu(from + i * D + j), dx_1 = Vec::loadu(from + i * D + j + kVec);
        Operand<T>::store(to + i * D + j, dx_0, dx_1);
        total_0 = total_0 + dx_0;
        total_1 = total_1 + dx_1;
      }
      if constexpr (B::kNormBefore) {
        add_to(column_sums + j, total_0);
        add_to(column_sums + j + kVec, total_1);
      }
    }
  }

  static void add_column_sums(const T* rows, int64_t m, int64_t width, float* column_sums) {
    for (int64_t j = 0; j < width; j += kStride) {
      Vec total_0(0.f), total_1(0.f);
      for (int64_t i = 0; i < m; ++i) {
        const T* row = rows + i * width + j;
        total_0 = total_0 + Operand<T>::load(row);
        total_1 = total_1 + Operand<T>::load(row + kVec);
      }
      add_to(column_sums + j, total_0);
      add_to(column_sums + j + kVec, total_1);
    }
  }

  // sums += left^T right over the chunk's m rows. left: [m, D].
  void add_weight_gradient(const TiledMatrix& sums, const T* left, const PackedMatrix<T>& right,
                           int64_t m) const {
    transpose_rows(left, D_, m, D_, scratch_.left, scratch_.max_rows);
    add_product(sums, scratch_.left, scratch_.max_rows, right, round_up_to_pack<T>(m));
  }

  // Recomputes the output of a norm. Both [m, D].
  template <class In, class Out>
  void restore_norm(const In* x_hat, const Norm norm, int64_t m, Out* out) const {
    const int64_t D = D_;
    for (int64_t i = 0; i < m; ++i) {
      Out* row = out + i * D;
      const auto restored = [=](int64_t j) {
        return norm(Operand<In>::load(x_hat + i * D + j), j);
      };
      for (int64_t j = 0; j < D; j += kStride) {
        Operand<Out>::store(row + j, restored(j), restored(j + kVec));
      }
    }
  }

  // Adds the gradient of a norm's input, given that of its output in dy, to dx of the chunk.
  void norm_before(const Norm& norm, const T* x_hat, const float* rstd, float* grad_weight,
                   float* grad_bias, Range chunk) const {
    const int64_t D = D_;
    const NormBackward<T> in{x_hat, rstd + chunk.begin, buffers_.dx + chunk.begin * D, grad_weight,
                             grad_bias};
    const float* dy = scratch_.dy;
    norm_backward<true>(norm, in, D, {0, chunk.size()}, [=](int64_t i, int64_t j) {
      return Vec::loadu(dy + i * D + j);
    });
  }

  void clear_rows(float* dst) const {
    std::fill(dst + rows_.begin * D_, dst + rows_.end * D_, 0.f);
  }
  void copy_rows(const float* src, float* dst) const {
    std::copy(src + rows_.begin * D_, src + rows_.end * D_, dst + rows_.begin * D_);
  }
  void add_rows(const float* src, float* dst) const {
    for (int64_t j = rows_.begin * D_; j < rows_.end * D_; j += kVec) {
      add_to(dst + j, Vec::loadu(src + j));
    }
  }

  const LoopShape& shape_;
  const Inputs& inputs_;
  const PackedWeights<T>& weights_;
  const Gradients& gradients_;
  const BackwardBuffers<T>& buffers_;
  const BackwardScratch<T>& scratch_;
  const ThreadSums& sums_;
  const Item item_;
  const Team team_;
  const int64_t D_;
  const Range rows_;
};

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
