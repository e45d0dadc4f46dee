// The whole loop on all threads: its memory, its packed weights, and its items.
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

  ForwardPlan(Arena& arena, const LoopShape& shape, const Inputs& inputs, int n_threads)
      : weights(packed_or_new(arena, shape, inputs)) {
    for (int i = 0; i < n_threads; ++i) {
      buffers.emplace_back(arena, shape);
      scratch.emplace_back(arena, shape);
    }
  }

 private:
  static PackedWeights<T> packed_or_new(Arena& arena, const LoopShape& shape,
                                        const Inputs& inputs) {
    Arena packed(inputs.packed);
    return {shape.is_packed ? packed : arena, shape, PackedWeights<T>::kForward};
  }
};

// Destinations of a loop step's outputs; null: not wanted.
template <class T, class B>
struct StepOutputs {
  float* z;            // [rows, D], the item's
  float* predictions;  // [rows, n_outputs]
  std::optional<StepActivations<T, B>> saved;
};

// Runs all loop steps on one item. outputs_of(w): outputs of step w of the window; w = -1 is the
// step before it.
template <class T, class B, class OutputsOf>
inline void run_steps(const LoopShape& shape, const ForwardStep<T, B>& step, const float* z, float* x,
                      OutputsOf&& outputs_of) {
  for (int64_t w = shape.window - shape.n_loops; w < shape.window; ++w) {
    const StepOutputs<T, B> outputs = w >= -1 ? outputs_of(w) : StepOutputs<T, B>{};
    float* z_next = outputs.z ? outputs.z : x;
    step.run(z, z_next, outputs.saved ? &*outputs.saved : nullptr);
    if (outputs.predictions) step.read_out(z_next, outputs.predictions);
    z = z_next;
  }
}

template <class T, class B>
inline void loop_forward(const LoopShape& shape, const Inputs& inputs,
                         const ForwardOutputs& outputs, void* workspace, int n_threads) {
  Arena arena(workspace);
  const ForwardPlan<T> plan(arena, shape, inputs, n_threads);
  parallel(n_threads, [&](int thread, int n, Barrier& barrier) {
    if (!shape.is_packed) {
      const Phase phase("looped_fast::pack_weights", thread);
      plan.weights.pack(inputs.blocks, thread, n);
      barrier.wait(n);
    }
    const BrgemmScope<T> brgemm_scope;
    for_each_item(shape, thread, n, barrier, [&](const Item& item, const Team& team, int owner) {
      const Phase phase("looped_fast::loop_steps", thread);
      const int64_t D = shape.n_embd, first = item.first_token();
      const ForwardBuffers<T>& buffers = plan.buffers[owner];
      const ForwardStep<T, B> step(shape, inputs, plan.weights, buffers, plan.scratch[thread], item,
                                team);
      run_steps(shape, step, inputs.state + first * D, buffers.x, [&](int64_t w) {
        StepOutputs<T, B> to{};
        const int64_t row = w * shape.n_tokens() + first;
        if (w < 0) {
          if (outputs.saved.start) to.z = outputs.saved.start + first * D;
          return to;
        }
        if (outputs.states) to.z = outputs.states + row * D;
        if (outputs.predictions) to.predictions = outputs.predictions + row * shape.n_outputs;
        if (outputs.saved.operands) {
          to.saved.emplace(saved_step<T, B>(shape, outputs.saved, w, item));
        }
        return to;
      });
    });
  });
}

// Memory of a backward on n_threads threads; with n_saved > 0 also of a forward and of the
// activations that it saves in so many steps of an item.
template <class T, class B>
struct BackwardPlan {
  PackedWeights<T> weights;
  std::vector<BackwardBuffers<T>> buffers;  // per thread, as owner of an item
  std::vector<BackwardScratch<T>> scratch;  // per thread
  std::vector<ThreadSums> sums;             // per thread
  std::optional<ForwardPlan<T>> forward;    // if n_saved > 0
  std::vector<std::vector<StepActivations<T, B>>> activations;  // per thread, as owner of an item

