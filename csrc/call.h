// A call of the loop as torch passes it: checks, and the plain structs that point to its tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "engine.h"
#include "select.h"

namespace looped_fast {

using at::Tensor;

// The index of a name.
template <class Enum, size_t N>
Enum parse(const char* what, const std::string& name, const std::array<const char*, N>& names) {
  for (size_t i = 0; i < N; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
  }
  TORCH_CHECK_VALUE(false, "unknown ", what, " ", name);
}

inline BlockKind parse_kind(const std::string& name) {
  return parse<BlockKind>("block", name, std::array{"gpt2", "trm"});
}

// Settings of a call, as LoopSettings has them; `block` names the kind of block.
struct Settings {
  int64_t n_heads;
  int64_t n_loops;
  int64_t window;
  std::string injection;
  std::string precision;
  std::string block;
  int64_t n_hidden;
  std::string mask;
  double norm_eps;

  BlockKind kind() const { return parse_kind(block); }
};

// The tensors of a block, of weights or of gradients, in the order of ops/block.py.
template <class Float>
std::vector<Float * Block<Float>::*> tensors_of(BlockKind kind) {
  using B = Block<Float>;
  if (kind == BlockKind::kTrm) {
    return {&B::c_attn_weight, &B::attn_c_proj_weight, &B::c_fc_weight, &B::mlp_c_proj_weight};
  }
  return {&B::ln_1_weight,        &B::ln_1_bias,        &B::c_attn_weight, &B::c_attn_bias,
          &B::attn_c_proj_weight, &B::attn_c_proj_bias, &B::ln_2_weight,   &B::ln_2_bias,
          &B::c_fc_weight,        &B::c_fc_bias,        &B::mlp_c_proj_weight, &B::mlp_c_proj_bias};
}

// Their elements, in that order.
inline std::vector<int64_t> sizes_of(BlockKind kind, int64_t D, int64_t F) {
  if (kind == BlockKind::kTrm) return {3 * D * D, D * D, 2 * F * D, D * F};
  return {D, D, 3 * D * D, 3 * D, D * D, D, D, D, F * D, F, D * F, D};
}

// Tensors of the final norm, weight and bias, if there is one.
inline int64_t n_final(BlockKind kind) { return kind == BlockKind::kGpt2 ? 2 : 0; }

// Contiguous tensors of a call.
class FloatTensors {
 public:
  // The data of a tensor, which this keeps alive.
  const float* keep(const Tensor& tensor, int64_t numel) {
    TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.scalar_type() == at::kFloat,
                      "float32 tensors on the CPU are needed");
    TORCH_CHECK_VALUE(tensor.numel() == numel, "a tensor has shape ", tensor.sizes(), "; ", numel,
                      " elements are needed");
    tensors_.push_back(tensor.contiguous());
    return tensors_.back().const_data_ptr<float>();
  }

 private:
  std::vector<Tensor> tensors_;
};

