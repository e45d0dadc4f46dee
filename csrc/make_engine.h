// The engine's function table for an operand type and a kind of block, at the instruction set of the
// source that includes this.
#pragma once

#include "loop.h"
#include "loop_mse.h"
#include "loop_until.h"
#include "read_in.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

template <class T, class B>
constexpr Engine make_engine() {
  return {
      read_in,
      [](const LoopShape& shape) {
        using Step = StepActivations<T, B>;
        return SavedColumns{Step::n_operands(shape), Step::n_floats(shape)};
      },
      [](const LoopShape& shape) {
        Arena arena(nullptr);
        PackedWeights<T>(arena, shape, PackedWeights<T>::kForward);
        return arena.size();
      },
      [](const LoopShape& shape, const Inputs& inputs, int n_threads) {
        Arena arena(inputs.packed);
        const PackedWeights<T> weights(arena, shape, PackedWeights<T>::kForward);
        parallel(n_threads, [&](int thread, int n, Barrier&) {
          weights.pack(inputs.blocks, thread, n);
        });
      },
      [](const LoopShape& shape, int n_threads) {
        Arena arena(nullptr);
        ForwardPlan<T>(arena, shape, Inputs{}, n_threads);
        return arena.size();
      },
      loop_forward<T, B>,
      [](const LoopShape& shape, int n_threads) {
        Arena arena(nullptr);
        UntilPlan<T>(arena, shape, Inputs{}, n_threads);
        return arena.size();
      },
      loop_until<T, B>,
      [](const LoopShape& shape, bool recompute, int n_threads) {
        Arena arena(nullptr);
        BackwardPlan<T, B>(arena, shape, Inputs{}, recompute ? 1 : 0, n_threads);
        return arena.size();
      },
      loop_backward<T, B>,
      [](const LoopShape& shape, int n_threads) {
        Arena arena(nullptr);
        MsePlan<T, B>(arena, shape, Inputs{}, n_threads);
        return arena.size();
      },
      loop_mse<T, B>,
  };
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
