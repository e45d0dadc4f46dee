// The read-in: e = W t + bias of the tokens x_1, y_1, x_2, ... of prompts; y sits in coordinate 0.
//
// A row is one chain of multiply-adds over the coordinates, in order, so a prompt gets the same bits
// in any batch. A library's product takes other kernels for other numbers of rows.
#pragma once

#include <algorithm>

#include "engine.h"
#include "pack.h"
#include "threads.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// Embeds kPoints points, x and y, from point i on.
template <int kPoints>
inline void embed_points(const ReadIn& p, int64_t i) {
  const int64_t D = p.n_embd, d = p.n_dims;
  for (int64_t j = 0; j < D; j += kStride) {
    const Vec bias_0 = Vec::loadu(p.bias + j), bias_1 = Vec::loadu(p.bias + j + kVec);
    Vec sum_0[kPoints], sum_1[kPoints];
    for (int r = 0; r < kPoints; ++r) sum_0[r] = bias_0, sum_1[r] = bias_1;
    for (int64_t k = 0; k < d; ++k) {
      const float* row = p.weight_t + k * D + j;
      const Vec w_0 = Vec::loadu(row), w_1 = Vec::loadu(row + kVec);
      for (int r = 0; r < kPoints; ++r) {
        const Vec x(p.xs[(i + r) * d + k]);
        sum_0[r] = at::vec::fmadd(x, w_0, sum_0[r]);
        sum_1[r] = at::vec::fmadd(x, w_1, sum_1[r]);
      }
    }
    const Vec first_0 = Vec::loadu(p.weight_t + j), first_1 = Vec::loadu(p.weight_t + j + kVec);
    for (int r = 0; r < kPoints; ++r) {
      float* of_x = p.embeddings + 2 * (i + r) * D + j;
      sum_0[r].store(of_x);
      sum_1[r].store(of_x + kVec);
      const Vec y(p.ys[i + r]);
      at::vec::fmadd(y, first_0, bias_0).store(of_x + D);
      at::vec::fmadd(y, first_1, bias_1).store(of_x + D + kVec);
    }
  }
}

inline void read_in(const ReadIn& p, int n_threads) {
  transpose_words(p.weight, p.n_dims, p.weight_t, p.n_embd, p.n_embd, p.n_dims);
  parallel(n_threads, [&](int thread, int n, Barrier&) {
    constexpr int kPoints = 4;  // points whose sums stay in registers
    const Range points = split(p.n_points, thread, n, kPoints);
    int64_t i = points.begin;
    for (; i + kPoints <= points.end; i += kPoints) embed_points<kPoints>(p, i);
    for (; i < points.end; ++i) embed_points<1>(p, i);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
