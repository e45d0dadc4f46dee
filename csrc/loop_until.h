// The loop until predictions rest: a sequence stops after the first step that moves each of its
// predictions by less than a tolerance. Weights are packed once, and state stays in cache.
#pragma once

#include "loop.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// Memory on n_threads threads.
template <class T>
struct UntilPlan {
  ForwardPlan<T> forward;
  std::vector<float*> predictions;  // [2][rows, n_outputs] per thread, as owner: of two steps

  UntilPlan(Arena& arena, const LoopShape& shape, const Inputs& inputs, int n_threads)
      : forward(arena, shape, inputs, n_threads) {
    for (int i = 0; i < n_threads; ++i) {
      predictions.push_back(arena.take<float>(2 * rows_per_item(shape) * shape.n_outputs));
    }
  }
};

// True if each prediction of a sequence moved by less than the tolerance; not if one is NaN.
inline bool rests(const LoopShape& shape, const float* now, const float* before, float tolerance) {
  const int64_t first = shape.n_queries ? shape.seq_len - shape.n_queries : 0;
  const int64_t stride = shape.n_queries ? 1 : 2;  // x tokens are the even ones
  for (int64_t i = first; i < shape.seq_len; i += stride) {
    for (int64_t at = i * shape.n_outputs; at < (i + 1) * shape.n_outputs; ++at) {
      if (!(std::abs(now[at] - before[at]) < tolerance)) return false;
    }
  }
  return true;
}

// Runs one item. Every member of its team compares all predictions, and so decides alike.
// predictions: [2][rows, n_outputs], shared by the team.
template <class T, class B>
inline void run_until(const LoopShape& shape, const ForwardStep<T, B>& step, const Item& item,
                      const Team& team, const float* z, float* x, float* predictions,
                      const Until& until) {
  const int64_t width = shape.seq_len * shape.n_outputs;  // predictions of a sequence
  std::vector<bool> stopped(item.n_sequences, false);
  int64_t n_running = item.n_sequences;
  for (int64_t t = 1; t <= shape.n_loops && n_running > 0; ++t) {
    // Steps take the halves in turn. A member still reads the older one when another has begun the
    // next step, but not when that gets to its read-out: the team meets before attention.
    float* now = predictions + t % 2 * item.n_sequences * width;
    const float* before = predictions + (t + 1) % 2 * item.n_sequences * width;
    step.run(z, x, nullptr);
    step.read_out(x, now);
    z = x;
    team.wait();
    for (int64_t i = 0; i < item.n_sequences; ++i) {
      if (stopped[i]) continue;
      const bool is_last = t == shape.n_loops;
      const bool at_rest =
          t > 1 && rests(shape, now + i * width, before + i * width, until.tolerance);
      if (!is_last && !at_rest) continue;
      stopped[i] = true;
      --n_running;
      if (team.rank > 0) continue;
      const int64_t sequence = item.first_sequence + i;
      std::copy_n(now + i * width, width, until.predictions + sequence * width);
      until.n_loops[sequence] = t;
    }
  }
}

template <class T, class B>
inline void loop_until(const LoopShape& shape, const Inputs& inputs, const Until& until,
                       void* workspace, int n_threads) {
  Arena arena(workspace);
  const UntilPlan<T> plan(arena, shape, inputs, n_threads);
  std::atomic<int64_t> next_item{0};
  parallel(n_threads, [&](int thread, int n, Barrier& barrier) {
    {
      const Phase phase("looped_fast::pack_weights", thread);
      plan.forward.weights.pack(inputs.blocks, thread, n);
      barrier.wait(n);
    }
    const BrgemmScope<T> brgemm_scope;
    const auto run = [&](const Item& item, const Team& team, int owner) {
      const Phase phase("looped_fast::loop_steps", thread);
      const ForwardBuffers<T>& buffers = plan.forward.buffers[owner];
      const ForwardStep<T, B> step(shape, inputs, plan.forward.weights, buffers,
                                plan.forward.scratch[thread], item, team);
      run_until(shape, step, item, team, inputs.state + item.first_token() * shape.n_embd,
                buffers.x, plan.predictions[owner], until);
    };
    for_each_item_in_turn(shape, thread, n, barrier, next_item, run);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
