// The loop, the mean squared error of its predictions, and the error's gradient, in one go.
//
// The gradient of a squared error is known as soon as the prediction is, so a thread goes back
// over an item right after it went forward: activations are those of one item per thread rather
// than of the whole batch.
#pragma once

#include <numeric>
#include <vector>

#include "loop.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// Of an item, beside its activations; its team shares them.
struct MseBuffers {
  float* start;        // [rows, D], z before the window
  float* predictions;  // [W, rows, n_outputs], then their gradient

  MseBuffers(Arena& arena, const Problem& p)
      : start(arena.take<float>(rows_per_item(p) * p.n_embd)),
        predictions(arena.take<float>(p.window * rows_per_item(p) * p.n_outputs)) {}
};

// Memory on n_threads threads.
template <class T>
struct MsePlan {
  BackwardPlan<T> backward;
  std::vector<MseBuffers> buffers;  // per thread, as owner of an item

  MsePlan(Arena& arena, const Problem& problem, int n_threads)
      : backward(arena, problem, problem.window, n_threads) {
    for (int i = 0; i < n_threads; ++i) buffers.emplace_back(arena, problem);
  }
};

// Turns an item's predictions, [W, rows, n_outputs], into the gradient of the mean squared error of
// the batch; by one member of its team, whose rows' part of the error it returns.
inline double mse_gradient(const Problem& problem, const Targets& targets, const Item& item,
                           const Team& team, float* predictions) {
  const int64_t S = problem.seq_len, n_outputs = problem.n_outputs;
  const Range rows = team.share(item.rows(), 2);  // as of the steps, which so need not wait
  const double count = targets.n_supervised * problem.batch * problem.n_x() * n_outputs;
  const auto scale = static_cast<float>(2.0 / count);
  double total = 0.0;
  for (int64_t w = 0; w < problem.window; ++w) {
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      float* row = predictions + (w * item.rows() + i) * n_outputs;
      const int64_t sequence = item.first_sequence + i / S, token = i % S;
      if (w < problem.window - targets.n_supervised || token % 2 != 0) {
        std::fill_n(row, n_outputs, 0.f);
        continue;
      }
      const float* y = targets.ys + (sequence * problem.n_x() + token / 2) * n_outputs;
      for (int64_t o = 0; o < n_outputs; ++o) {
        const float error = row[o] - y[o];
        total += static_cast<double>(error) * error;
        row[o] = scale * error;
      }
    }
  }
  return total / count;
}

// The error, and its gradients.
template <class T>
inline float loop_mse(const Problem& problem, const Inputs& inputs, const Targets& targets,
                      const Gradients& gradients, void* workspace, int n_threads) {
  Arena arena(workspace);
  MsePlan<T> plan(arena, problem, n_threads);
  std::vector<double> errors(n_threads, 0.0);
  parallel(n_threads, [&](int thread, int n, Barrier& barrier) {
    BackwardPlan<T>& backward = plan.backward;
    const ForwardPlan<T>& forward = *backward.forward;
    backward.begin(inputs, thread, n, barrier);
    const BrgemmScope<T> brgemm_scope;
    for_each_item(problem, thread, n, barrier, [&](const Item& item, const Team& team, int owner) {
      const int64_t W = problem.window, first = item.first_token() * problem.n_embd;
      const int64_t step_size = item.rows() * problem.n_outputs;
      const std::vector<StepActivations<T>>& activations = backward.activations[owner];
      const MseBuffers& buffers = plan.buffers[owner];
      {
        const Phase phase("looped_fast::loop_steps", thread);
        const ForwardStep<T> step(problem, inputs, forward.weights, forward.buffers[owner],
                                  forward.scratch[thread], item, team);
        run_steps(problem, step, inputs.state + first, forward.buffers[owner].x, [&](int64_t w) {
          if (w < 0) return StepOutputs<T>{buffers.start, nullptr, std::nullopt};
          return StepOutputs<T>{nullptr, buffers.predictions + w * step_size, activations[w]};
        });
      }
      errors[thread] += mse_gradient(problem, targets, item, team, buffers.predictions);
      const Phase phase("looped_fast::loop_steps_backward", thread);
      const BackwardStep<T> step(problem, inputs, backward.weights, gradients,
                                 backward.buffers[owner], backward.scratch[thread],
                                 backward.sums[thread], item, team);
      step.begin_item();
      for (int64_t w = W - 1; w >= 0; --w) {
        StepInput<T> input{};
        if (w > 0) {
          input.x_hat = activations[w - 1].final().x_hat;
        } else {
          input.z = W < problem.n_loops ? buffers.start : inputs.state + first;
        }
        step.run(buffers.predictions + w * step_size, input, activations[w]);
      }
      step.end_item();
    });
    backward.end(problem, gradients, thread, n, barrier);
  });
  return static_cast<float>(std::accumulate(errors.begin(), errors.end(), 0.0));
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
