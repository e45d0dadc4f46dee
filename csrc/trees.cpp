// Decision trees of the tasks: looped_fast/tasks.py says what they are, and has the same in torch.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

namespace looped_fast {
namespace {

using at::Tensor;

constexpr int kAbreast = 8;  // points that go down a tree together: their loads overlap

// One tree: y of the n points of width d at x.
template <class T>
void walk(const T* x, int64_t n, int64_t d, const int64_t* tree, int64_t n_inner, const T* leaves,
          T* y) {
  for (int64_t i = 0; i < n; i += kAbreast) {
    const T* point[kAbreast];
    int64_t node[kAbreast] = {};
    for (int k = 0; k < kAbreast; ++k) point[k] = x + std::min(i + k, n - 1) * d;
    for (int64_t above = 0; above < n_inner; above = 2 * above + 1) {  // nodes above a level
#pragma GCC unroll 8
      for (int k = 0; k < kAbreast; ++k) {
        node[k] = 2 * node[k] + 1 + (point[k][tree[node[k]]] > 0);
      }
    }
    for (int k = 0; k < kAbreast; ++k) y[std::min(i + k, n - 1)] = leaves[node[k] - n_inner];
  }
}

// xs [B, n, d]; coordinates [B, 2^depth - 1] int64, of inner nodes level by level; leaf_values
// [B, 2^depth] -> the value of the leaf that each x reaches, [B, n]. A positive one goes right.
// On one thread: a batch takes less than waking another.
Tensor evaluate_trees(const Tensor& xs, const Tensor& coordinates, const Tensor& leaf_values) {
  TORCH_CHECK_VALUE(xs.dim() == 3 && coordinates.dim() == 2 && leaf_values.dim() == 2 &&
                        coordinates.size(0) == xs.size(0) && leaf_values.size(0) == xs.size(0) &&
                        leaf_values.size(1) == coordinates.size(1) + 1,
                    "shapes do not fit: xs ", xs.sizes(), ", coordinates ", coordinates.sizes(),
                    ", leaf_values ", leaf_values.sizes());
  const Tensor points = xs.contiguous(), asked = coordinates.contiguous();
  const Tensor values = leaf_values.contiguous();
  TORCH_CHECK_VALUE(coordinates.scalar_type() == at::kLong, "coordinates: int64 is needed, not ",
                    coordinates.scalar_type());
  TORCH_CHECK_VALUE(leaf_values.scalar_type() == xs.scalar_type(), "leaf_values: ",
                    xs.scalar_type(), " is needed, as xs, not ", leaf_values.scalar_type());
  const int64_t n = xs.size(1), d = xs.size(2), n_inner = coordinates.size(1);
  Tensor ys = at::empty({xs.size(0), n}, values.options());
  AT_DISPATCH_FLOATING_TYPES(xs.scalar_type(), "evaluate_trees", [&] {
    const scalar_t* x = points.const_data_ptr<scalar_t>();
    const int64_t* coordinate = asked.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < asked.numel(); ++i) {
      TORCH_CHECK_VALUE(0 <= coordinate[i] && coordinate[i] < d, "coordinate ", coordinate[i],
                        " of a tree is outside 0..", d - 1);
    }
    const scalar_t* value = values.const_data_ptr<scalar_t>();
    scalar_t* y = ys.mutable_data_ptr<scalar_t>();
    for (int64_t b = 0; b < xs.size(0); ++b) {
      walk(x + b * n * d, n, d, coordinate + b * n_inner, n_inner, value + b * (n_inner + 1),
           y + b * n);
    }
  });
  return ys;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(looped_fast, library) {
  library.def("cpu_evaluate_trees(Tensor xs, Tensor coordinates, Tensor leaf_values) -> Tensor");
}

TORCH_LIBRARY_IMPL(looped_fast, CPU, library) { library.impl("cpu_evaluate_trees", evaluate_trees); }

}  // namespace looped_fast
