// Which thread runs which sequences.
//
// Sequences are independent, so a thread takes an item of them and runs all loop steps on it, with
// its state in its own cache. Items that do not divide evenly among the threads are run by all
// threads as one team.
#pragma once

#include <algorithm>
#include <atomic>

#include "engine.h"
#include "threads.h"

namespace looped_fast {

// Consecutive sequences that are processed together.
struct Item {
  int64_t first_sequence;
  int64_t n_sequences;
  int64_t seq_len;

  int64_t first_token() const { return first_sequence * seq_len; }
  int64_t rows() const { return n_sequences * seq_len; }
};

// Short sequences share an item, to give products enough rows. Saved activations depend on this
// split, so it must not depend on the number of threads, which may change before the backward.
inline int64_t sequences_per_item(const LoopShape& shape) {
  constexpr int64_t kRows = 96, kMinItems = 16;
  const int64_t by_rows = kRows / shape.seq_len, by_items = shape.batch / kMinItems;
  return std::max<int64_t>(1, std::min(by_rows, by_items));
}

inline int64_t rows_per_item(const LoopShape& shape) {
  return sequences_per_item(shape) * shape.seq_len;
}

inline int64_t n_items(const LoopShape& shape) {
  const int64_t n = sequences_per_item(shape);
  return (shape.batch + n - 1) / n;
}

inline Item item_at(const LoopShape& shape, int64_t index) {
  const int64_t n = sequences_per_item(shape), first = index * n;
  return {first, std::min(n, shape.batch - first), shape.seq_len};
}

// Number of threads worth using: members of a large team mostly wait on a short item.
inline int useful_threads(const LoopShape& shape, int available) {
  constexpr int64_t kMinRowsPerThread = 8;
  const int64_t by_rows = std::max<int64_t>(1, rows_per_item(shape) / kMinRowsPerThread);
  return static_cast<int>(std::min<int64_t>(available, std::max(n_items(shape), by_rows)));
}

// Calls f(item, team, owner) for the items that do not divide evenly among the threads: all threads
// are one team, which shares the buffers of thread `owner`.
template <class F>
void for_each_uneven_item(const LoopShape& shape, int thread, int n_threads, Barrier& barrier,
                          F&& f) {
  const int64_t n = n_items(shape);
  const Team all{thread, n_threads, &barrier};
  for (int64_t i = n / n_threads * n_threads; i < n; ++i) {
    all.wait();  // for the owner's buffers
    f(item_at(shape, i), all, 0);
  }
}

// Calls f(item, team, owner) for each item of this thread, then for those of all threads.
// Deterministic at a given number of threads.
template <class F>
void for_each_item(const LoopShape& shape, int thread, int n_threads, Barrier& barrier, F&& f) {
  const Range mine = split(n_items(shape) / n_threads * n_threads, thread, n_threads);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    f(item_at(shape, i), Team{0, 1, nullptr}, thread);
  }
  for_each_uneven_item(shape, thread, n_threads, barrier, f);
}

// Like for_each_item, but a thread takes the next item when it is done with one, as items take
// different times. `next` is 0 at first, and shared by the threads.
template <class F>
void for_each_item_in_turn(const LoopShape& shape, int thread, int n_threads, Barrier& barrier,
                           std::atomic<int64_t>& next, F&& f) {
  const int64_t n_even = n_items(shape) / n_threads * n_threads;
  for (int64_t i = next++; i < n_even; i = next++) {
    f(item_at(shape, i), Team{0, 1, nullptr}, thread);
  }
  for_each_uneven_item(shape, thread, n_threads, barrier, f);
}

}  // namespace looped_fast
