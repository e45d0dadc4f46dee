// Causal softmax(q k^T / sqrt(head_dim)) v of one head of one sequence: forward.
//
// A tile of queries goes through all keys that it sees, in chunks that stay in cache: one up to
// S = 256, and the running maximum and sum of an online softmax beyond. Scores are computed
// transposed, so that a lane is a query and no sum or maximum runs across lanes.
#pragma once

#include <cmath>

#include "pack.h"
#include "workspace.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

constexpr int64_t kQueryTile = 32;
constexpr int64_t kChunk = 256;
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

  // Factor of the scores; softmax multiplies it by kLog2E to use 2^x rather than e^x.
  float scale() const { return 1.f / std::sqrt(static_cast<float>(head_dim)); }
};

template <class T>
struct AttentionScratch {
  int64_t ld;      // S rounded up to 16, stride of what has a column per position
  T* q_t;          // [head_dim / kPack][ld][kPack], right-hand matrix of k q^T
  T* v_t;          // [head_dim][ld], left-hand matrix of v^T p^T
  float* scores;   // [kChunk][kQueryTile], k q^T
  T* probs;        // [kChunk / kPack][kQueryTile][kPack], p^T as a right-hand matrix
  float* out_t;    // [head_dim][kQueryTile]
  float* out;      // [kQueryTile][head_dim]

  AttentionScratch(Arena& arena, int64_t seq_len, int64_t head_dim)
      : ld((seq_len + 15) / 16 * 16),
        q_t(arena.take<T>(ld * head_dim)),
        v_t(arena.take<T>(ld * head_dim)),
        scores(arena.take<float>(kChunk * kQueryTile)),
        probs(arena.take<T>(kChunk * kQueryTile)),
        out_t(arena.take<float>(head_dim * kQueryTile)),
        out(arena.take<float>(kQueryTile * head_dim)) {}
};

// Statistics of the softmax of S queries, for the backward. Their sum, log-sum-exp, would round
// away the second where scores are in the thousands.
struct SoftmaxStatistics {
  float* maximum;    // [S], of a query's scores
  float* log_total;  // [S], log2 of the sum of 2^(scale * (score - maximum))
};

// Online softmax of a tile of queries, a lane each. The maximum is subtracted before scaling: its
// exponent is then 0 and its numerator rounds to 1, so that an output that is one value is exact.
struct SoftmaxState {
  static constexpr int64_t kVecs = kQueryTile / kVec;

  Vec maximum[kVecs];  // of the scores
  Vec total[kVecs];    // of 2^(scale * (score - maximum))
};

// Maximum of `floor` and n rows of a column of vectors, in four chains to hide latency.
inline Vec max_of_column(const float* column, int64_t n, Vec floor) {
  Vec max_[4] = {floor, floor, floor, floor};
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) {
    for (int64_t c = 0; c < 4; ++c) {
      max_[c] = max(max_[c], Vec::loadu(column + (k + c) * kQueryTile));
    }
  }
  for (; k < n; ++k) max_[0] = max(max_[0], Vec::loadu(column + k * kQueryTile));
  return max(max(max_[0], max_[1]), max(max_[2], max_[3]));
}

