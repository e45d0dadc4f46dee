// The torch side: ops, checks, memory. Autograd and shape inference are in
// looped_fast/ops/cpu_engine.py.
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "call.h"
#include "cpus.h"
#include "memory.h"
#include "schedule.h"
#include "select.h"
#include "threads.h"

namespace looped_fast {
namespace {

Tensor workspace(size_t n_bytes) {
  return empty_recycled({static_cast<int64_t>(n_bytes)}, at::kByte);
}

// Returns predictions if there is a read-out, else states; then what the backward needs besides, as
// tensors without elements if it does not.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_forward(
    const Tensor& embeddings, const std::optional<Tensor>& positions, const Tensor& state,
    at::TensorList weights, const Settings& settings, bool save_activations, bool save_states,
    const std::optional<Tensor>& packed, const std::optional<Tensor>& seen = std::nullopt) {
  Call call(embeddings, positions, state, weights, settings, seen, packed);
  const Engine& engine = engine_for(settings.precision, settings.kind());
  const LoopShape& p = call.shape();
  const auto options = embeddings.options().requires_grad(false);
  const auto operand = settings.precision == "bf16" ? at::kBFloat16 : at::kFloat;
  const int64_t B = p.batch, S = p.seq_len, D = p.n_embd, window = p.window;
  Tensor states = at::empty({0}, options), predictions = at::empty({0}, options);
  if (p.n_outputs == 0 || save_states) {
    states = empty_recycled({window, B, S, D}, at::kFloat);
  }
  if (p.n_outputs > 0) predictions = at::empty({window, B, S, p.n_outputs}, options);
  Tensor operands = at::empty({0}, options.dtype(operand)), floats = at::empty({0}, options);
  if (save_activations) {
    const SavedColumns columns = engine.saved_columns(p);
    operands = empty_recycled({window, columns.operands, B, S}, operand);
    floats = empty_recycled({window, columns.floats, B, S}, at::kFloat);
  }
  const bool save_start = (save_activations || save_states) && window < p.n_loops;
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
    const Tensor& embeddings, const std::optional<Tensor>& positions, const Tensor& state,
    at::TensorList weights, int64_t n_heads, int64_t n_loops, int64_t window,
    std::string injection, std::string precision, std::string block, int64_t n_hidden,
    std::string mask, double norm_eps, const std::optional<Tensor>& packed, bool recompute) {
  const Settings settings{n_heads, n_loops,  window, injection, precision,
                          block,   n_hidden, mask,   norm_eps};
  return run_forward(embeddings, positions, state, weights, settings, !recompute, recompute,
                     packed);
}

Tensor infer(const Tensor& embeddings, const std::optional<Tensor>& positions,
             const Tensor& state, at::TensorList weights, int64_t n_heads, int64_t n_loops,
             int64_t window, std::string injection, std::string precision, std::string block,
             int64_t n_hidden, std::string mask, double norm_eps,
             const std::optional<Tensor>& packed, const std::optional<Tensor>& seen) {
  const Settings settings{n_heads, n_loops,  window, injection, precision,
                          block,   n_hidden, mask,   norm_eps};
  return std::get<0>(
      run_forward(embeddings, positions, state, weights, settings, false, false, packed, seen));
}

// The blocks' matrices as the forward multiplies them, for several calls with the same weights.
Tensor pack(const Tensor& embeddings, at::TensorList weights, int64_t n_heads,
            std::string precision, std::string block, int64_t n_hidden) {
  const Settings settings{n_heads, 1, 1, "add", precision, block, n_hidden, "full", 1.0};
  const Call call(embeddings, std::nullopt, embeddings, weights, settings);
  const Engine& engine = engine_for(precision, settings.kind());
  const LoopShape& p = call.shape();
  const auto n_bytes = static_cast<int64_t>(engine.packed_size(p));
  Tensor packed = empty_recycled({n_bytes}, at::kByte);
  Inputs inputs = call.inputs();
  inputs.packed = packed.data_ptr();
  constexpr int64_t kBytesPerThread = 1 << 18;
  const int64_t useful = std::min<int64_t>(1 + n_bytes / kBytesPerThread, available_threads());
  engine.pack(p, inputs, static_cast<int>(useful));
  return packed;
}

// Predictions of each sequence at the step where it stops, [B, S, n_outputs], and its steps, [B].
std::tuple<Tensor, Tensor> until(const Tensor& embeddings, const std::optional<Tensor>& positions,
                                 const Tensor& state, at::TensorList weights, int64_t n_heads,
                                 int64_t max_loops, std::string injection, std::string precision,
                                 std::string block, int64_t n_hidden, std::string mask,
                                 double norm_eps, double tolerance,
                                 const std::optional<Tensor>& seen) {
  const Settings settings{n_heads, max_loops, 1,    injection, precision,
                          block,   n_hidden,  mask, norm_eps};
  Call call(embeddings, positions, state, weights, settings, seen);
  const Engine& engine = engine_for(precision, settings.kind());
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

// What the forward saved comes as saved-tensor hooks left it, so it is checked. states: read only
// without operands.
std::vector<Tensor> backward(const Tensor& grad, const Tensor& saved_operands,
                             const Tensor& floats, const Tensor& states, const Tensor& start,
                             const Tensor& embeddings, const std::optional<Tensor>& positions,
                             const Tensor& state, at::TensorList weights, c10::List<bool> wanted,
                             int64_t n_heads, int64_t n_loops, int64_t window,
                             std::string injection, std::string precision, std::string block,
                             int64_t n_hidden, std::string mask, double norm_eps) {
  const Settings settings{n_heads, n_loops,  window, injection, precision,
                          block,   n_hidden, mask,   norm_eps};
  Call call(embeddings, positions, state, weights, settings);
  const Engine& engine = engine_for(precision, settings.kind());
  const LoopShape& p = call.shape();
  const GradientTensors grads(p, settings.kind(), embeddings, positions, state, weights, wanted);
  const int64_t n = p.n_tokens(), D = p.n_embd;
  if (n == 0) return grads.tensors();
  const bool recompute = saved_operands.numel() == 0;
  const SavedColumns columns = engine.saved_columns(p);
  const Tensor operands = saved_operands.contiguous();
  TORCH_CHECK_VALUE(
      operands.numel() == (recompute ? 0 : window * columns.operands * n) &&
          operands.scalar_type() == (precision == "bf16" ? at::kBFloat16 : at::kFloat),
      "saved operands have shape ", operands.sizes(), " and dtype ", operands.scalar_type());
  const BackwardInputs inputs{
      call.keep(grad, window * n * (p.n_outputs > 0 ? p.n_outputs : D)),
      recompute ? call.keep(states, window * n * D) : nullptr,
      {recompute ? nullptr : operands.data_ptr(),
       recompute ? nullptr : const_cast<float*>(call.keep(floats, window * columns.floats * n)),
       window < n_loops ? const_cast<float*>(call.keep(start, n * D)) : nullptr}};
  const int n_threads = useful_threads(p, available_threads());
  Tensor memory = workspace(engine.backward_workspace(p, recompute, n_threads));
  engine.backward(p, call.inputs(), inputs, grads.gradients(), memory.data_ptr(), n_threads);
  return grads.tensors();
}

// The mean squared error of the last n_supervised predictions of x tokens, [], and its gradients.
// targets: [B, (S + 1) / 2, n_outputs].
std::tuple<Tensor, std::vector<Tensor>> mse(
    const Tensor& embeddings, const std::optional<Tensor>& positions, const Tensor& state,
    at::TensorList weights, const Tensor& targets, int64_t n_supervised, c10::List<bool> wanted,
    int64_t n_heads, int64_t n_loops, int64_t window, std::string injection,
    std::string precision, std::string block, int64_t n_hidden, std::string mask,
    double norm_eps) {
  const Settings settings{n_heads, n_loops,  window, injection, precision,
                          block,   n_hidden, mask,   norm_eps};
  Call call(embeddings, positions, state, weights, settings);
  const Engine& engine = engine_for(precision, settings.kind());
  const LoopShape& p = call.shape();
  TORCH_CHECK_VALUE(p.n_outputs > 0, "a read-out is needed");
  TORCH_CHECK_VALUE(1 <= n_supervised && n_supervised <= window, "n_supervised = ", n_supervised,
                    "; 1 .. window = ", window, " is needed");
  const GradientTensors grads(p, settings.kind(), embeddings, positions, state, weights, wanted);
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

}  // namespace

// Parts of the ops' schemas: of a call's tensors, and of Settings.
#define TENSORS "Tensor embeddings, Tensor? positions, Tensor state, Tensor[] weights"
#define OTHER_SETTINGS \
  "str injection, str precision, str block, int n_hidden, str mask, float norm_eps"
#define SETTINGS "int n_heads, SymInt n_loops, SymInt window, " OTHER_SETTINGS

TORCH_LIBRARY_FRAGMENT(looped_fast, library) {
  library.def("cpu_read_in(Tensor xs, Tensor ys, Tensor weight, Tensor bias) -> Tensor");
  library.def("cpu_loop_infer(" TENSORS ", " SETTINGS
              ", Tensor? packed=None, Tensor? seen=None) -> Tensor");
  library.def(
      "cpu_pack(Tensor embeddings, Tensor[] weights, int n_heads, str precision, "
      "str block, int n_hidden) -> Tensor");
  library.def(
      "cpu_loop_until(" TENSORS ", int n_heads, SymInt max_loops, " OTHER_SETTINGS ", "
      "float tolerance, Tensor? seen=None) -> (Tensor predictions, Tensor n_loops)");
  library.def(
      "cpu_loop_forward(" TENSORS ", " SETTINGS ", Tensor? packed, bool recompute) "
      "-> (Tensor outputs, Tensor operands, Tensor floats, Tensor states, Tensor start)");
  library.def(
      "cpu_loop_backward(Tensor grad, Tensor operands, Tensor floats, Tensor states, "
      "Tensor start, " TENSORS ", bool[] wanted, " SETTINGS ") -> Tensor[]");
  library.def(
      "cpu_loop_mse(" TENSORS ", Tensor targets, SymInt n_supervised, bool[] wanted, " SETTINGS
      ") -> (Tensor error, Tensor[] gradients)");
  library.def(
      "cpu_loop_mse_backward(Tensor grad, Tensor[] gradients, Tensor[] inputs) -> Tensor[]");
  library.def("cpu_empty_cache() -> ()", free_recycled);
  library.def("cpu_unsupported(str precision) -> str",
              [](std::string precision) { return unsupported(precision); });
  library.def("cpu_torch() -> str", [] { return std::string(LOOPED_FAST_TORCH); });
  library.def("cpu_threads() -> int", [] { return int64_t{available_threads()}; });
  library.def("cpu_quota(str root) -> float", [](std::string root) { return cgroup_quota(root); });
}

TORCH_LIBRARY_IMPL(looped_fast, CPU, library) {
  library.impl("cpu_read_in", embed_prompt);
  library.impl("cpu_loop_infer", infer);
  library.impl("cpu_pack", pack);
  library.impl("cpu_loop_until", until);
  library.impl("cpu_loop_forward", forward);
  library.impl("cpu_loop_backward", backward);
  library.impl("cpu_loop_mse", mse);
  library.impl("cpu_loop_mse_backward", mse_backward);
}

}  // namespace looped_fast
