// The whole loop on all threads: memory, weights, and items dealt out to steps.
#pragma once

#include <optional>
#include <vector>

#include "backward.h"
#include "forward.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// Memory of a forward on n_threads threads.
template <class T>
struct ForwardPlan {
  PackedWeights<T> weights;
  std::vector<ForwardBuffers<T>> buffers;  // per thread, as owner of an item
  std::vector<ForwardScratch<T>> scratch;  // per thread

  ForwardPlan(Arena& arena, const Problem& problem, int n_threads)
      : weights(arena, problem, PackedWeights<T>::kForward) {
    for (int i = 0; i < n_threads; ++i) {
      buffers.emplace_back(arena, problem);
      scratch.emplace_back(arena, problem);
    }
  }
};

template <class T>
inline void loop_forward(const Problem& problem, const Inputs& inputs,
                         const ForwardOutputs& outputs, void* workspace, int n_threads) {
  Arena arena(workspace);
  const ForwardPlan<T> plan(arena, problem, n_threads);
  parallel(n_threads, [&](int thread, int n, Barrier& barrier) {
    {
      const Phase phase("looped_fast::pack_weights", thread);
      plan.weights.pack(inputs.blocks, thread, n);
      barrier.wait(n);
    }
    const BrgemmScope<T> brgemm_scope;
    for_each_item(problem, thread, n, barrier, [&](const Item& item, const Team& team, int owner) {
      const Phase phase("looped_fast::loop_steps", thread);
      const int64_t D = problem.n_embd, offset = item.first_token() * D;
      const ForwardStep<T> step(problem, inputs, plan.weights, plan.buffers[owner],
                                plan.scratch[thread], item, team);
      const float* z = inputs.state + offset;
      for (int64_t i = 0; i < problem.n_loops; ++i) {
        const int64_t w = i - (problem.n_loops - problem.window);  // step of the window
        float* z_next = plan.buffers[owner].x;
        if (w >= 0 && outputs.states) {
          z_next = outputs.states + w * problem.n_tokens() * D + offset;
        } else if (w == -1 && outputs.saved.start) {
          z_next = outputs.saved.start + offset;
        }
        if (w >= 0 && outputs.saved.activations) {
          const StepActivations<T> saved = saved_step<T>(problem, outputs.saved, w, item);
          step.run(z, z_next, &saved);
        } else {
          step.run(z, z_next, nullptr);
        }
        if (w >= 0 && outputs.predictions) {
          const int64_t row = w * problem.n_tokens() + item.first_token();
          step.read_out(z_next, outputs.predictions + row * problem.n_outputs);
        }
        z = z_next;
      }
    });
  });
}

// Memory of a backward on n_threads threads.
template <class T>
struct BackwardPlan {
  PackedWeights<T> weights;
  std::vector<BackwardBuffers<T>> buffers;  // per thread, as owner of an item
  std::vector<BackwardScratch<T>> scratch;  // per thread
  std::vector<ThreadSums> sums;             // per thread
  // To recompute activations, else empty:
  std::optional<ForwardPlan<T>> forward;
  std::vector<StepActivations<T>> activations;  // per thread, as owner of an item

  BackwardPlan(Arena& arena, const Problem& problem, bool recompute, int n_threads)
      : weights(arena, problem, PackedWeights<T>::kBackward) {
    for (int i = 0; i < n_threads; ++i) {
      buffers.emplace_back(arena, problem);
      scratch.emplace_back(arena, problem);
      sums.emplace_back(arena, problem);
      if (recompute) activations.push_back(scratch_step<T>(problem, arena));
    }
    if (recompute) forward.emplace(arena, problem, n_threads);
  }
};

template <class T>
inline void loop_backward(const Problem& problem, const Inputs& inputs,
                          const BackwardInputs& outer, const Gradients& gradients,
                          void* workspace, int n_threads) {
  const bool recompute = outer.saved.activations == nullptr;
  Arena arena(workspace);
  BackwardPlan<T> plan(arena, problem, recompute, n_threads);
  // One region: OpenMP may give the next one another number of threads, and so of sums.
  parallel(n_threads, [&](int thread, int n, Barrier& barrier) {
    {
      const Phase phase("looped_fast::pack_weights", thread);
      plan.weights.pack(inputs.blocks, thread, n);
      if (recompute) plan.forward->weights.pack(inputs.blocks, thread, n);
      if (thread == 0) plan.sums.erase(plan.sums.begin() + n, plan.sums.end());  // threads we got
      barrier.wait(n);
    }
    const BrgemmScope<T> brgemm_scope;
    const ThreadSums& sums = plan.sums[thread];
    sums.clear();
    for_each_item(problem, thread, n, barrier, [&](const Item& item, const Team& team, int owner) {
      const Phase phase("looped_fast::loop_steps_backward", thread);
      const int64_t D = problem.n_embd, offset = item.first_token() * D;
      const int64_t grad_width = problem.n_outputs ? problem.n_outputs : D;
      const BackwardStep<T> step(problem, inputs, plan.weights, gradients, plan.buffers[owner],
                                 plan.scratch[thread], sums, item, team);
      step.begin_item();
      for (int64_t w = problem.window - 1; w >= 0; --w) {
        const int64_t row = w * problem.n_tokens() + item.first_token();
        const float* grad = outer.grad + row * grad_width;
        StepInput<T> input{};
        if (w == 0) {
          input.z = (outer.saved.start ? outer.saved.start : inputs.state) + offset;
        } else if (recompute) {
          input.z = outer.states + (row - problem.n_tokens()) * D;
        } else {
          input.x_hat = saved_step<T>(problem, outer.saved, w - 1, item).final().x_hat;
        }
        if (recompute) {
          const ForwardPlan<T>& forward = *plan.forward;
          const StepActivations<T>& activations = plan.activations[owner];
          ForwardStep<T>(problem, inputs, forward.weights, forward.buffers[owner],
                         forward.scratch[thread], item, team)
              .run(input.z, forward.buffers[owner].x, &activations);
          step.run(grad, input, activations);
        } else {
          step.run(grad, input, saved_step<T>(problem, outer.saved, w, item));
        }
      }
      step.end_item();
    });
    barrier.wait(n);
    const Phase phase("looped_fast::reduce_gradients", thread);
    reduce(plan.sums, problem, gradients, thread, n);
  });
}

template <class T>
constexpr Engine make_engine() {
  return {
      [](const Problem& problem, int n_threads) {
        Arena arena(nullptr);
        ForwardPlan<T>(arena, problem, n_threads);
        return arena.size();
      },
      loop_forward<T>,
      [](const Problem& problem, bool recompute, int n_threads) {
        Arena arena(nullptr);
        BackwardPlan<T>(arena, problem, recompute, n_threads);
        return arena.size();
      },
      loop_backward<T>,
  };
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
