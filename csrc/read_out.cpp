// The read-out, states w^T + b, whose backward makes a tensor as large as the states: in memory
// that is used again (memory.h).
#include <ATen/core/Tensor.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <tuple>

#include "memory.h"

namespace looped_fast {
namespace {

using at::Tensor;

// states [..., D], weight [n_outputs, D], bias [n_outputs] -> [..., n_outputs].
Tensor read_out(const Tensor& states, const Tensor& weight, const Tensor& bias) {
  return at::linear(states, weight, bias);
}

// grad [..., n_outputs] -> gradients of states, weight and bias.
std::tuple<Tensor, Tensor, Tensor> read_out_backward(const Tensor& grad, const Tensor& states,
                                                     const Tensor& weight) {
  TORCH_CHECK_VALUE(states.scalar_type() == at::kFloat, "float32 tensors are needed");
  const int64_t n_outputs = weight.size(0), D = weight.size(1);
  const Tensor grad_rows = grad.reshape({-1, n_outputs}), rows = states.reshape({-1, D});
  const Tensor grad_states = empty_recycled(states.sizes(), at::kFloat);
  Tensor grad_states_rows = grad_states.view({-1, D});
  at::mm_out(grad_states_rows, grad_rows, weight);
  return {grad_states, grad_rows.t().mm(rows), grad_rows.sum(0)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(looped_fast, library) {
  library.def("cpu_read_out(Tensor states, Tensor weight, Tensor bias) -> Tensor");
  library.def(
      "cpu_read_out_backward(Tensor grad, Tensor states, Tensor weight) "
      "-> (Tensor grad_states, Tensor grad_weight, Tensor grad_bias)");
}

TORCH_LIBRARY_IMPL(looped_fast, CPU, library) {
  library.impl("cpu_read_out", read_out);
  library.impl("cpu_read_out_backward", read_out_backward);
}

}  // namespace looped_fast
