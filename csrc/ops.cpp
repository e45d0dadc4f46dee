// The torch side: ops, checks, memory. Autograd and shape inference are in
// looped_fast/ops/cpu_engine.py.
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpus.h"
#include "engine.h"
#include "memory.h"
#include "schedule.h"
#include "threads.h"

namespace looped_fast {
namespace {

using at::Tensor;

constexpr int64_t kBlockTensors = 12;

// torch's own choice, so that ATEN_CPU_CAPABILITY governs this engine too.
bool torch_uses(const char* capability) { return at::get_cpu_capability() == capability; }

// Why bf16 products can't run here; empty if they can. A small product is tried: without the
// instructions brgemm throws, or is wrong unless operands are converted.
std::string try_bf16() {
  constexpr int64_t n = 32;
  std::vector<at::BFloat16> a(n * n, at::BFloat16(1.f)), b(n * n, at::BFloat16(0.5f));
  std::vector<float> c(n * n, -1.f);
  try {
    at::native::cpublas::brgemm(n, n, n, n, n, n, false, a.data(), b.data(), c.data(), true);
    at::native::cpublas::brgemm_release(true);
  } catch (const std::exception& error) {
    return std::string("a trial bf16 product failed: ") + error.what();
  }
  for (float x : c) {
    if (x != n * 0.5f) return "a trial bf16 product is wrong";
  }
  return "";
}

struct Selection {
  const Engine* engine;
  std::string unsupported;  // why `engine` is null
};

Selection select_engine(const std::string& precision) {
  const bool avx512 = torch_uses("AVX512");
  if (precision == "fp32") {
    if (avx512) return {&kEngineAvx512Fp32, ""};
    if (torch_uses("AVX2")) return {&kEngineAvx2Fp32, ""};
    return {nullptr, "it needs AVX2, and torch runs at " + at::get_cpu_capability()};
  }
  if (precision == "bf16") {
    if (!avx512 || !__builtin_cpu_supports("avx512bf16")) {
      return {nullptr, "bf16 needs a CPU with AVX512_BF16; precision fp32 runs"};
    }
    static const std::string trial = try_bf16();
    if (!trial.empty()) return {nullptr, trial};
    return {&kEngineAvx512Bf16, ""};
  }
  return {nullptr, "it computes in fp32 and bf16, not " + precision};
}

const Engine& engine_for(const std::string& precision) {
  const Selection selection = select_engine(precision);
  TORCH_CHECK(selection.engine, "the CPU engine can't run: ", selection.unsupported);
  return *selection.engine;
}

Injection parse_injection(const std::string& name) {
  const std::array<const char*, 4> names = {"add", "mul", "none", "every_block"};
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return static_cast<Injection>(i);
  }
  TORCH_CHECK_VALUE(false, "unknown injection ", name);
}

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

// The tensors of a call of the loop, and the plain structs that point to them. weights: twelve of
// each block, two of the final LayerNorm, and two of the read-out if there is one.
class Call : public FloatTensors {
 public:
  Call(const Tensor& embeddings, const Tensor& positions, const Tensor& state,
       at::TensorList weights, int64_t n_heads, int64_t n_loops, int64_t window,
       const std::string& injection, const std::optional<Tensor>& seen = std::nullopt) {
    TORCH_CHECK_VALUE(embeddings.dim() == 3, "embeddings have shape ", embeddings.sizes(),
                      "; [B, S, D] is needed");
    const int64_t n_weights = static_cast<int64_t>(weights.size());
    const int64_t n_layer = n_weights / kBlockTensors, n_last = n_weights % kBlockTensors;
    TORCH_CHECK_VALUE(n_last == 2 || n_last == 4, n_weights,
                      " weights; 12 per block, 2, and 2 for a read-out are needed");
    const int64_t n_outputs = n_last == 4 ? weights.back().numel() : 0;
    shape_ = {embeddings.size(0), embeddings.size(1), embeddings.size(2), n_heads, n_layer,
                n_loops,            window,             parse_injection(injection), n_outputs,
                seen ? seen->numel() : 0};
    const int64_t D = shape_.n_embd, S = shape_.seq_len;
    TORCH_CHECK_VALUE(D % 32 == 0 && D % n_heads == 0 && D / n_heads % 8 == 0, "D = ", D,
                      " with ", n_heads,
                      " heads; D must be a multiple of 32, and D / heads of 8");
    TORCH_CHECK_VALUE(1 <= window && window <= n_loops, "window = ", window, "; 1 .. n_loops = ",
                      n_loops, " is needed");
    const float* e = keep(embeddings, shape_.batch * S * D);
    const float* p = keep(positions, S * D);
    const float* z = keep(state, shape_.batch * S * D);
    // Elements of a block's tensors, in units of D.
    const std::array<int64_t, kBlockTensors> sizes = {1, 1, 3 * D, 3, D,     1,
                                                      1, 1, 4 * D, 4, 4 * D, 1};
    for (int64_t layer = 0; layer < n_layer; ++layer) {
      std::array<const float*, kBlockTensors> w;
      for (int64_t i = 0; i < kBlockTensors; ++i) {
        w[i] = keep(weights[layer * kBlockTensors + i], sizes[i] * D);
      }
      blocks_.push_back({w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11]});
    }
    const at::TensorList last = weights.slice(n_layer * kBlockTensors);
    const float* ln_f_weight = keep(last[0], D);
    const float* ln_f_bias = keep(last[1], D);
    const float* read_out_weight = n_outputs ? keep(last[2], n_outputs * D) : nullptr;
    const float* read_out_bias = n_outputs ? keep(last[3], n_outputs) : nullptr;
    inputs_ = {e,           p,         z,               blocks_.data(),
               ln_f_weight, ln_f_bias, read_out_weight, read_out_bias,
               seen ? keep_seen(*seen) : nullptr};
  }
  Call(const Call&) = delete;

