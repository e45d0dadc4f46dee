// The loop, the mean squared error of its predictions, and the error's gradient, in one pass.
//
// The gradient of a squared error is known as soon as the prediction is, so a thread runs an item's
// backward right after its forward and saves activations of one item, not of the whole batch.
#pragma once

#include <numeric>
#include <vector>

#include "loop.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// Buffers of an item besides its activations, shared by its team.
struct MseBuffers {
  float* start;        // [rows, D], z before the window
  float* predictions;  // [W, rows, n_outputs], then their gradient

  MseBuffers(Arena& arena, const LoopShape& p)
      : start(arena.take<float>(rows_per_item(p) * p.n_embd)),
        predictions(arena.take<float>(p.window * rows_per_item(p) * p.n_outputs)) {}
};

// Memory of loop_mse on n_threads threads.
template <class T, class B>
struct MsePlan {
  BackwardPlan<T, B> backward;
  std::vector<MseBuffers> buffers;  // per thread, as owner of an item

  MsePlan(Arena& arena, const LoopShape& shape, const Inputs& inputs, int n_threads)
      : backward(arena, shape, inputs, shape.window, n_threads) {
    for (int i = 0; i < n_threads; ++i) buffers.emplace_back(arena, shape);
  }
};

// Turns an item's predictions, [W, rows, n_outputs], into the gradient of the batch's mean squared
// error, on the rows of one member of its team. Returns those rows' part of the error.
inline double mse_gradient(const LoopShape& shape, const Targets& targets, const Item& item,
                           const Team& team, float* predictions) {
  const int64_t S = shape.seq_len, n_outputs = shape.n_outputs;
  const Range rows = team.share(item.rows(), 2);  // split as in the steps, so no wait is needed
  const double count = targets.n_supervised * shape.batch * shape.n_x() * n_outputs;
  const auto scale = static_cast<float>(2.0 / count);
  double total = 0.0;
  for (int64_t w = 0; w < shape.window; ++w) {
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      float* row = predictions + (w * item.rows() + i) * n_outputs;
      const int64_t sequence = item.first_sequence + i / S, token = i % S;
      if (w < shape.window - targets.n_supervised || token % 2 != 0) {
        std::fill_n(row, n_outputs, 0.f);
        continue;
      }
      const float* y = targets.ys + (sequence * shape.n_x() + token / 2) * n_outputs;
      for (int64_t o = 0; o < n_outputs; ++o) {
        const float error = row[o] - y[o];
        total += static_cast<double>(error) * error;
        row[o] = scale * error;
      }
    }
  }
  return total / count;
}

// Returns the error and fills its gradients.
template <class T, class B>
inline float loop_mse(const LoopShape& shape, const Inputs& inputs, const Targets& targets,
                      const Gradients& gradients, void* workspace, int n_threads) {
  Arena arena(workspace);
  MsePlan<T, B> plan(arena, shape, inputs, n_threads);
  std::vector<double> errors(n_threads, 0.0);
  parallel(n_threads, [&](int thread, int n, Barrier& barrier) {
    BackwardPlan<T, B>& backward = plan.backward;
    const ForwardPlan<T>& forward = *backward.forward;
    backward.begin(inputs, gradients, thread, n, barrier);
    const BrgemmScope<T> brgemm_scope;
    for_each_item(shape, thread, n, barrier, [&](const Item& item, const Team& team, int owner) {
      const int64_t W = shape.window, first = item.first_token() * shape.n_embd;
      const int64_t step_size = item.rows() * shape.n_outputs;
      const std::vector<StepActivations<T, B>>& activations = backward.activations[owner];
      const MseBuffers& buffers = plan.buffers[owner];
      {
        const Phase phase("looped_fast::loop_steps", thread);
        const ForwardStep<T, B> step(shape, inputs, forward.weights, forward.buffers[owner],
                                  forward.scratch[thread], item, team);
        run_steps(shape, step, inputs.state + first, forward.buffers[owner].x, [&](int64_t w) {
          if (w < 0) return StepOutputs<T, B>{buffers.start, nullptr, std::nullopt};
          return StepOutputs<T, B>{nullptr, buffers.predictions + w * step_size, activations[w]};
        });
      }
      errors[thread] += mse_gradient(shape, targets, item, team, buffers.predictions);
      const Phase phase("looped_fast::loop_steps_backward", thread);
      const BackwardStep<T, B> step(shape, inputs, backward.weights, gradients,
                                 backward.buffers[owner], backward.scratch[thread],
                                 backward.sums[thread], item, team);
      step.begin_item();
      for (int64_t w = W - 1; w >= 0; --w) {
        StepInput input{};
        if (w > 0) {
          input.x_hat = activations[w - 1].final().x_hat;
        } else {
          input.z = W < shape.n_loops ? buffers.start : inputs.state + first;
        }
        step.run(buffers.predictions + w * step_size, input, activations[w]);
      }
      step.end_item();
    });
    backward.end(shape, gradients, thread, n, barrier);
  });
  return static_cast<float>(std::accumulate(errors.begin(), errors.end(), 0.0));
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
