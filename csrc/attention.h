// softmax(q k^T / sqrt(head_dim)) v of one head of one sequence, causal or not: forward.
//
// A tile of queries goes through all keys that it sees, in chunks that stay in cache: one up to
// S = 256, and the running maximum and sum of an online softmax beyond. Scores are computed
// transposed, so that a lane is a query and no sum or maximum runs across lanes.
//
// Queries that share a sequence's first tokens (LoopShape::n_queries) see some of these and
// themselves: their own key and value are where their online softmax starts.
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
  int64_t ld;      // stride of what has a column per position, at least one tile
  T* q_t;          // [head_dim / kPack][ld][kPack], right-hand matrix of k q^T
  T* v_t;          // [head_dim][ld], left-hand matrix of v^T p^T
  float* scores;   // [kChunk][kQueryTile], k q^T
  T* probs;        // [kChunk / kPack][kQueryTile][kPack], p^T as a right-hand matrix
  float* out_t;    // [head_dim][kQueryTile]
  float* out;      // [kQueryTile][head_dim]

  AttentionScratch(Arena& arena, int64_t seq_len, int64_t head_dim)
      : ld(std::max(kQueryTile, (seq_len + 15) / 16 * 16)),
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

// Keys first_key.. of a causal sequence, as queries first_query.. see them.
struct CausalKeys {
  static int64_t n_keys(int64_t n_queries, int64_t /*seq_len*/) { return n_queries; }

  int64_t first_key;
  int64_t first_query;

  int64_t diagonal(int64_t q) const { return first_query + q * kVec - first_key; }
  // Keys that all lanes of vector q see come first, then keys that some lanes see.
  int64_t seen_by_all(int64_t q) const { return diagonal(q) + 1; }
  int64_t seen_by_some(int64_t q) const { return diagonal(q) + kVec; }
  Vec mask(Vec score, Vec unseen, int64_t k, int64_t q) const {
    return keep_lanes(score, unseen, k - diagonal(q), kVec);
  }
};

// Keys of a sequence that every query sees.
struct AllKeys {
  static constexpr int64_t kAll = int64_t{1} << 62;
  static int64_t n_keys(int64_t /*n_queries*/, int64_t seq_len) { return seq_len; }

  int64_t first_key;
  int64_t first_query;

  int64_t seen_by_all(int64_t) const { return kAll; }
  int64_t seen_by_some(int64_t) const { return kAll; }
  Vec mask(Vec score, Vec, int64_t, int64_t) const { return score; }
};

// Keys first_key.. of a sequence, of which a tile of queries sees the first ones, each its own
// number.
class SharedKeys {
 public:
  SharedKeys(const int64_t* seen, int64_t m) {
    for (int64_t q = 0; q < kQueryTile; ++q) {
      const int64_t n = seen[std::min(q, m - 1)];  // lanes without a query do as the last one
      counts_[q] = static_cast<float>(n);
      int64_t &least = least_[q / kVec], &most = most_[q / kVec];
      least = q % kVec ? std::min(least, n) : n;
      most = q % kVec ? std::max(most, n) : n;
    }
  }

  int64_t n_keys() const { return *std::max_element(most_, most_ + SoftmaxState::kVecs); }
  void start_at(int64_t first_key) { first_key_ = first_key; }

  int64_t seen_by_all(int64_t q) const { return least_[q] - first_key_; }
  int64_t seen_by_some(int64_t q) const { return most_[q] - first_key_; }
  Vec mask(Vec score, Vec unseen, int64_t k, int64_t q) const {
    const Vec key(static_cast<float>(first_key_ + k));
    return Vec::blendv(unseen, score, key < Vec::loadu(counts_ + q * kVec));
  }

 private:
  float counts_[kQueryTile];  // keys that a lane sees
  int64_t least_[SoftmaxState::kVecs];
  int64_t most_[SoftmaxState::kVecs];
  int64_t first_key_ = 0;
};