  const LoopShape& shape() const { return shape_; }
  const Inputs& inputs() const { return inputs_; }

 private:
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

  LoopShape shape_;
  Inputs inputs_;
  Tensor seen_;
  std::vector<Block<const float>> blocks_;
};

float* data_or_null(const Tensor& tensor) {
  return tensor.numel() ? tensor.data_ptr<float>() : nullptr;
}

Tensor workspace(size_t n_bytes) {
  return empty_recycled({static_cast<int64_t>(n_bytes)}, at::kByte);
}

// Returns predictions if there is a read-out, else states; then what the backward needs besides, as
// tensors without elements if it does not.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_forward(
    const Tensor& embeddings, const Tensor& positions, const Tensor& state, at::TensorList weights,
    int64_t n_heads, int64_t n_loops, int64_t window, const std::string& injection,
    const std::string& precision, bool save_activations, bool save_states,
    const std::optional<Tensor>& seen = std::nullopt) {
  Call call(embeddings, positions, state, weights, n_heads, n_loops, window, injection, seen);
  const Engine& engine = engine_for(precision);
  const LoopShape& p = call.shape();
  const auto options = embeddings.options().requires_grad(false);
  const auto operand = precision == "bf16" ? at::kBFloat16 : at::kFloat;
  const int64_t B = p.batch, S = p.seq_len, D = p.n_embd, L = p.n_layer, H = p.n_heads;
  Tensor states = at::empty({0}, options), predictions = at::empty({0}, options);
  if (p.n_outputs == 0 || save_states) {
    states = empty_recycled({window, B, S, D}, at::kFloat);
  }
  if (p.n_outputs > 0) predictions = at::empty({window, B, S, p.n_outputs}, options);
  Tensor operands = at::empty({0}, options.dtype(operand)), floats = at::empty({0}, options);
  if (save_activations) {
    operands = empty_recycled({window, 10 * L - 1, B, S, D}, operand);
    floats = empty_recycled({window, D + (2 * H + 2) * L + 1, B, S}, at::kFloat);
  }
  const bool save_start = (save_activations || save_states) && window < n_loops;
  Tensor start = save_start ? at::empty({B, S, D}, options) : at::empty({0}, options);
  if (p.n_tokens() > 0) {
    const ForwardOutputs outputs{
        data_or_null(states),
        data_or_null(predictions),
        {save_activations ? operands.data_ptr() : nullptr, data_or_null(floats),
         data_or_null(start)}};
    const int n_threads = useful_threads(p, available_threads());
    Tensor memory = workspace(engine.forward_workspace(p, n_threads));
    engine.forward(p, call.inputs(), outputs, memory.data_ptr(), n_threads);
  }
  if (p.n_outputs == 0) return {states, operands, floats, at::empty({0}, options), start};
  return {predictions, operands, floats, states, start};
}