  BackwardPlan(Arena& arena, const LoopShape& shape, const Inputs& inputs, int64_t n_saved,
               int n_threads)
      : weights(arena, shape, PackedWeights<T>::kBackward), activations(n_threads) {
    for (int i = 0; i < n_threads; ++i) {
      buffers.emplace_back(arena, shape);
      scratch.emplace_back(arena, shape);
      sums.emplace_back(arena, shape);
      for (int64_t w = 0; w < n_saved; ++w) {
        activations[i].push_back(scratch_step<T, B>(shape, arena));
      }
    }
    if (n_saved > 0) forward.emplace(arena, shape, inputs, n_threads);
  }

  // Each of n threads calls this before its items.
  void begin(const Inputs& inputs, const Gradients& gradients, int thread, int n,
             Barrier& barrier) {
    const Phase phase("looped_fast::pack_weights", thread);
    weights.pack(inputs.blocks, thread, n);
    if (forward) forward->weights.pack(inputs.blocks, thread, n);
    if (thread == 0) sums.erase(sums.begin() + n, sums.end());  // of threads that did not start
    barrier.wait(n);
    sums[thread].clear(gradients);
  }

  // Each of n threads calls this after its items.
  void end(const LoopShape& shape, const Gradients& gradients, int thread, int n,
           Barrier& barrier) const {
    barrier.wait(n);
    const Phase phase("looped_fast::reduce_gradients", thread);
    reduce(sums, shape, gradients, thread, n);
  }
};

template <class T, class B>
inline void loop_backward(const LoopShape& shape, const Inputs& inputs,
                          const BackwardInputs& outer, const Gradients& gradients,
                          void* workspace, int n_threads) {
  const bool recompute = outer.saved.operands == nullptr;
  Arena arena(workspace);
  BackwardPlan<T, B> plan(arena, shape, inputs, recompute ? 1 : 0, n_threads);
  // One region: OpenMP may start another number of threads, and so of sums, in the next one.
  parallel(n_threads, [&](int thread, int n, Barrier& barrier) {
    plan.begin(inputs, gradients, thread, n, barrier);
    const BrgemmScope<T> brgemm_scope;
    for_each_item(shape, thread, n, barrier, [&](const Item& item, const Team& team, int owner) {
      const Phase phase("looped_fast::loop_steps_backward", thread);
      const int64_t D = shape.n_embd, offset = item.first_token() * D;
      const int64_t grad_width = shape.n_outputs ? shape.n_outputs : D;
      const BackwardStep<T, B> step(shape, inputs, plan.weights, gradients, plan.buffers[owner],
                                 plan.scratch[thread], plan.sums[thread], item, team);
      step.begin_item();
      for (int64_t w = shape.window - 1; w >= 0; --w) {
        const int64_t row = w * shape.n_tokens() + item.first_token();
        const float* grad = outer.grad + row * grad_width;
        StepInput input{};
        if (w == 0) {
          input.z = (outer.saved.start ? outer.saved.start : inputs.state) + offset;
        } else if (recompute) {
          input.z = outer.states + (row - shape.n_tokens()) * D;
        } else {
          input.x_hat = saved_step<T, B>(shape, outer.saved, w - 1, item).final().x_hat;
        }
        if (recompute) {
          const ForwardPlan<T>& forward = *plan.forward;
          const StepActivations<T, B>& activations = plan.activations[owner][0];
          ForwardStep<T, B>(shape, inputs, forward.weights, forward.buffers[owner],
                         forward.scratch[thread], item, team)
              .run(input.z, forward.buffers[owner].x, &activations);
          step.run(grad, input, activations);
        } else {
          step.run(grad, input, saved_step<T, B>(shape, outer.saved, w, item));
        }
      }
      step.end_item();
    });
    plan.end(shape, gradients, thread, n, barrier);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