// Turns scores of n keys into numerators of the softmax, zero where a query does not see the key
// and in a missing last row of a pair. `correction` becomes the factor of earlier results, unless
// there are none (`is_first`). Overwrites scores of unseen keys.
template <class T, class Keys>
inline void softmax_chunk(float* scores, const Keys& keys, int64_t n, float scale, bool is_first,
                          SoftmaxState& state, T* probs, Vec* correction) {
  const Vec lowest(-1e30f);  // 2^x is below 1e-37; infinity would give NaN
  for (int64_t q = 0; q < SoftmaxState::kVecs; ++q) {
    float* column = scores + q * kVec;
    const int64_t n_seen = std::clamp<int64_t>(keys.seen_by_some(q), 0, n);
    for (int64_t k = std::max<int64_t>(0, keys.seen_by_all(q)); k < n_seen; ++k) {
      float* score = column + k * kQueryTile;
      keys.mask(Vec::loadu(score), lowest, k, q).store(score);
    }
    Vec maximum = max_of_column(column, n_seen, lowest);
    if (!is_first) {
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
    state.total[q] = is_first ? total : at::vec::fmadd(state.total[q], correction[q], total);
    state.maximum[q] = maximum;
  }
}

// out_t[row][lane] *= factors[lane].
template <class T>
inline void scale_columns(const AttentionScratch<T>& scratch, int64_t head_dim,
                          const Vec* factors) {
  for (int64_t j = 0; j < head_dim; ++j) {
    for (int64_t q = 0; q < SoftmaxState::kVecs; ++q) {
      float* p = scratch.out_t + j * kQueryTile + q * kVec;
      (Vec::loadu(p) * factors[q]).store(p);
    }
  }
}

// Adds n keys and values, first_key.., to the softmax of a tile of m queries, whose results so far
// are in out_t. q_t: the queries, transposed, at stride ld_q.
template <class T, class Keys>
inline void attend_to_chunk(const Head<T>& head, const T* q_t, int64_t ld_q, int64_t m,
                            int64_t first_key, int64_t n, const Keys& keys, bool is_first,
                            SoftmaxState& state, const AttentionScratch<T>& scratch) {
  brgemm(n, m, head.head_dim, head.k + first_key * head.ld, head.ld, q_t, ld_q, scratch.scores,
         kQueryTile, false);
  Vec correction[SoftmaxState::kVecs];
  softmax_chunk(scratch.scores, keys, n, head.scale() * kLog2E, is_first, state, scratch.probs,
                correction);
  if (!is_first) scale_columns(scratch, head.head_dim, correction);
  brgemm(head.head_dim, m, round_up_to_pack<T>(n), scratch.v_t + first_key, scratch.ld,
         scratch.probs, kQueryTile, scratch.out_t, kQueryTile, !is_first);
}

// Divides out_t by the softmax's sums, and stores the m queries' outputs at stride ld_out.
template <class T>
inline void store_attention(const SoftmaxState& state, int64_t m, int64_t head_dim, T* out,
                            int64_t ld_out, const AttentionScratch<T>& scratch) {
  Vec inverse[SoftmaxState::kVecs];
  for (int64_t q = 0; q < SoftmaxState::kVecs; ++q) inverse[q] = Vec(1.f) / state.total[q];
  scale_columns(scratch, head_dim, inverse);
  transpose_words(scratch.out_t, kQueryTile, scratch.out, head_dim, head_dim, m);
  store_as_operands(scratch.out, m, head_dim, out, ld_out);
}

// out: [S, head_dim] at stride ld_out. statistics: null if no backward follows.
template <class Keys, class T>
inline void attention_forward(const Head<T>& head, T* out, int64_t ld_out,
                              const SoftmaxStatistics& statistics,
                              const AttentionScratch<T>& scratch) {
  constexpr int64_t kPack = Operand<T>::kPack;
  const int64_t S = head.seq_len, head_dim = head.head_dim, ld = scratch.ld;
  transpose_words(head.q, head.ld / kPack, scratch.q_t, ld, S, head_dim / kPack);
  transpose_rows(head.v, head.ld, S, head_dim, scratch.v_t, ld);
  for (int64_t i = 0; i < S; i += kQueryTile) {
    const int64_t m = std::min(kQueryTile, S - i), n_keys = Keys::n_keys(i + m, S);
    SoftmaxState state;
    for (int64_t c = 0; c < n_keys; c += kChunk) {
      attend_to_chunk(head, scratch.q_t + i * kPack, ld, m, c, std::min(kChunk, n_keys - c),
                      Keys{c, i}, c == 0, state, scratch);
    }
    for (int64_t q = 0; statistics.maximum && q * kVec < m; ++q) {
      const int64_t at = i + q * kVec;
      const int count = static_cast<int>(std::min(kVec, m - q * kVec));
      state.maximum[q].store(statistics.maximum + at, count);
      state.total[q].log2().store(statistics.log_total + at, count);
    }
    store_attention(state, m, head_dim, out + i * ld_out, ld_out, scratch);
  }
}

// Attention of the n_queries tokens that follow the S of `head`: query i sees seen[i] of these and
// itself. Follows attention_forward, which has transposed the values. out: their rows, at ld_out.
template <class T>
inline void query_attention(const Head<T>& head, const int64_t* seen, int64_t n_queries, T* out,
                            int64_t ld_out, const AttentionScratch<T>& scratch) {
  constexpr int64_t kPack = Operand<T>::kPack;
  const int64_t head_dim = head.head_dim;
  for (int64_t i = 0; i < n_queries; i += kQueryTile) {
    const int64_t m = std::min(kQueryTile, n_queries - i), row = (head.seq_len + i) * head.ld;
    transpose_words(head.q + row, head.ld / kPack, scratch.q_t, kQueryTile, m, head_dim / kPack);
    float scores[kQueryTile] = {};  // of a query and its own key
    for (int64_t q = 0; q < m; ++q) {
      const int64_t at = row + q * head.ld;
      Vec score(0.f);
      for (int64_t j = 0; j < head_dim; j += kVec) {
        const int64_t count = std::min(kVec, head_dim - j);
        score = at::vec::fmadd(Operand<T>::load(head.q + at + j, count),
                               Operand<T>::load(head.k + at + j, count), score);
        Operand<float>::store(scratch.out + q * head_dim + j,
                              Operand<T>::load(head.v + at + j, count), count);
      }
      scores[q] = sum(score);
    }
    transpose_words(scratch.out, head_dim, scratch.out_t, kQueryTile, m, head_dim);
    SoftmaxState state;
    for (int64_t q = 0; q < SoftmaxState::kVecs; ++q) {
      state.maximum[q] = Vec::loadu(scores + q * kVec);
      state.total[q] = Vec(1.f);
    }
    SharedKeys keys(seen + i, m);
    for (int64_t c = 0; c < keys.n_keys(); c += kChunk) {
      keys.start_at(c);
      attend_to_chunk(head, scratch.q_t, kQueryTile, m, c, std::min(kChunk, keys.n_keys() - c),
                      keys, false, state, scratch);
    }
    store_attention(state, m, head_dim, out + i * ld_out, ld_out, scratch);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