// The tensors of a call of the loop, and the structs that point to them. weights: those of each
// block, two of the final norm if there is one, and two of the read-out if there is one.
class Call : public FloatTensors {
 public:
  Call(const Tensor& embeddings, const std::optional<Tensor>& positions, const Tensor& state,
       at::TensorList weights, const Settings& settings,
       const std::optional<Tensor>& seen = std::nullopt,
       const std::optional<Tensor>& packed = std::nullopt) {
    TORCH_CHECK_VALUE(embeddings.dim() == 3, "embeddings have shape ", embeddings.sizes(),
                      "; [B, S, D] is needed");
    const BlockKind kind = settings.kind();
    const auto members = tensors_of<const float>(kind);
    const int64_t n_weights = static_cast<int64_t>(weights.size());
    const int64_t n_each = static_cast<int64_t>(members.size());
    const int64_t n_layer = (n_weights - n_final(kind)) / n_each;
    const int64_t n_last = n_weights - n_layer * n_each, n_read_out = n_last - n_final(kind);
    TORCH_CHECK_VALUE(n_layer > 0 && (n_read_out == 0 || n_read_out == 2), n_weights, " weights; ",
                      n_each, " per block, ", n_final(kind), ", and 2 for a read-out are needed");
    shape_ = {.batch = embeddings.size(0),
              .seq_len = embeddings.size(1),
              .n_embd = embeddings.size(2),
              .n_heads = settings.n_heads,
              .n_layer = n_layer,
              .n_loops = settings.n_loops,
              .window = settings.window,
              .injection = parse<Injection>("injection", settings.injection,
                                            std::array{"add", "mul", "none", "every_block"}),
              .mask = parse<Mask>("mask", settings.mask, std::array{"causal", "full"}),
              .norm_eps = static_cast<float>(settings.norm_eps),
              .n_hidden = settings.n_hidden,
              .fc_width = settings.n_hidden * (kind == BlockKind::kTrm ? 2 : 1),
              .n_outputs = n_read_out ? weights.back().numel() : 0,
              .n_queries = seen ? seen->numel() : 0,
              .is_packed = packed.has_value()};
    check_widths(kind);
    TORCH_CHECK_VALUE(1 <= shape_.window && shape_.window <= shape_.n_loops, "window = ",
                      shape_.window, "; 1 .. n_loops = ", shape_.n_loops, " is needed");
    const int64_t D = shape_.n_embd, S = shape_.seq_len;
    inputs_.embeddings = keep(embeddings, shape_.batch * S * D);
    const bool is_rotary = positions && positions->dim() == 3;
    if (is_rotary) inputs_.rotation = keep(*positions, 2 * S * shape_.head_dim());
    const bool is_learned = positions && !is_rotary;
    inputs_.positions = keep(is_learned ? *positions : at::zeros({S, D}, options(state)), S * D);
    inputs_.state = keep(state, shape_.batch * S * D);
    const std::vector<int64_t> sizes = sizes_of(kind, D, shape_.n_hidden);
    for (int64_t layer = 0; layer < n_layer; ++layer) {
      Block<const float> block{};
      for (int64_t i = 0; i < n_each; ++i) {
        block.*members[i] = keep(weights[layer * n_each + i], sizes[i]);
      }
      blocks_.push_back(block);
    }
    inputs_.blocks = blocks_.data();
    const at::TensorList last = weights.slice(n_layer * n_each);
    if (n_final(kind)) {
      inputs_.ln_f_weight = keep(last[0], D);
      inputs_.ln_f_bias = keep(last[1], D);
    }
    if (n_read_out) {
      inputs_.read_out_weight = keep(last[n_last - 2], shape_.n_outputs * D);
      inputs_.read_out_bias = keep(last[n_last - 1], shape_.n_outputs);
    }
    if (seen) inputs_.seen = keep_seen(*seen);
    if (packed) inputs_.packed = keep_packed(*packed, settings);
  }
  Call(const Call&) = delete;

  const LoopShape& shape() const { return shape_; }
  const Inputs& inputs() const { return inputs_; }

 private:
  static at::TensorOptions options(const Tensor& like) {
    return like.options().requires_grad(false);
  }

  void check_widths(BlockKind kind) const {
    const int64_t D = shape_.n_embd, H = shape_.n_heads, F = shape_.n_hidden;
    TORCH_CHECK_VALUE(D % 32 == 0 && D % H == 0 && D / H % 8 == 0, "D = ", D, " with ", H,
                      " heads; D must be a multiple of 32, and D / heads of 8");
    const int64_t unit = kind == BlockKind::kTrm ? 32 : 64;
    TORCH_CHECK_VALUE(F > 0 && F % unit == 0, "the hidden width is ", F, "; a multiple of ", unit,
                      " is needed");
  }