// Turns scores of n keys, first_key.., and of queries first_query.. into numerators of the softmax,
// zero where a query does not see the key and in a missing last row of a pair. `correction` becomes
// the factor of earlier chunks' results. Overwrites scores of unseen keys.
template <class T>
inline void softmax_chunk(float* scores, int64_t first_key, int64_t n, int64_t first_query,
                          float scale, bool first_chunk, SoftmaxState& state, T* probs,
                          Vec* correction) {
  const Vec lowest(-1e30f);  // 2^x is below 1e-37; infinity would give NaN
  for (int64_t q = 0; q < SoftmaxState::kVecs; ++q) {
    float* column = scores + q * kVec;
    // Keys that all lanes see come first, then keys that some lanes see.
    const int64_t diagonal = first_query + q * kVec - first_key;
    const int64_t n_seen = std::clamp<int64_t>(diagonal + kVec, 0, n);
    for (int64_t k = std::max<int64_t>(0, diagonal + 1); k < n_seen; ++k) {
      float* score = column + k * kQueryTile;
      keep_lanes(Vec::loadu(score), lowest, k - diagonal, kVec).store(score);
    }
    Vec maximum = max_of_column(column, n_seen, lowest);
    if (!first_chunk) {
      maximum = max(maximum, state.maximum[q]);
      correction[q] = exp2<float>((state.maximum[q] - maximum) * Vec(scale));
    }
    const auto probability = [&](int64_t k) {
      const Vec score = Vec::loadu(column + k * kQueryTile);
      return exp2<T>((score - maximum) * Vec(scale));
    };
    Vec total(0.f);
    for (int64_t k = 0; k < n; k += 2) {
      const Vec p_0 = k < n_seen ? probability(k) : Vec(0.f);
      const Vec p_1 = k + 1 < n_seen ? probability(k + 1) : Vec(0.f);
      total = total + (p_0 + p_1);
      Operand<T>::store_rows(probs + packed_offset<T>(k, q * kVec, kQueryTile), kQueryTile, p_0,
                             p_1);
    }
    state.total[q] = first_chunk ? total : at::vec::fmadd(state.total[q], correction[q], total);
    state.maximum[q] = maximum;
  }
}

// out: [S, head_dim] at stride ld_out. statistics: null if no backward follows.
template <class T>
inline void attention_forward(const Head<T>& head, T* out, int64_t ld_out,
                              const SoftmaxStatistics& statistics,
                              const AttentionScratch<T>& scratch) {
  constexpr int64_t kPack = Operand<T>::kPack;
  const int64_t S = head.seq_len, head_dim = head.head_dim, ld = scratch.ld;
  transpose_words(head.q, head.ld / kPack, scratch.q_t, ld, S, head_dim / kPack);
  transpose_rows(head.v, head.ld, S, head_dim, scratch.v_t, ld);
  for (int64_t i = 0; i < S; i += kQueryTile) {
    const int64_t m = std::min(kQueryTile, S - i), n_keys = i + m;
    SoftmaxState state;
    for (int64_t c = 0; c < n_keys; c += kChunk) {
      const int64_t n = std::min(kChunk, n_keys - c);
      brgemm(n, m, head_dim, head.k + c * head.ld, head.ld, scratch.q_t + i * kPack, ld,
             scratch.scores, kQueryTile, false);
      Vec correction[SoftmaxState::kVecs];
      softmax_chunk(scratch.scores, c, n, i, head.scale() * kLog2E, c == 0, state, scratch.probs,
                    correction);
      for (int64_t j = 0; c > 0 && j < head_dim; ++j) {
        for (int64_t q = 0; q < SoftmaxState::kVecs; ++q) {
          float* p = scratch.out_t + j * kQueryTile + q * kVec;
          (Vec::loadu(p) * correction[q]).store(p);
        }
      }
      brgemm(head_dim, m, round_up_to_pack<T>(n), scratch.v_t + c, ld, scratch.probs, kQueryTile,
             scratch.out_t, kQueryTile, c > 0);
    }
    for (int64_t q = 0; q < SoftmaxState::kVecs; ++q) {
      const Vec inverse = Vec(1.f) / state.total[q];
      for (int64_t j = 0; j < head_dim; ++j) {
        float* p = scratch.out_t + j * kQueryTile + q * kVec;
        (Vec::loadu(p) * inverse).store(p);
      }
      if (statistics.maximum && q * kVec < m) {
        const int64_t at = i + q * kVec;
        const int count = static_cast<int>(std::min(kVec, m - q * kVec));
        state.maximum[q].store(statistics.maximum + at, count);
        state.total[q].log2().store(statistics.log_total + at, count);
      }
    }
    transpose_words(scratch.out_t, kQueryTile, scratch.out, head_dim, head_dim, m);
    store_as_operands(scratch.out, m, head_dim, out + i * ld_out, ld_out);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
