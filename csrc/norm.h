// Norms of rows of D floats: LayerNorm, x_hat = (x - mean) / std, y = x_hat * weight + bias; and
// RMSNorm without weights, y = x_hat = x / rms. Statistics are fp32 and the variance takes its own
// pass: a loop compounds what cancellation would lose.
#pragma once

#include <cmath>

#include "threads.h"
#include "vec.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// What a norm does to its input, and to the normalised input at columns j.., as policies.
struct LayerNorm {
  static constexpr bool kCentred = true, kAffine = true;

  const float* weight;  // [D]
  const float* bias;    // [D]

  Vec operator()(Vec x_hat, int64_t j) const {
    return at::vec::fmadd(x_hat, Vec::loadu(weight + j), Vec::loadu(bias + j));
  }
  Vec backward(Vec dy, int64_t j) const { return dy * Vec::loadu(weight + j); }
};

struct RmsNorm {
  static constexpr bool kCentred = false, kAffine = false;

  RmsNorm(const float* /*weight*/, const float* /*bias*/) {}

  Vec operator()(Vec x_hat, int64_t) const { return x_hat; }
  Vec backward(Vec dy, int64_t) const { return dy; }
};

// Normalises rows i..i + kRows - 1 at a time, which hides the latency of the sums of each.
template <class Norm, int kRows, class Load, class Emit>
inline void normalize_rows(int64_t i, int64_t D, float eps, float* x, Load load, Emit emit,
                           float* rstd_out) {
  Vec sum_0[kRows], sum_1[kRows], mean[kRows], rstd[kRows];
  for (int r = 0; r < kRows; ++r) sum_0[r] = sum_1[r] = Vec(0.f);
  for (int64_t j = 0; j < D; j += kStride) {
    for (int r = 0; r < kRows; ++r) {
      const Vec x_0 = load(i + r, j), x_1 = load(i + r, j + kVec);
      x_0.store(x + (i + r) * D + j);
      x_1.store(x + (i + r) * D + j + kVec);
      sum_0[r] = Norm::kCentred ? sum_0[r] + x_0 : at::vec::fmadd(x_0, x_0, sum_0[r]);
      sum_1[r] = Norm::kCentred ? sum_1[r] + x_1 : at::vec::fmadd(x_1, x_1, sum_1[r]);
    }
  }
  for (int r = 0; r < kRows && Norm::kCentred; ++r) {
    mean[r] = Vec(sum(sum_0[r] + sum_1[r]) / static_cast<float>(D));
    sum_0[r] = sum_1[r] = Vec(0.f);
  }
  for (int64_t j = 0; j < D && Norm::kCentred; j += kStride) {
    for (int r = 0; r < kRows; ++r) {
      const float* row = x + (i + r) * D + j;
      const Vec d_0 = Vec::loadu(row) - mean[r], d_1 = Vec::loadu(row + kVec) - mean[r];
      sum_0[r] = at::vec::fmadd(d_0, d_0, sum_0[r]);
      sum_1[r] = at::vec::fmadd(d_1, d_1, sum_1[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const float variance = sum(sum_0[r] + sum_1[r]) / static_cast<float>(D);
    const float value = 1.f / std::sqrt(variance + eps);
    if (rstd_out) rstd_out[i + r] = value;
    rstd[r] = Vec(value);
  }
  for (int64_t j = 0; j < D; j += kStride) {
    for (int r = 0; r < kRows; ++r) {
      const float* row = x + (i + r) * D + j;
      Vec x_0 = Vec::loadu(row), x_1 = Vec::loadu(row + kVec);
      if constexpr (Norm::kCentred) x_0 = x_0 - mean[r], x_1 = x_1 - mean[r];
      emit(i + r, j, x_0 * rstd[r], x_1 * rstd[r]);
    }
  }
}

// Normalises rows of x [., D]: x = load(row, column) first, then emit(row, column, x_hat, next
// x_hat) for every two vectors. rstd: 1 / std, or 1 / rms, of each row; null: not wanted.
template <class Norm, class Load, class Emit>
inline void normalize(Range rows, int64_t D, float eps, float* x, Load load, Emit emit,
                      float* rstd) {
  int64_t i = rows.begin;
  for (; i + 2 <= rows.end; i += 2) normalize_rows<Norm, 2>(i, D, eps, x, load, emit, rstd);
  if (i < rows.end) normalize_rows<Norm, 1>(i, D, eps, x, load, emit, rstd);
}

// Stores rows of h = norm(x), and x_hat unless null, as operands T; x = load(row, column) first.
template <class T, class Norm, class Load>
inline void normalize_to_operands(Range rows, int64_t D, float eps, float* x, Load load, Norm norm,
                                  T* x_hat, T* h, float* rstd) {
  normalize<Norm>(
      rows, D, eps, x, load,
      [=](int64_t i, int64_t j, Vec v_0, Vec v_1) {
        const int64_t at = i * D + j;
        Operand<T>::store(h + at, norm(v_0, j), norm(v_1, j + kVec));
        if (x_hat) Operand<T>::store(x_hat + at, v_0, v_1);
      },
      rstd);
}

// Stores rows of x = load(row, column), and h as operands T.
template <class T, class Load>
inline void copy_to_operands(Range rows, int64_t D, Load load, float* x, T* h) {
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    for (int64_t j = 0; j < D; j += kStride) {
      const Vec x_0 = load(i, j), x_1 = load(i, j + kVec);
      Operand<float>::store(x + i * D + j, x_0, x_1);
      Operand<T>::store(h + i * D + j, x_0, x_1);
    }
  }
}

// Arguments of a norm's backward, from row 0 of an item. X: the type of the saved x_hat.
template <class X>
struct NormBackward {
  const X* x_hat;       // [rows, D]
  const float* rstd;    // [rows]
  float* dx;            // [rows, D], gradient of the residual stream: added to, or overwritten
  float* grad_weight;   // [D], added to; null without weights
  float* grad_bias;     // [D], added to; null without weights
};

// dx (+)= rstd * (g - mean(g) - x_hat * mean(g * x_hat)), g = dy * weight; dy(row, j) is a Vec.
template <bool kAccumulate, class Norm, class X, class Dy>
inline void norm_backward(const Norm norm, const NormBackward<X> in, int64_t D, Range rows,
                          Dy dy) {
  constexpr int64_t kRows = 4;  // rows whose sums stay in registers
  for (int64_t i = rows.begin; i < rows.end; i += kRows) {
    const int64_t m = rows.end - i < kRows ? rows.end - i : kRows;
    float mean_g[kRows], mean_gx[kRows];
    for (int64_t r = 0; r < m; ++r) {
      Vec g_0(0.f), g_1(0.f), gx_0(0.f), gx_1(0.f);
      for (int64_t j = 0; j < D; j += kStride) {
        const Vec a = norm.backward(dy(i + r, j), j);
        const Vec b = norm.backward(dy(i + r, j + kVec), j + kVec);
        if constexpr (Norm::kCentred) g_0 = g_0 + a, g_1 = g_1 + b;
        gx_0 = at::vec::fmadd(a, Operand<X>::load(in.x_hat + (i + r) * D + j), gx_0);
        gx_1 = at::vec::fmadd(b, Operand<X>::load(in.x_hat + (i + r) * D + j + kVec), gx_1);
      }
      mean_g[r] = Norm::kCentred ? sum(g_0 + g_1) / static_cast<float>(D) : 0.f;
      mean_gx[r] = sum(gx_0 + gx_1) / static_cast<float>(D);
    }
    for (int64_t j = 0; j < D; j += kVec) {
      Vec grad_weight(0.f), grad_bias(0.f);
      for (int64_t r = 0; r < m; ++r) {
        const int64_t offset = (i + r) * D + j;
        const Vec g = dy(i + r, j), x_hat = Operand<X>::load(in.x_hat + offset);
        if constexpr (Norm::kAffine) {
          grad_weight = at::vec::fmadd(g, x_hat, grad_weight);
          grad_bias = grad_bias + g;
        }
        Vec dx = norm.backward(g, j);
        if constexpr (Norm::kCentred) dx = dx - Vec(mean_g[r]);
        dx = (dx - x_hat * Vec(mean_gx[r])) * Vec(in.rstd[i + r]);
        if constexpr (kAccumulate) dx = dx + Vec::loadu(in.dx + offset);
        dx.store(in.dx + offset);
      }
      if constexpr (Norm::kAffine) {
        add_to(in.grad_weight + j, grad_weight);
        add_to(in.grad_bias + j, grad_bias);
      }
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