  const int64_t* keep_seen(const Tensor& seen) {
    TORCH_CHECK_VALUE(seen.device().is_cpu() && seen.scalar_type() == at::kLong && seen.dim() == 1,
                      "seen: [m] int64 on the CPU is needed");
    TORCH_CHECK_VALUE(seen.numel() <= shape_.seq_len, seen.numel(), " queries exceed S = ",
                      shape_.seq_len);
    seen_ = seen.contiguous();
    const int64_t* counts = seen_.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < shape_.n_queries; ++i) {
      TORCH_CHECK_VALUE(0 <= counts[i] && counts[i] <= shape_.seq_len - shape_.n_queries, "seen[", i,
                        "] = ", counts[i], " is outside 0..", shape_.seq_len - shape_.n_queries);
    }
    return counts;
  }

  void* keep_packed(const Tensor& packed, const Settings& settings) {
    const size_t needed = engine_for(settings.precision, settings.kind()).packed_size(shape_);
    TORCH_CHECK_VALUE(packed.is_contiguous() && packed.nbytes() == needed, "packed matrices have ",
                      packed.nbytes(), " bytes; ", needed, " are needed");
    packed_ = packed;
    return packed_.data_ptr();
  }

  LoopShape shape_;
  Inputs inputs_{};
  Tensor seen_;
  Tensor packed_;
  std::vector<Block<const float>> blocks_;
};

inline float* data_or_null(const Tensor& tensor) {
  return tensor.numel() ? tensor.data_ptr<float>() : nullptr;
}

// Uninitialised gradients of embeddings, positions, state and the weights; empty where not wanted,
// and that of state unless the window covers every step. All are 0 if there are no tokens.
class GradientTensors {
 public:
  GradientTensors(const LoopShape& p, BlockKind kind, const Tensor& embeddings,
                  const std::optional<Tensor>& positions, const Tensor& state,
                  at::TensorList weights, const c10::List<bool>& wanted) {
    TORCH_CHECK_VALUE(wanted.size() == 3 + weights.size(), wanted.size(),
                      " flags of wanted gradients; ", 3 + weights.size(), " are needed");
    const auto add = [this](const Tensor& like, bool is_wanted) {
      const auto options = like.options().requires_grad(false);
      tensors_.push_back(is_wanted ? at::empty_like(like, options, at::MemoryFormat::Contiguous)
                                   : at::empty({0}, options));
    };
    add(embeddings, wanted.get(0));
    add(positions ? *positions : state, positions && wanted.get(1));
    add(state, wanted.get(2) && p.window == p.n_loops);
    for (size_t i = 0; i < weights.size(); ++i) add(weights[i], wanted.get(3 + i));
    if (p.injection == Injection::kNone) tensors_[0].zero_();
    if (p.n_tokens() == 0) {
      for (Tensor& t : tensors_) t.zero_();
    }
    std::vector<float*> data;
    for (const Tensor& t : tensors_) data.push_back(data_or_null(t));
    float** next = data.data() + 3;
    for (int64_t layer = 0; layer < p.n_layer; ++layer) {
      Block<float> block{};
      for (const auto member : tensors_of<float>(kind)) block.*member = *next++;
      blocks_.push_back(block);
    }
    gradients_ = {.embeddings = data[0], .positions = data[1], .state = data[2],
                  .blocks = blocks_.data()};
    if (n_final(kind)) {
      gradients_.ln_f_weight = *next++;
      gradients_.ln_f_bias = *next++;
    }
    if (p.n_outputs > 0) {
      gradients_.read_out_weight = *next++;
      gradients_.read_out_bias = *next++;
    }
  }
  GradientTensors(const GradientTensors&) = delete;

  const std::vector<Tensor>& tensors() const { return tensors_; }
  const Gradients& gradients() const { return gradients_; }

 private:
  std::vector<Tensor> tensors_;
  std::vector<Block<float>> blocks_;
  Gradients gradients_{};
};

}  // namespace looped_fast
