// Rotary positions: the pair (j, j + head_dim / 2) of a head is turned by the token's angle.
#pragma once

#include "engine.h"
#include "vec.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// Angles of S tokens. head_dim divides kPanel, so no pair lies in two panels of a product.
struct Rotation {
  const float* cos;  // [S, head_dim]; null: nothing is turned
  const float* sin;  // [S, head_dim]
  int64_t head_dim;

  explicit operator bool() const { return cos != nullptr; }

  // Turns `width` columns of a row, whole heads of token `token`; with kBack by the transpose, which
  // turns gradients back.
  template <bool kBack>
  void turn(float* row, int64_t width, int64_t token) const {
    const int64_t half = head_dim / 2;
    const float* c = cos + token * head_dim;
    const float* s = sin + token * head_dim;
    for (float* x = row; x < row + width; x += head_dim) {
      for (int64_t j = 0; j < half; j += kVec) {
        const int count = static_cast<int>(std::min(kVec, half - j));
        const auto at = [=](const float* p) { return Vec::loadu(p + j, count); };
        const Vec a = at(x), b = at(x + half);
        const Vec c_a = at(c), c_b = at(c + half), s_a = at(s), s_b = at(s + half);
        Vec to_a, to_b;
        if constexpr (kBack) {
          to_a = at::vec::fmadd(a, c_a, b * s_b);
          to_b = at::vec::fmsub(b, c_b, a * s_a);
        } else {
          to_a = at::vec::fmsub(a, c_a, b * s_a);
          to_b = at::vec::fmadd(b, c_b, a * s_b);
        }
        to_a.store(x + j, count);
        to_b.store(x + half + j, count);
      }
    }
  }
};

inline Rotation rotation_of(const LoopShape& shape, const Inputs& inputs) {
  const float* cos = inputs.rotation;
  return {cos, cos ? cos + shape.seq_len * shape.head_dim() : nullptr, shape.head_dim()};
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
