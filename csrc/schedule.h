// Which thread runs which sequences.
//
// Sequences are independent, so a thread takes an item of them and runs all loop steps on it, with
// its state in its own cache. Items that are left over when the rest is dealt out evenly, or all
// where there are fewer than threads, are run by all threads together.
#pragma once

#include <algorithm>

#include "engine.h"
#include "threads.h"

namespace looped_fast {

// Consecutive sequences that are worked on together.
struct Item {
  int64_t first_sequence;
  int64_t n_sequences;
  int64_t seq_len;

  int64_t first_token() const { return first_sequence * seq_len; }
  int64_t rows() const { return n_sequences * seq_len; }
};

// Short sequences share an item, to give products enough rows. Saved activations depend on this
// split, so it must not depend on the number of threads, which may change before the backward.
inline int64_t sequences_per_item(const Problem& problem) {
  constexpr int64_t kRows = 96, kMinItems = 16;
  const int64_t by_rows = kRows / problem.seq_len, by_items = problem.batch / kMinItems;
  return std::max<int64_t>(1, std::min(by_rows, by_items));
}

inline int64_t rows_per_item(const Problem& problem) {
  return sequences_per_item(problem) * problem.seq_len;
}

inline int64_t n_items(const Problem& problem) {
  const int64_t n = sequences_per_item(problem);
  return (problem.batch + n - 1) / n;
}

inline Item item_at(const Problem& problem, int64_t index) {
  const int64_t n = sequences_per_item(problem), first = index * n;
  return {first, std::min(n, problem.batch - first), problem.seq_len};
}

// Threads that are of use: a team of many would only wait for each other on a short item.
inline int useful_threads(const Problem& problem, int available) {
  constexpr int64_t kMinRowsPerThread = 8;
  const int64_t by_rows = std::max<int64_t>(1, rows_per_item(problem) / kMinRowsPerThread);
  return static_cast<int>(std::min<int64_t>(available, std::max(n_items(problem), by_rows)));
}

// f(item, team, owner) for each item of mine; `owner` is the thread whose buffers the team shares.
// Deterministic at a given number of threads.
template <class F>
void for_each_item(const Problem& problem, int thread, int n_threads, Barrier& barrier, F&& f) {
  const int64_t n = n_items(problem), n_alone = n / n_threads * n_threads;
  const Range mine = split(n_alone, thread, n_threads);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    f(item_at(problem, i), Team{0, 1, nullptr}, thread);
  }
  const Team all{thread, n_threads, &barrier};
  for (int64_t i = n_alone; i < n; ++i) {
    all.wait();  // the owner's buffers are free
    f(item_at(problem, i), all, 0);
  }
}

}  // namespace looped_fast
