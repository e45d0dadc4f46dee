// Causal softmax(q k^T / sqrt(head_dim)) v of one head of one sequence: forward.
//
// A tile of queries meets all keys it may see, in chunks that stay in cache: one chunk up to
// S = 256, and the running maximum and sum of an online softmax beyond.
#pragma once

#include <cmath>
#include <limits>

#include "pack.h"
#include "workspace.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

constexpr int64_t kQueryTile = 32;
constexpr int64_t kChunk = 256;  // a multiple of kQueryTile
static_assert(kChunk % kQueryTile == 0);

// One head's q, k, v: [S, head_dim] each, rows `ld` apart inside qkv [rows, 3 D].
template <class T>
struct Head {
  const T* q;
  const T* k;
  const T* v;
  int64_t ld;
  int64_t seq_len;
  int64_t head_dim;

  // Scores are scaled for 2^x rather than e^x.
  float scale() const { return 1.f / std::sqrt(static_cast<float>(head_dim)); }
};

template <class T>
struct AttentionScratch {
  int64_t ld_keys;  // S rounded up to 16
  T* k_t;           // [head_dim / kPack][ld_keys][kPack], right-hand matrix of q k^T
  T* v;             // [round_up(S) / kPack][head_dim][kPack], right-hand matrix of p v
  float* scores;    // [kQueryTile][kChunk]
  T* probs;         // [kQueryTile][kChunk]
  float* out;       // [kQueryTile][head_dim]

  AttentionScratch(Arena& arena, int64_t seq_len, int64_t head_dim)
      : ld_keys((seq_len + 15) / 16 * 16),
        k_t(arena.take<T>(ld_keys * head_dim)),
        v(arena.take<T>(ld_keys * head_dim)),
        scores(arena.take<float>(kQueryTile * kChunk)),
        probs(arena.take<T>(kQueryTile * kChunk)),
        out(arena.take<float>(kQueryTile * head_dim)) {}
};

// Largest of the first n scores.
inline float max_of(const float* scores, int64_t n) {
  Vec result(-std::numeric_limits<float>::infinity());
  int64_t j = 0;
  for (; j + kVec <= n; j += kVec) result = at::vec::maximum(result, Vec::loadu(scores + j));
  if (j < n) {
    const Vec tail = at::vec::maximum(result, Vec::loadu(scores + j));
    result = Vec::set(result, tail, n - j);
  }
  return max(result);
}

// Softmax numerators of a row: probs[j] = 2^(scale * scores[j] - log_max) for the first n_visible,
// and zero up to n. Returns their sum.
template <class T>
inline float softmax_row(const float* scores, int64_t n_visible, int64_t n, float scale,
                         float log_max, T* probs) {
  const Vec scale_vec(scale), shift(-log_max);
  Vec total(0.f);
  int64_t j = 0;
  for (; j + kVec <= n_visible; j += kVec) {
    const Vec p = exp2<T>(at::vec::fmadd(Vec::loadu(scores + j), scale_vec, shift));
    total = total + p;
    Operand<T>::store(probs + j, p);
  }
  if (j < n_visible) {
    Vec p = exp2<T>(at::vec::fmadd(Vec::loadu(scores + j), scale_vec, shift));
    p = Vec::set(Vec(0.f), p, n_visible - j);
    total = total + p;
    Operand<T>::store(probs + j, p);
    j += kVec;
  }
  for (; j < n; j += kVec) Operand<T>::store(probs + j, Vec(0.f));
  return sum(total);
}

// out: [S, head_dim] at stride ld_out. log_sum_exp: [S], log2 of the softmax denominators; null
// where no backward follows.
template <class T>
inline void attention_forward(const Head<T>& head, T* out, int64_t ld_out, float* log_sum_exp,
                              const AttentionScratch<T>& scratch) {
  constexpr int64_t kPack = Operand<T>::kPack;
  const int64_t S = head.seq_len, head_dim = head.head_dim;
  const float scale = head.scale() * kLog2E;
  transpose_words(head.k, head.ld / kPack, scratch.k_t, scratch.ld_keys, S, head_dim / kPack);
  pack_rows(head.v, head.ld, S, head_dim, scratch.v, head_dim);
  for (int64_t i = 0; i < S; i += kQueryTile) {
    const int64_t m = std::min(kQueryTile, S - i), n_keys = i + m;
    alignas(64) float log_max[kQueryTile], total[kQueryTile];  // online softmax of each query
    for (int64_t c = 0; c < n_keys; c += kChunk) {
      const int64_t n = std::min(kChunk, n_keys - c), depth = round_up_to_pack<T>(n);
      brgemm(m, n, head_dim, head.q + i * head.ld, head.ld, scratch.k_t + c * kPack,
             scratch.ld_keys, scratch.scores, kChunk, false);
      for (int64_t r = 0; r < m; ++r) {
        const float* scores = scratch.scores + r * kChunk;
        const int64_t n_visible = std::min(n, i + r + 1 - c);
        float new_max = max_of(scores, n_visible) * scale;
        if (c > 0) {
          new_max = std::max(new_max, log_max[r]);
          const float correction = std::exp2(log_max[r] - new_max);
          total[r] *= correction;
          for (int64_t j = 0; j < head_dim; ++j) scratch.out[r * head_dim + j] *= correction;
        } else {
          total[r] = 0.f;
        }
        log_max[r] = new_max;
        total[r] += softmax_row(scores, n_visible, depth, scale, new_max, scratch.probs + r * kChunk);
      }
      brgemm(m, head_dim, depth, scratch.probs, kChunk, scratch.v + c * head_dim, head_dim,
             scratch.out, head_dim, c > 0);
    }
    for (int64_t r = 0; r < m; ++r) {
      const Vec inverse(1.f / total[r]);
      for (int64_t j = 0; j < head_dim; j += kVec) {
        const int64_t count = std::min(kVec, head_dim - j);
        Operand<T>::store(out + (i + r) * ld_out + j,
                          Vec::loadu(scratch.out + r * head_dim + j, count) * inverse, count);
      }
    }
    for (int64_t r = 0; log_sum_exp && r < m; r += kVec) {
      const Vec lse = Vec::loadu(log_max + r) + Vec::loadu(total + r).log2();
      lse.store(log_sum_exp + i + r, static_cast<int>(std::min(kVec, m - r)));
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
