// Threads: a parallel region on torch's OpenMP pool, and teams of threads that share work.
#pragma once

#include <atomic>
#include <cstdint>

namespace looped_fast {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part `index` of `n_parts` of 0..n: contiguous, sizes within one `unit` of each other.
inline Range split(int64_t n, int64_t index, int64_t n_parts, int64_t unit = 1) {
  const int64_t n_units = (n + unit - 1) / unit;
  const int64_t begin = n_units * index / n_parts * unit;
  const int64_t end = n_units * (index + 1) / n_parts * unit;
  return {begin < n ? begin : n, end < n ? end : n};
}

// Most waits take a few microseconds, so a thread spins first, for half as long after each time that
// this was in vain. Then it sleeps: an awaited thread whose core is busy can only run on this one.
class Barrier {
 public:
  // Throws after abort(): a thread that failed will not arrive.
  void wait(int n_threads);
  void abort();

 private:
  bool is_over(int generation) const;
  void wake_all();

  std::atomic<int> arrived_{0};
  std::atomic<int> generation_{0};
  std::atomic<int> n_asleep_{0};
  std::atomic<int> spins_{4000};  // some 200 microseconds
  std::atomic<bool> aborted_{false};
};

// Membership in the team that works on an item: this is thread `rank` of `size`.
struct Team {
  int rank;
  int size;
  Barrier* barrier;

  void wait() const {
    if (size > 1) barrier->wait(size);
  }
  // This member's share of n things; `unit` keeps rows that are stored in pairs with one thread.
  Range share(int64_t n, int64_t unit = 1) const { return split(n, rank, size, unit); }
};

using ThreadBody = void (*)(void* context, int thread, int n_threads, Barrier& barrier);

// Runs `body` on up to n_threads threads, which may meet at `barrier`, and returns when all are
// done. An exception in one ends the waits of the others and is rethrown here.
void run_parallel(int n_threads, ThreadBody body, void* context);

// Calls f(thread, n_threads, barrier); OpenMP may start fewer threads, and other numbers later.
template <class F>
void parallel(int n_threads, F&& f) {
  run_parallel(
      n_threads,
      [](void* context, int thread, int n, Barrier& barrier) {
        (*static_cast<F*>(context))(thread, n, barrier);
      },
      &f);
}

// Number of threads the engine may use: torch.get_num_threads(), at most as many as there are CPUs
// for this process; 1 inside a parallel region of torch.
int available_threads();

// Names a phase in the torch profiler. Only the calling thread's share is recorded, as the
// profiler does not follow OpenMP threads.
class Phase {
 public:
  Phase(const char* name, int thread);
  ~Phase();
  Phase(const Phase&) = delete;
  Phase& operator=(const Phase&) = delete;

 private:
  void* record_;
};

}  // namespace looped_fast
