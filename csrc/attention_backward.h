// Attention of one head of one sequence, causal or not: backward.
//
// Scores are transposed: a tile of keys against chunks of the queries that see them. The forward's
// statistics make them probabilities without a reduction, and they come out as the left-hand
// matrices of dv = p^T do and dk = ds^T q.
#pragma once

#include "attention.h"
#include "engine.h"
#include "rotation.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

constexpr int64_t kKeyTile = 32;

template <class T>
struct AttentionBackwardScratch {
  int64_t ld;    // S rounded up to 16, stride of everything that has a column per position
  T* q_t;        // [head_dim / kPack][ld][kPack], right-hand matrix of k q^T
  T* d_out_t;    // likewise, of v do^T
  T* q;          // [round_up(S) / kPack][head_dim][kPack], right-hand matrix of ds^T q
  T* d_out;      // likewise, of p^T do
  T* k_t;        // [head_dim][ld], left-hand matrix of k^T ds
  float* dq_t;   // [head_dim][ld]
  float* dq;     // [ld][head_dim]
  float* delta;  // [ld], per query: do . out
  SoftmaxStatistics statistics;  // [ld], of the forward
  float* scores;    // [kKeyTile][kChunk], k q^T
  float* d_probs;   // [kKeyTile][kChunk], v do^T
  T* probs;         // [kKeyTile][kChunk], p^T
  T* d_scores;      // [kKeyTile][kChunk], ds^T as a left-hand matrix
  T* d_scores_rhs;  // [kKeyTile / kPack][kChunk][kPack], ds^T as a right-hand matrix
  float* dv_tile;   // [kKeyTile][head_dim]
  float* dk_tile;   // [kKeyTile][head_dim]

  AttentionBackwardScratch(Arena& arena, int64_t seq_len, int64_t head_dim)
      : ld((seq_len + 15) / 16 * 16),
        q_t(arena.take<T>(ld * head_dim)),
        d_out_t(arena.take<T>(ld * head_dim)),
        q(arena.take<T>(ld * head_dim)),
        d_out(arena.take<T>(ld * head_dim)),
        k_t(arena.take<T>(ld * head_dim)),
        dq_t(arena.take<float>(ld * head_dim)),
        dq(arena.take<float>(ld * head_dim)),
        delta(arena.take<float>(ld)),
        statistics{arena.take<float>(ld), arena.take<float>(ld)},
        scores(arena.take<float>(kKeyTile * kChunk)),
        d_probs(arena.take<float>(kKeyTile * kChunk)),
        probs(arena.take<T>(kKeyTile * kChunk)),
        d_scores(arena.take<T>(kKeyTile * kChunk)),
        d_scores_rhs(Operand<T>::kPack == 1 ? d_scores : arena.take<T>(kKeyTile * kChunk)),
        dv_tile(arena.take<float>(kKeyTile * head_dim)),
        dk_tile(arena.take<float>(kKeyTile * head_dim)) {}
};

// Fills probs and d_scores of `m` keys, first_key.., and queries first_query..first_query + n:
// p = 2^(scale * (score - maximum) - log_total) and ds = p * (dp - delta) / sqrt(head_dim), zero
// where the query does not see the key. Columns n.. up to the next multiple of a vector become zero.
template <Mask kMask, class T>
inline void scores_backward(const AttentionBackwardScratch<T>& scratch, const Head<T>& head,
                            int64_t first_key, int64_t m, int64_t first_query, int64_t n) {
  const Vec scale(head.scale()), log_scale(head.scale() * kLog2E);
  for (int64_t r = 0; r < m; r += 2) {
    for (int64_t j = 0; j < n; j += kVec) {
      const Vec maximum = Vec::loadu(scratch.statistics.maximum + first_query + j);
      const Vec log_total = Vec::loadu(scratch.statistics.log_total + first_query + j);
      const Vec delta = Vec::loadu(scratch.delta + first_query + j);
      Vec ds[2];
      for (int64_t e = 0; e < 2; ++e) {
        const int64_t at = (r + e) * kChunk + j;
        int64_t first_seen = 0;
        if (kMask == Mask::kCausal) first_seen = first_key + r + e - first_query - j;  // diagonal
        Vec p(0.f);
        ds[e] = Vec(0.f);
        if (r + e < m && first_seen < kVec) {
          const Vec score = Vec::loadu(scratch.scores + at);
          p = exp2<T>(at::vec::fmsub(score - maximum, log_scale, log_total));
          ds[e] = p * (Vec::loadu(scratch.d_probs + at) - delta) * scale;
          if (first_seen > 0 || n - j < kVec) {
            p = keep_lanes(p, Vec(0.f), first_seen, n - j);
            ds[e] = keep_lanes(ds[e], Vec(0.f), first_seen, n - j);
          }
        }
        Operand<T>::store(scratch.probs + at, p);
      }
      Operand<T>::store_rows(scratch.d_scores_rhs + packed_offset<T>(r, j, kChunk), kChunk,
                             scratch.d_scores + r * kChunk + j, kChunk, ds[0], ds[1]);
    }
  }
}

