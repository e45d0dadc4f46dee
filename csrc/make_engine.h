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
      [](const LoopShape& shape, int n_threads) {
        Arena arena(nullptr);
        ForwardPlan<T>(arena, shape, n_threads);
        return arena.size();
      },
      loop_forward<T, B>,
      [](const LoopShape& shape, int n_threads) {
        Arena arena(nullptr);
        UntilPlan<T>(arena, shape, n_threads);
        return arena.size();
      },
      loop_until<T, B>,
      [](const LoopShape& shape, bool recompute, int n_threads) {
        Arena arena(nullptr);
        BackwardPlan<T, B>(arena, shape, recompute ? 1 : 0, n_threads);
        return arena.size();
      },
      loop_backward<T, B>,
      [](const LoopShape& shape, int n_threads) {
        Arena arena(nullptr);
        MsePlan<T, B>(arena, shape, n_threads);
        return arena.size();
      },
      loop_mse<T, B>,
  };
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
