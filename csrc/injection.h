// Input of a loop step: x0 = inject(z, e) + p.
#pragma once

#include "engine.h"
#include "vec.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// Calls f(x0); x0(row, column) is a Vec. z: [., D], whose row 0 is token `first` of the batch.
template <class F>
inline void with_step_input(const LoopShape& shape, const Inputs& inputs, int64_t first,
                            const float* z, F&& f) {
  const int64_t D = shape.n_embd, S = shape.seq_len;
  const float* e = inputs.embeddings + first * D;
  const auto at = [=](const float* rows, int64_t i, int64_t j) {
    return Vec::loadu(rows + i * D + j);
  };
  const auto p = [=, positions = inputs.positions](int64_t i, int64_t j) {
    return at(positions, (first + i) % S, j);
  };
  switch (shape.injection) {
    case Injection::kAdd:
    case Injection::kEveryBlock:  // like kAdd in the first block
      f([=](int64_t i, int64_t j) { return at(z, i, j) + at(e, i, j) + p(i, j); });
      break;
    case Injection::kMul:
      f([=](int64_t i, int64_t j) {
        return at::vec::fmadd(at(z, i, j), at(e, i, j), p(i, j));
      });
      break;
    case Injection::kNone:
      f([=](int64_t i, int64_t j) { return at(z, i, j) + p(i, j); });
      break;
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