// out, d_out: [S, head_dim] at stride ld_out. dq, dk, dv: laid out like q, k, v, and of these before
// their rotation.
template <Mask kMask, class T>
inline void attention_backward(const Head<T>& head, const T* out, const T* d_out, int64_t ld_out,
                               const SoftmaxStatistics& statistics, T* dq, T* dk, T* dv,
                               const Rotation& rotation,
                               const AttentionBackwardScratch<T>& scratch) {
  const auto turn_back = [&](float* rows, int64_t m, int64_t first_token) {
    for (int64_t i = 0; rotation && i < m; ++i) {
      rotation.turn<true>(rows + i * head.head_dim, head.head_dim, first_token + i);
    }
  };
  constexpr int64_t kPack = Operand<T>::kPack;
  const int64_t S = head.seq_len, head_dim = head.head_dim, ld = scratch.ld;
  transpose_words(head.q, head.ld / kPack, scratch.q_t, ld, S, head_dim / kPack);
  transpose_words(d_out, ld_out / kPack, scratch.d_out_t, ld, S, head_dim / kPack);
  pack_rows(head.q, head.ld, S, head_dim, scratch.q, head_dim);
  pack_rows(d_out, ld_out, S, head_dim, scratch.d_out, head_dim);
  transpose_rows(head.k, head.ld, S, head_dim, scratch.k_t, ld);
  std::copy_n(statistics.maximum, S, scratch.statistics.maximum);
  std::copy_n(statistics.log_total, S, scratch.statistics.log_total);
  for (int64_t i = 0; i < S; ++i) {
    Vec dot(0.f);
    for (int64_t j = 0; j < head_dim; j += kVec) {
      const int64_t count = std::min(kVec, head_dim - j), at = i * ld_out + j;
      dot = at::vec::fmadd(Operand<T>::load(out + at, count), Operand<T>::load(d_out + at, count),
                           dot);
    }
    scratch.delta[i] = sum(dot);
  }
  std::fill_n(scratch.dq_t, head_dim * ld, 0.f);
  for (int64_t k = 0; k < S; k += kKeyTile) {
    const int64_t m = std::min(kKeyTile, S - k);
    const int64_t first = kMask == Mask::kCausal ? k : 0;  // the first query that sees these keys
    for (int64_t c = first; c < S; c += kChunk) {
      const int64_t n = std::min(kChunk, S - c), depth = round_up_to_pack<T>(n);
      brgemm(m, n, head_dim, head.k + k * head.ld, head.ld, scratch.q_t + c * kPack, ld,
             scratch.scores, kChunk, false);
      brgemm(m, n, head_dim, head.v + k * head.ld, head.ld, scratch.d_out_t + c * kPack, ld,
             scratch.d_probs, kChunk, false);
      scores_backward<kMask>(scratch, head, k, m, c, n);
      brgemm(m, head_dim, depth, scratch.probs, kChunk, scratch.d_out + c * head_dim, head_dim,
             scratch.dv_tile, head_dim, c > first);
      brgemm(m, head_dim, depth, scratch.d_scores, kChunk, scratch.q + c * head_dim, head_dim,
             scratch.dk_tile, head_dim, c > first);
      brgemm(head_dim, n, round_up_to_pack<T>(m), scratch.k_t + k, ld, scratch.d_scores_rhs,
             kChunk, scratch.dq_t + c, ld, true);
    }
    turn_back(scratch.dk_tile, m, k);
    store_as_operands(scratch.dv_tile, m, head_dim, dv + k * head.ld, head.ld);
    store_as_operands(scratch.dk_tile, m, head_dim, dk + k * head.ld, head.ld);
  }
  transpose_words(scratch.dq_t, ld, scratch.dq, head_dim, head_dim, S);
  turn_back(scratch.dq, S, 0);
  store_as_operands(scratch.dq, S, head_dim, dq, head.ld);
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
