// The loop's forward:
//
//     x0 = inject(z, e) + p ;  per block x1 and x2, and at the end z': see block_kinds.h
//     predictions = z' Wout^T + bias, if there is a read-out
//
// Every phase but attention works on rows, and a thread does its own rows of the team's item.
#pragma once

#include "activations.h"
#include "attention.h"
#include "block_kinds.h"
#include "injection.h"
#include "rotation.h"
#include "weights.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// Buffers that the team of an item shares.
template <class T>
struct ForwardBuffers {
  float* x;  // [rows, D], residual stream
  T* h;      // [rows, D], operand: a sublayer's input
  T* qkv;    // [rows, 3 D], used if activations are not saved
  T* attn;   // [rows, D], likewise

  ForwardBuffers(Arena& arena, const LoopShape& p)
      : x(arena.take<float>(rows_per_item(p) * p.n_embd)),
        h(arena.take<T>(rows_per_item(p) * p.n_embd)),
        qkv(arena.take<T>(rows_per_item(p) * p.n_embd * 3)),
        attn(arena.take<T>(rows_per_item(p) * p.n_embd)) {}
};

// Buffers of one thread.
template <class T>
struct ForwardScratch {
  static constexpr int64_t kMlpRows = 96;  // rows of the hidden layer that are in cache at a time

  float* tile;  // [kTileRows][kPanel]
  T* hidden;    // [kMlpRows, F], input of the MLP's second product
  AttentionScratch<T> attention;

  ForwardScratch(Arena& arena, const LoopShape& p)
      : tile(arena.take<float>(kTileRows * kPanel)),
        hidden(arena.take<T>(kMlpRows * p.n_hidden)),
        attention(arena, p.seq_len - p.n_queries, p.head_dim()) {}
};

// One loop step on one item, by one member of its team. B: the kind of block.
template <class T, class B>
class ForwardStep {
  using Norm = typename B::Norm;
  using Mlp = typename B::Mlp;

 public:
  ForwardStep(const LoopShape& shape, const Inputs& inputs, const PackedWeights<T>& weights,
              const ForwardBuffers<T>& buffers, const ForwardScratch<T>& scratch, const Item& item,
              const Team& team)
      : shape_(shape),
        inputs_(inputs),
        weights_(weights),
        buffers_(buffers),
        scratch_(scratch),
        item_(item),
        team_(team),
        D_(shape.n_embd),
        rows_(team.share(item.rows(), 2)) {}

  // z and z_next: the item's, [rows, D]; may be the same. `saved`: null to save nothing.
  void run(const float* z, float* z_next, const StepActivations<T, B>* saved) const {
    for (int64_t layer = 0; layer < shape_.n_layer; ++layer) {
      BlockActivations<T, B> block{};
      if (saved) {
        block = saved->block(layer);
      } else {
        block.qkv = buffers_.qkv;
        block.attn = buffers_.attn;
      }
      enter_block(layer, z, block);
      attention(layer, block);
      mlp(layer, block);
      if constexpr (!B::kNormBefore) {
        const bool is_last = layer == shape_.n_layer - 1;
        norm_after(is_last ? z_next : buffers_.x, block.x_hat_2, block.rstd_2);
      }
    }
    if constexpr (B::kNormBefore) final_norm(z_next, saved);
  }

  // z: [rows, D], predictions: [rows, n_outputs], the item's.
  void read_out(const float* z, float* predictions) const {
    const int64_t D = D_, n_outputs = shape_.n_outputs;
    for (int64_t i = rows_.begin; i < rows_.end; ++i) {
      for (int64_t o = 0; o < n_outputs; ++o) {
        const float* weight = inputs_.read_out_weight + o * D;
        Vec sum_0(0.f), sum_1(0.f);
        for (int64_t j = 0; j < D; j += kStride) {
          const float* row = z + i * D + j;
          sum_0 = at::vec::fmadd(Vec::loadu(row), Vec::loadu(weight + j), sum_0);
          sum_1 = at::vec::fmadd(Vec::loadu(row + kVec), Vec::loadu(weight + j + kVec), sum_1);
        }
        predictions[i * n_outputs + o] = sum(sum_0 + sum_1) + inputs_.read_out_bias[o];
      }
    }
  }

