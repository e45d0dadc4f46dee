// The loop's backward: forward.h in reverse, step by step over the window.
//
// Products are of two kinds: gradients of inputs, dx = dy w, tile by tile like the forward's; and
// gradients of weights, dw = dy^T x, summed per thread (weight_gradients.h) a chunk of rows at a
// time. Every phase but attention works on rows.
#pragma once

#include "activations.h"
#include "attention_backward.h"
#include "backward_buffers.h"
#include "gelu.h"
#include "injection.h"
#include "layer_norm.h"
#include "weight_gradients.h"
#include "weights.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// Input z of a step, [rows, D]: itself, or x_hat of the LayerNorm that made it.
struct StepInput {
  const float* z;  // null: recomputed from x_hat
  const float* x_hat;
};

// One loop step on one item, by one member of its team.
template <class T>
class BackwardStep {
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
  void run(const float* grad, const StepInput& input, const StepActivations<T>& saved) const {
    if (shape_.n_outputs == 0) {
      add_rows(grad, buffers_.dx);
    } else {
      read_out(grad, saved.final());
    }
    final_norm(saved.final());
    for (int64_t layer = shape_.n_layer - 1; layer >= 0; --layer) {
      const BlockActivations<T> block = saved.block(layer);
      for_each_chunk([&](Range chunk) {
        mlp(layer, block, chunk);
        attention_projection(layer, block, chunk);
      });
      team_.wait();  // for all rows' d_attn
      attention(block);
      team_.wait();  // for all heads' d_qkv
      for_each_chunk([&](Range chunk) { qkv(layer, block, input, chunk); });
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
    const float* ln_f_weight = inputs_.ln_f_weight;
    const float* ln_f_bias = inputs_.ln_f_bias;
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
          total = at::vec::fmadd(g, scale_and_shift(x_hat, ln_f_weight, ln_f_bias, j), total);
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
    const LayerNormBackward<float> ln{final.x_hat,
                                      final.rstd,
                                      inputs_.ln_f_weight,
                                      buffers_.dx,
                                      sums_.item_vectors.ln_f_weight(),
                                      sums_.item_vectors.ln_f_bias()};
    const int64_t D = D_;
    const float* dz = buffers_.dx;
    layer_norm_backward<false>(
        ln, D, rows_, [=](int64_t i, int64_t j) { return Vec::loadu(dz + i * D + j); });
  }

  // x2 = x1 + Wproj gelu(fc) + bias, fc = Wfc LN2(x1) + bias: turns dx of x2 into dx of x1.
  void mlp(int64_t layer, const BlockActivations<T>& block, Range chunk) const {
    const Block<const float>& w = inputs_.blocks[layer];
    const Block<float> grad = sums_.item_vectors.block(layer);
    const Block<float>& wanted = gradients_.blocks[layer];
    const BlockSums& sums = sums_.blocks[layer];
    const int64_t m = chunk.size(), width = 4 * D_;
    dx_to_operand(chunk, grad.mlp_c_proj_bias);
    const PackedMatrix<T> hidden{scratch_.right, scratch_.max_rows, width};
    const PackedMatrix<T> d_fc{scratch_.d_fc_right, scratch_.max_rows, width};
    multiply(scratch_.dx_operand, D_, weights_.mlp_c_proj(layer), {0, m}, scratch_.tile,
             [&](const Tile& tile) {
               const int64_t column = tile.columns.begin, row = tile.rows.begin;
               const int64_t packed = packed_offset<T>(row, 0, kPanel);
               gelu_tile(tile, block.fc + column * item_.rows() + (chunk.begin + row) * kPanel,
                         scratch_.d_fc + row * width + column, width,
                         d_fc.panel(column / kPanel) + packed,
                         hidden.panel(column / kPanel) + packed, grad.c_fc_bias + column);
             });
    if (wanted.mlp_c_proj_weight) {
      add_weight_gradient(sums.mlp_c_proj, scratch_.dx_operand, hidden, m);
    }
    multiply_into(scratch_.d_fc, width, weights_.c_fc(layer), {0, m}, scratch_.dy, false);
    const T* x_hat = block.x_hat_2 + chunk.begin * D_;
    if (wanted.c_fc_weight) {
      restore_norm(x_hat, w.ln_2_weight, w.ln_2_bias, m, scratch_.h);
      add_weight_gradient(sums.c_fc_t, scratch_.h, d_fc, m);
    }
    norm(x_hat, block.rstd_2, w.ln_2_weight, grad.ln_2_weight, grad.ln_2_bias, chunk);
  }

  // x1 = x0 + Wo attn + bias: fills d_attn.
  void attention_projection(int64_t layer, const BlockActivations<T>& block, Range chunk) const {
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

  void attention(const BlockActivations<T>& block) const {
    const int64_t S = shape_.seq_len, H = shape_.n_heads, head_dim = shape_.head_dim();
    const Range heads = team_.share(item_.n_sequences * H);
    for (int64_t index = heads.begin; index < heads.end; ++index) {
      const int64_t row = index / H * S, column = index % H * head_dim;
      const T* q = block.qkv + row * 3 * D_ + column;
      const Head<T> head{q, q + D_, q + 2 * D_, 3 * D_, S, head_dim};
      T* dq = buffers_.d_qkv + row * 3 * D_ + column;
      attention_backward(head, block.attn + row * D_ + column, buffers_.d_attn + row * D_ + column,
                         D_, block.log_sum_exp + index * S, dq, dq + D_, dq + 2 * D_,
                         scratch_.attention);
    }
  }

  // qkv = Wqkv LN1(x0) + bias: turns dx of x1 into dx of x0.
  void qkv(int64_t layer, const BlockActivations<T>& block, const StepInput& input,
           Range chunk) const {
    const Block<const float>& w = inputs_.blocks[layer];
    const Block<float> grad = sums_.item_vectors.block(layer);
    const bool wanted = gradients_.blocks[layer].c_attn_weight;
    const int64_t width = 3 * D_, m = chunk.size();
    const T* d_qkv = buffers_.d_qkv + chunk.begin * width;
    add_column_sums(d_qkv, m, width, grad.c_attn_bias);
    const T* x_hat = scratch_.x_hat;
    if (layer == 0) {
      norm_step_input(input, w.ln_1_weight, w.ln_1_bias, chunk);
    } else {
      x_hat = block.x_hat_1 + chunk.begin * D_;
      if (wanted) restore_norm(x_hat, w.ln_1_weight, w.ln_1_bias, m, scratch_.h);
    }
    if (wanted) {
      const PackedMatrix<T> d_qkv_right{scratch_.right, scratch_.max_rows, width};
      pack_rows(d_qkv, width, m, d_qkv_right);
      add_weight_gradient(sums_.blocks[layer].c_attn_t, scratch_.h, d_qkv_right, m);
    }
    multiply_into(d_qkv, width, weights_.c_attn(layer), {0, m}, scratch_.dy, false);
    norm(x_hat, block.rstd_1, w.ln_1_weight, grad.ln_1_weight, grad.ln_1_bias, chunk);
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
    restore_norm(input.x_hat + first, inputs_.ln_f_weight, inputs_.ln_f_bias, chunk.size(),
                 scratch_.dy);
    return scratch_.dy;
  }

  // Recomputes x_hat and h of a step's first LayerNorm.
  [[gnu::flatten]] void norm_step_input(const StepInput& input, const float* weight,
                                        const float* bias, Range chunk) const {
    const float* z = step_input(input, chunk);
    with_step_input(shape_, inputs_, item_.first_token() + chunk.begin, z, [&](auto x_0) {
      normalize_to_operands({0, chunk.size()}, D_, scratch_.dy, x_0, weight, bias, scratch_.x_hat,
                            scratch_.h, nullptr);
    });
  }

  // d_fc = d_hidden gelu'(fc) as left- and right-hand matrix, and gelu(fc) as right-hand matrix.
  // tile: d_hidden; fc: [rows][kPanel].
  static void gelu_tile(const Tile& tile, const T* fc, T* d_fc, int64_t ld, T* d_fc_right,
                        T* hidden_right, float* bias_sum) {
    const int64_t m = tile.rows.size();
    Vec total[kPanel / kVec];
    for (Vec& t : total) t = Vec(0.f);
    for (int64_t r = 0; r < m; r += 2) {
      for (int64_t j = 0; j < kPanel; j += kVec) {
        Vec d[2] = {Vec(0.f), Vec(0.f)}, hidden[2] = {Vec(0.f), Vec(0.f)};
        for (int64_t e = 0; e < 2 && r + e < m; ++e) {
          const auto gelu = gelu_and_derivative<T>(Operand<T>::load(fc + (r + e) * kPanel + j));
          hidden[e] = gelu.value;
          d[e] = gelu.derivative * Vec::loadu(tile.data + (r + e) * kPanel + j);
        }
        total[j / kVec] = total[j / kVec] + (d[0] + d[1]);
        const int64_t packed = packed_offset<T>(r, j, kPanel);
        Operand<T>::store_rows(d_fc_right + packed, kPanel, d_fc + r * ld + j, ld, d[0], d[1]);
        Operand<T>::store_rows(hidden_right + packed, kPanel, hidden[0], hidden[1]);
      }
    }
    for (int64_t j = 0; j < kPanel; j += kVec) add_to(bias_sum + j, total[j / kVec]);
  }

  // dx_operand = dx of the chunk; column_sums += its sum over rows.
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
      add_to(column_sums + j, total_0);
      add_to(column_sums + j + kVec, total_1);
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

  // out = x_hat * weight + bias: recomputes the output of a LayerNorm. Both [m, D].
  template <class In, class Out>
  void restore_norm(const In* x_hat, const float* weight, const float* bias, int64_t m,
                    Out* out) const {
    const int64_t D = D_;
    for (int64_t i = 0; i < m; ++i) {
      Out* row = out + i * D;
      const auto restored = [=](int64_t j) {
        return scale_and_shift(Operand<In>::load(x_hat + i * D + j), weight, bias, j);
      };
      for (int64_t j = 0; j < D; j += kStride) {
        Operand<Out>::store(row + j, restored(j), restored(j + kVec));
      }
    }
  }

  // Adds the gradient of a LayerNorm's input, given that of its output in dy, to dx of the chunk.
  void norm(const T* x_hat, const float* rstd, const float* weight, float* grad_weight,
            float* grad_bias, Range chunk) const {
    const int64_t D = D_;
    const LayerNormBackward<T> ln{
        x_hat, rstd + chunk.begin, weight, buffers_.dx + chunk.begin * D, grad_weight, grad_bias};
    const float* dy = scratch_.dy;
    layer_norm_backward<true>(ln, D, {0, chunk.size()}, [=](int64_t i, int64_t j) {
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