// For a gradient: activations are saved, or states to recompute them from.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& embeddings, const Tensor& positions, const Tensor& state, at::TensorList weights,
    int64_t n_heads, int64_t n_loops, int64_t window, std::string injection, std::string precision,
    bool recompute) {
  return run_forward(embeddings, positions, state, weights, n_heads, n_loops, window, injection,
                     precision, !recompute, recompute);
}

Tensor infer(const Tensor& embeddings, const Tensor& positions, const Tensor& state,
             at::TensorList weights, int64_t n_heads, int64_t n_loops, int64_t window,
             std::string injection, std::string precision, const std::optional<Tensor>& seen) {
  return std::get<0>(run_forward(embeddings, positions, state, weights, n_heads, n_loops, window,
                                 injection, precision, false, false, seen));
}

// Predictions of each sequence at the step where it stops, [B, S, n_outputs], and its steps, [B].
std::tuple<Tensor, Tensor> until(const Tensor& embeddings, const Tensor& positions,
                                 const Tensor& state, at::TensorList weights, int64_t n_heads,
                                 int64_t max_loops, std::string injection, std::string precision,
                                 double tolerance, const std::optional<Tensor>& seen) {
  Call call(embeddings, positions, state, weights, n_heads, max_loops, 1, injection, seen);
  const Engine& engine = engine_for(precision);
  const LoopShape& p = call.shape();
  TORCH_CHECK_VALUE(p.n_outputs > 0, "a read-out is needed");
  const auto options = embeddings.options().requires_grad(false);
  Tensor predictions = at::empty({p.batch, p.seq_len, p.n_outputs}, options);
  Tensor n_loops = at::full({p.batch}, max_loops, options.dtype(at::kLong));
  if (p.n_tokens() > 0) {
    const int n_threads = useful_threads(p, available_threads());
    Tensor memory = workspace(engine.until_workspace(p, n_threads));
    engine.until(p, call.inputs(),
                 {static_cast<float>(tolerance), data_or_null(predictions),
                  n_loops.data_ptr<int64_t>()},
                 memory.data_ptr(), n_threads);
  }
  return {predictions, n_loops};
}

// Uninitialised gradients of embeddings, positions, state and the weights; empty where not wanted,
// and that of state unless the window covers every step. All are 0 if there are no tokens.
class GradientTensors {
 public:
  GradientTensors(const LoopShape& p, const Tensor& embeddings, const Tensor& positions,
                  const Tensor& state, at::TensorList weights, const c10::List<bool>& wanted) {
    TORCH_CHECK_VALUE(wanted.size() == 3 + weights.size(), wanted.size(),
                      " flags of wanted gradients; ", 3 + weights.size(), " are needed");
    const auto add = [this](const Tensor& like, bool is_wanted) {
      const auto options = like.options().requires_grad(false);
      tensors_.push_back(is_wanted ? at::empty_like(like, options, at::MemoryFormat::Contiguous)
                                   : at::empty({0}, options));
    };
    add(embeddings, wanted.get(0));
    add(positions, wanted.get(1));
    add(state, wanted.get(2) && p.window == p.n_loops);
    for (size_t i = 0; i < weights.size(); ++i) add(weights[i], wanted.get(3 + i));
    if (p.injection == Injection::kNone) tensors_[0].zero_();
    if (p.n_tokens() == 0) {
      for (Tensor& t : tensors_) t.zero_();
    }
    std::vector<float*> data;
    for (const Tensor& t : tensors_) data.push_back(data_or_null(t));
    for (int64_t layer = 0; layer < p.n_layer; ++layer) {
      float** w = data.data() + 3 + layer * kBlockTensors;
      blocks_.push_back({w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11]});
    }
    float** last = data.data() + 3 + p.n_layer * kBlockTensors;
    const bool reads_out = p.n_outputs > 0;
    gradients_ = {data[0], data[1], data[2], blocks_.data(),
                  last[0], last[1], reads_out ? last[2] : nullptr, reads_out ? last[3] : nullptr};
  }
  GradientTensors(const GradientTensors&) = delete;

  const std::vector<Tensor>& tensors() const { return tensors_; }
  const Gradients& gradients() const { return gradients_; }

 private:
  std::vector<Tensor> tensors_;
  std::vector<Block<float>> blocks_;
  Gradients gradients_;
};