 private:
  // Lambdas below capture pointers by value: a pointer that is read through `this` is read again
  // after every store of a vector, as that may alias anything.

  // x0, and h = LN1(x0) or h = x0.
  [[gnu::flatten]] void enter_block(int64_t layer, const float* z,
                                    const BlockActivations<T, B>& block) const {
    const Block<const float>& w = inputs_.blocks[layer];
    const auto enter = [&](auto x_0) {
      if constexpr (B::kNormBefore) {
        norm(x_0, w.ln_1_weight, w.ln_1_bias, block.x_hat_1, block.rstd_1);
      } else {
        copy_to_operands(rows_, D_, x_0, buffers_.x, buffers_.h);
      }
    };
    if (layer == 0) {
      with_step_input(shape_, inputs_, item_.first_token(), z, enter);
      return;
    }
    const int64_t D = D_;
    const float* e = inputs_.embeddings + item_.first_token() * D;
    const float* x = buffers_.x;
    const bool every_block = shape_.injection == Injection::kEveryBlock;
    if constexpr (B::kNormBefore) {
      const float* bias = inputs_.blocks[layer - 1].mlp_c_proj_bias;
      enter([=](int64_t i, int64_t j) {
        const Vec x_2 = Vec::loadu(x + i * D + j) + Vec::loadu(bias + j);
        return every_block ? x_2 + Vec::loadu(e + i * D + j) : x_2;
      });
    } else if (every_block) {  // else x and h are what the norm of the block before left
      enter([=](int64_t i, int64_t j) {
        return Vec::loadu(x + i * D + j) + Vec::loadu(e + i * D + j);
      });
    }
  }

  // x1, and h = LN2(x1) or h = x1.
  void attention(int64_t layer, const BlockActivations<T, B>& block) const {
    const Block<const float> w = inputs_.blocks[layer];
    const int64_t D = D_;
    T* qkv = block.qkv;
    const Rotation rotation = rotation_of(shape_, inputs_);
    multiply(buffers_.h, D, weights_.c_attn(layer), rows_, scratch_.tile, [=, this](const Tile& tile) {
      if (rotation) turn(rotation, tile);
      const float* bias = w.c_attn_bias + tile.columns.begin;
      for (int64_t r = 0; r < tile.rows.size(); ++r) {
        T* row = qkv + (tile.rows.begin + r) * 3 * D + tile.columns.begin;
        const float* from = tile.data + r * kPanel;
        const auto biased = [=](int64_t j) {
          return B::kNormBefore ? Vec::loadu(from + j) + Vec::loadu(bias + j) : Vec::loadu(from + j);
        };
        for (int64_t j = 0; j < tile.columns.size(); j += kStride) {
          Operand<T>::store(row + j, biased(j), biased(j + kVec));
        }
      }
    });
    team_.wait();  // for all rows' keys and values
    const int64_t S = shape_.seq_len, H = shape_.n_heads, head_dim = shape_.head_dim();
    const int64_t n_shared = S - shape_.n_queries;
    const Range heads = team_.share(item_.n_sequences * H);
    for (int64_t index = heads.begin; index < heads.end; ++index) {
      const int64_t row = index / H * S, column = index % H * head_dim;
      const T* q = block.qkv + row * 3 * D_ + column;
      const Head<T> head{q, q + D_, q + 2 * D_, 3 * D_, n_shared, head_dim};
      T* out = block.attn + row * D_ + column;
      const SoftmaxStatistics softmax = block.softmax_of(index, S);
      if (shape_.mask == Mask::kCausal) {
        attention_forward<CausalKeys>(head, out, D_, softmax, scratch_.attention);
      } else {
        attention_forward<AllKeys>(head, out, D_, softmax, scratch_.attention);
      }
      query_attention(head, inputs_.seen, shape_.n_queries, out + n_shared * D_, D_,
                      scratch_.attention);
    }
    team_.wait();  // for all heads' outputs
    multiply_into(block.attn, D_, weights_.attn_c_proj(layer), rows_, buffers_.x, true);
    if constexpr (B::kNormBefore) {
      const float* x = buffers_.x;
      const float* bias = w.attn_c_proj_bias;
      const auto x_1 = [=](int64_t i, int64_t j) {
        return Vec::loadu(x + i * D + j) + Vec::loadu(bias + j);
      };
      norm(x_1, w.ln_2_weight, w.ln_2_bias, block.x_hat_2, block.rstd_2);
    } else {
      norm_after(buffers_.x, block.x_hat_1, block.rstd_1);
    }
  }

