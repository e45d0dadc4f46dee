// LayerNorm of rows of D floats: x_hat = (x - mean) / std, y = x_hat * weight + bias.
// Statistics are fp32 and the variance takes its own pass: a loop compounds what cancellation
// would lose.
#pragma once

#include <cmath>

#include "threads.h"
#include "vec.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

constexpr float kLayerNormEps = 1e-5f;  // config.LAYER_NORM_EPS

// A LayerNorm's output at columns j.. from the normalised input.
inline Vec scale_and_shift(Vec x_hat, const float* weight, const float* bias, int64_t j) {
  return at::vec::fmadd(x_hat, Vec::loadu(weight + j), Vec::loadu(bias + j));
}

// Normalises rows i..i + kRows - 1 at a time, which hides the latency of the sums of each.
template <int kRows, class Load, class Emit>
inline void normalize_rows(int64_t i, int64_t D, float* x, Load load, Emit emit,
                           float* rstd_out) {
  Vec sum_0[kRows], sum_1[kRows], mean[kRows], rstd[kRows];
  for (int r = 0; r < kRows; ++r) sum_0[r] = sum_1[r] = Vec(0.f);
  for (int64_t j = 0; j < D; j += kStride) {
    for (int r = 0; r < kRows; ++r) {
      const Vec x_0 = load(i + r, j), x_1 = load(i + r, j + kVec);
      x_0.store(x + (i + r) * D + j);
      x_1.store(x + (i + r) * D + j + kVec);
      sum_0[r] = sum_0[r] + x_0;
      sum_1[r] = sum_1[r] + x_1;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    mean[r] = Vec(sum(sum_0[r] + sum_1[r]) / static_cast<float>(D));
    sum_0[r] = sum_1[r] = Vec(0.f);
  }
  for (int64_t j = 0; j < D; j += kStride) {
    for (int r = 0; r < kRows; ++r) {
      const float* row = x + (i + r) * D + j;
      const Vec d_0 = Vec::loadu(row) - mean[r], d_1 = Vec::loadu(row + kVec) - mean[r];
      sum_0[r] = at::vec::fmadd(d_0, d_0, sum_0[r]);
      sum_1[r] = at::vec::fmadd(d_1, d_1, sum_1[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const float variance = sum(sum_0[r] + sum_1[r]) / static_cast<float>(D);
    const float value = 1.f / std::sqrt(variance + kLayerNormEps);
    if (rstd_out) rstd_out[i + r] = value;
    rstd[r] = Vec(value);
  }
  for (int64_t j = 0; j < D; j += kStride) {
    for (int r = 0; r < kRows; ++r) {
      const float* row = x + (i + r) * D + j;
      emit(i + r, j, (Vec::loadu(row) - mean[r]) * rstd[r],
           (Vec::loadu(row + kVec) - mean[r]) * rstd[r]);
    }
  }
}

// Normalises rows of x [., D]: x = load(row, column) first, then emit(row, column, x_hat, next
// x_hat) for every two vectors. rstd: 1 / std of each row; null: not wanted.
template <class Load, class Emit>
inline void normalize(Range rows, int64_t D, float* x, Load load, Emit emit, float* rstd) {
  int64_t i = rows.begin;
  for (; i + 2 <= rows.end; i += 2) normalize_rows<2>(i, D, x, load, emit, rstd);
  if (i < rows.end) normalize_rows<1>(i, D, x, load, emit, rstd);
}

// Stores rows of h = LN(x), and x_hat unless null, as operands T; x = load(row, column) first.
template <class T, class Load>
inline void normalize_to_operands(Range rows, int64_t D, float* x, Load load, const float* weight,
                                  const float* bias, T* x_hat, T* h, float* rstd) {
  normalize(
      rows, D, x, load,
      [=](int64_t i, int64_t j, Vec v_0, Vec v_1) {
        const int64_t at = i * D + j;
        Operand<T>::store(h + at, scale_and_shift(v_0, weight, bias, j),
                          scale_and_shift(v_1, weight, bias, j + kVec));
        if (x_hat) Operand<T>::store(x_hat + at, v_0, v_1);
      },
      rstd);
}

// Arguments of a LayerNorm's backward, from row 0 of an item. X: the type of the saved x_hat.
template <class X>
struct LayerNormBackward {
  const X* x_hat;       // [rows, D]
  const float* rstd;    // [rows]
  const float* weight;  // [D]
  float* dx;            // [rows, D], gradient of the residual stream: added to, or overwritten
  float* grad_weight;   // [D], added to
  float* grad_bias;     // [D], added to
};

// dx (+)= rstd * (g - mean(g) - x_hat * mean(g * x_hat)), g = dy * weight; dy(row, j) is a Vec.
template <bool kAccumulate, class X, class Dy>
inline void layer_norm_backward(const LayerNormBackward<X> ln, int64_t D, Range rows, Dy dy) {
  constexpr int64_t kRows = 4;  // rows whose sums stay in registers
  for (int64_t i = rows.begin; i < rows.end; i += kRows) {
    const int64_t m = rows.end - i < kRows ? rows.end - i : kRows;
    float mean_g[kRows], mean_gx[kRows];
    for (int64_t r = 0; r < m; ++r) {
      Vec g_0(0.f), g_1(0.f), gx_0(0.f), gx_1(0.f);
      for (int64_t j = 0; j < D; j += kStride) {
        const Vec a = dy(i + r, j) * Vec::loadu(ln.weight + j);
        const Vec b = dy(i + r, j + kVec) * Vec::loadu(ln.weight + j + kVec);
        g_0 = g_0 + a;
        g_1 = g_1 + b;
        gx_0 = at::vec::fmadd(a, Operand<X>::load(ln.x_hat + (i + r) * D + j), gx_0);
        gx_1 = at::vec::fmadd(b, Operand<X>::load(ln.x_hat + (i + r) * D + j + kVec), gx_1);
      }
      mean_g[r] = sum(g_0 + g_1) / static_cast<float>(D);
      mean_gx[r] = sum(gx_0 + gx_1) / static_cast<float>(D);
    }
    for (int64_t j = 0; j < D; j += kVec) {
      const Vec weight = Vec::loadu(ln.weight + j);
      Vec grad_weight(0.f), grad_bias(0.f);
      for (int64_t r = 0; r < m; ++r) {
        const int64_t at = (i + r) * D + j;
        const Vec g = dy(i + r, j), x_hat = Operand<X>::load(ln.x_hat + at);
        grad_weight = at::vec::fmadd(g, x_hat, grad_weight);
        grad_bias = grad_bias + g;
        Vec dx = (g * weight - Vec(mean_g[r]) - x_hat * Vec(mean_gx[r])) * Vec(ln.rstd[i + r]);
        if constexpr (kAccumulate) dx = dx + Vec::loadu(ln.dx + at);
        dx.store(ln.dx + at);
      }
      add_to(ln.grad_weight + j, grad_weight);
      add_to(ln.grad_bias + j, grad_bias);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