// What the forward saved comes as saved-tensor hooks left it, so it is checked. states: read only
// without operands.
std::vector<Tensor> backward(const Tensor& grad, const Tensor& saved_operands,
                             const Tensor& floats, const Tensor& states, const Tensor& start,
                             const Tensor& embeddings, const Tensor& positions,
                             const Tensor& state, at::TensorList weights,
                             c10::List<bool> wanted, int64_t n_heads, int64_t n_loops,
                             int64_t window, std::string injection, std::string precision) {
  Call call(embeddings, positions, state, weights, n_heads, n_loops, window, injection);
  const Engine& engine = engine_for(precision);
  const LoopShape& p = call.shape();
  const GradientTensors grads(p, embeddings, positions, state, weights, wanted);
  const int64_t n = p.n_tokens(), D = p.n_embd;
  if (n == 0) return grads.tensors();
  const bool recompute = saved_operands.numel() == 0;
  const int64_t n_operands = recompute ? 0 : window * (10 * p.n_layer - 1) * n * D;
  const Tensor operands = saved_operands.contiguous();
  TORCH_CHECK_VALUE(
      operands.numel() == n_operands &&
          operands.scalar_type() == (precision == "bf16" ? at::kBFloat16 : at::kFloat),
      "saved operands have shape ", operands.sizes(), " and dtype ", operands.scalar_type());
  const int64_t n_floats = D + (2 * p.n_heads + 2) * p.n_layer + 1;
  const BackwardInputs inputs{
      call.keep(grad, window * n * (p.n_outputs > 0 ? p.n_outputs : D)),
      recompute ? call.keep(states, window * n * D) : nullptr,
      {recompute ? nullptr : operands.data_ptr(),
       recompute ? nullptr : const_cast<float*>(call.keep(floats, window * n_floats * n)),
       window < n_loops ? const_cast<float*>(call.keep(start, n * D)) : nullptr}};
  const int n_threads = useful_threads(p, available_threads());
  Tensor memory = workspace(engine.backward_workspace(p, recompute, n_threads));
  engine.backward(p, call.inputs(), inputs, grads.gradients(), memory.data_ptr(), n_threads);
  return grads.tensors();
}

// The mean squared error of the last n_supervised predictions of x tokens, [], and its gradients.
// targets: [B, (S + 1) / 2, n_outputs].
std::tuple<Tensor, std::vector<Tensor>> mse(const Tensor& embeddings, const Tensor& positions,
                                            const Tensor& state, at::TensorList weights,
                                            const Tensor& targets, int64_t n_supervised,
                                            c10::List<bool> wanted, int64_t n_heads,
                                            int64_t n_loops, int64_t window,
                                            std::string injection, std::string precision) {
  Call call(embeddings, positions, state, weights, n_heads, n_loops, window, injection);
  const Engine& engine = engine_for(precision);
  const LoopShape& p = call.shape();
  TORCH_CHECK_VALUE(p.n_outputs > 0, "a read-out is needed");
  TORCH_CHECK_VALUE(1 <= n_supervised && n_supervised <= window, "n_supervised = ", n_supervised,
                    "; 1 .. window = ", window, " is needed");
  const GradientTensors grads(p, embeddings, positions, state, weights, wanted);
  Tensor error = at::full({}, NAN, embeddings.options().requires_grad(false));
  const float* ys = call.keep(targets, p.batch * p.n_x() * p.n_outputs);
  if (p.n_tokens() > 0) {
    const int n_threads = useful_threads(p, available_threads());
    Tensor memory = workspace(engine.mse_workspace(p, n_threads));
    error.fill_(engine.mse(p, call.inputs(), {ys, n_supervised}, grads.gradients(),
                           memory.data_ptr(), n_threads));
  }
  return {error, grads.tensors()};
}

std::vector<Tensor> mse_backward(const Tensor& grad, at::TensorList gradients,
                                 at::TensorList /*inputs: for autograd*/) {
  return at::_foreach_mul(gradients, grad);
}