  // x2 before its norm, without the last bias.
  void mlp(int64_t layer, const BlockActivations<T, B>& block) const {
    const float* bias = inputs_.blocks[layer].c_fc_bias;
    const int64_t width = shape_.n_hidden;
    for (int64_t i = rows_.begin; i < rows_.end; i += ForwardScratch<T>::kMlpRows) {
      const int64_t m = std::min(ForwardScratch<T>::kMlpRows, rows_.end - i);
      multiply(buffers_.h + i * D_, D_, weights_.c_fc(layer), {0, m}, scratch_.tile,
               [&](const Tile& tile) {
                 T* fc = nullptr;
                 if (block.fc) {
                   fc = block.fc +
                        tile.columns.begin * item_.rows() + (i + tile.rows.begin) * kPanel;
                 }
                 Mlp::forward(tile, bias, fc, scratch_.hidden + tile.rows.begin * width, width);
               });
      multiply_into(scratch_.hidden, width, weights_.mlp_c_proj(layer), {0, m},
                    buffers_.x + i * D_, true);
    }
  }

  // Turns q and k in a tile of qkv, and leaves v.
  void turn(const Rotation& rotation, const Tile& tile) const {
    const int64_t width = std::min(tile.columns.end, 2 * D_) - tile.columns.begin;
    for (int64_t r = 0; width > 0 && r < tile.rows.size(); ++r) {
      rotation.turn<false>(tile.data + r * kPanel, width, (tile.rows.begin + r) % shape_.seq_len);
    }
  }

  // x_out = norm(x) and h = x_out, after a sublayer.
  [[gnu::flatten]] void norm_after(float* x_out, float* x_hat, float* rstd) const {
    const int64_t D = D_;
    const float* x = buffers_.x;
    T* h = buffers_.h;
    normalize<Norm>(
        rows_, D, shape_.norm_eps, buffers_.x,
        [=](int64_t i, int64_t j) { return Vec::loadu(x + i * D + j); },
        [=](int64_t i, int64_t j, Vec v_0, Vec v_1) {
          const int64_t at = i * D + j;
          Operand<float>::store(x_out + at, v_0, v_1);
          Operand<T>::store(h + at, v_0, v_1);
          if (x_hat) Operand<float>::store(x_hat + at, v_0, v_1);
        },
        rstd);
  }

  [[gnu::flatten]] void final_norm(float* z_next, const StepActivations<T, B>* saved) const {
    const int64_t D = D_;
    const float* x = buffers_.x;
    const float* last_bias = inputs_.blocks[shape_.n_layer - 1].mlp_c_proj_bias;
    const Norm norm{inputs_.ln_f_weight, inputs_.ln_f_bias};
    const FinalActivations final = saved ? saved->final() : FinalActivations{};
    float* saved_x_hat = final.x_hat;
    normalize<Norm>(
        rows_, D, shape_.norm_eps, buffers_.x,
        [=](int64_t i, int64_t j) {
          return Vec::loadu(x + i * D + j) + Vec::loadu(last_bias + j);
        },
        [=](int64_t i, int64_t j, Vec v_0, Vec v_1) {
          const int64_t at = i * D + j;
          Operand<float>::store(z_next + at, norm(v_0, j), norm(v_1, j + kVec));
          if (saved_x_hat) Operand<float>::store(saved_x_hat + at, v_0, v_1);
        },
        final.rstd);
  }

  // x = load(row, column) and h = norm(x), before a sublayer.
  template <class Load>
  [[gnu::flatten]] void norm(Load load, const float* weight, const float* bias, T* x_hat,
                             float* rstd) const {
    normalize_to_operands(rows_, D_, shape_.norm_eps, buffers_.x, load, Norm{weight, bias}, x_hat,
                          buffers_.h, rstd);
  }

  const LoopShape& shape_;
  const Inputs& inputs_;
  const PackedWeights<T>& weights_;
  const ForwardBuffers<T>& buffers_;
  const ForwardScratch<T>& scratch_;
  const Item item_;
  const Team team_;
  const int64_t D_;
  const Range rows_;
};

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