// The embedded prompt, [B, 2 n, D].
Tensor embed_prompt(const Tensor& xs, const Tensor& ys, const Tensor& weight, const Tensor& bias) {
  TORCH_CHECK_VALUE(xs.dim() == 3 && weight.dim() == 2, "xs and weight have shapes ", xs.sizes(),
                    " and ", weight.sizes(), "; [B, n, d] and [D, d] are needed");
  const int64_t B = xs.size(0), n = xs.size(1), d = xs.size(2), D = weight.size(0);
  TORCH_CHECK_VALUE(d > 0 && D % 32 == 0, "d = ", d, " and D = ", D,
                    "; a coordinate and a multiple of 32 are needed");
  Tensor embeddings = at::empty({B, 2 * n, D}, xs.options().requires_grad(false));
  if (B * n == 0) return embeddings;
  const Tensor weight_t = at::empty({d, D}, embeddings.options());
  FloatTensors inputs;
  const ReadIn arguments{inputs.keep(xs, B * n * d),
                         inputs.keep(ys, B * n),
                         inputs.keep(weight, D * d),
                         inputs.keep(bias, D),
                         weight_t.data_ptr<float>(),
                         embeddings.data_ptr<float>(),
                         B * n,
                         d,
                         D};
  constexpr int64_t kWorkPerThread = 1 << 18;  // multiply-adds: some 20 microseconds
  const int64_t useful = 1 + B * n * d * D / kWorkPerThread;
  const int64_t n_threads = useful == 1 ? 1 : std::min<int64_t>(useful, available_threads());
  engine_for("fp32").read_in(arguments, static_cast<int>(n_threads));
  return embeddings;
}

std::string unsupported(std::string precision) { return select_engine(precision).unsupported; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(looped_fast, library) {
  library.def("cpu_read_in(Tensor xs, Tensor ys, Tensor weight, Tensor bias) -> Tensor");
  library.def(
      "cpu_loop_infer(Tensor embeddings, Tensor positions, Tensor state, Tensor[] weights, "
      "int n_heads, SymInt n_loops, SymInt window, str injection, str precision, "
      "Tensor? seen=None) -> Tensor");
  library.def(
      "cpu_loop_until(Tensor embeddings, Tensor positions, Tensor state, Tensor[] weights, "
      "int n_heads, SymInt max_loops, str injection, str precision, float tolerance, "
      "Tensor? seen=None) -> (Tensor predictions, Tensor n_loops)");
  library.def(
      "cpu_loop_forward(Tensor embeddings, Tensor positions, Tensor state, Tensor[] weights, "
      "int n_heads, SymInt n_loops, SymInt window, str injection, str precision, "
      "bool recompute) "
      "-> (Tensor outputs, Tensor operands, Tensor floats, Tensor states, Tensor start)");
  library.def(
      "cpu_loop_backward(Tensor grad, Tensor operands, Tensor floats, Tensor states, "
      "Tensor start, Tensor embeddings, Tensor positions, Tensor state, Tensor[] weights, "
      "bool[] wanted, int n_heads, SymInt n_loops, SymInt window, str injection, str precision) "
      "-> Tensor[]");
  library.def(
      "cpu_loop_mse(Tensor embeddings, Tensor positions, Tensor state, Tensor[] weights, "
      "Tensor targets, SymInt n_supervised, bool[] wanted, int n_heads, SymInt n_loops, "
      "SymInt window, str injection, str precision) -> (Tensor error, Tensor[] gradients)");
  library.def(
      "cpu_loop_mse_backward(Tensor grad, Tensor[] gradients, Tensor[] inputs) -> Tensor[]");
  library.def("cpu_empty_cache() -> ()", free_recycled);
  library.def("cpu_unsupported(str precision) -> str", unsupported);
  library.def("cpu_torch() -> str", [] { return std::string(LOOPED_FAST_TORCH); });
  library.def("cpu_threads() -> int", [] { return int64_t{available_threads()}; });
  library.def("cpu_quota(str root) -> float", [](std::string root) { return cgroup_quota(root); });
}

TORCH_LIBRARY_IMPL(looped_fast, CPU, library) {
  library.impl("cpu_read_in", embed_prompt);
  library.impl("cpu_loop_infer", infer);
  library.impl("cpu_loop_until", until);
  library.impl("cpu_loop_forward", forward);
  library.impl("cpu_loop_backward", backward);
  library.impl("cpu_loop_mse", mse);
  library.impl("cpu_loop_mse_backward", mse_backward);
}

}  // namespace looped_fast
