#include "threads.h"

#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <c10/util/ParallelGuard.h>
#include <omp.h>
#include <pthread.h>

#include <exception>
#include <stdexcept>
#include <thread>

namespace looped_fast {

namespace {

std::atomic<bool> forked{false};

const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int available_threads() {
  if (forked || at::in_parallel_region()) return 1;
  return at::get_num_threads();
}

void run_parallel(int n_threads, ThreadBody body, void* context) {
  Barrier barrier;
  if (n_threads == 1) {
    body(context, 0, 1, barrier);
    return;
  }
  std::exception_ptr error;
#pragma omp parallel num_threads(n_threads)
  {
    at::internal::ThreadIdGuard thread_guard(omp_get_thread_num());
    c10::ParallelGuard region_guard(true);
    try {
      body(context, omp_get_thread_num(), omp_get_num_threads(), barrier);
    } catch (...) {
#pragma omp critical(looped_fast_error)
      if (!error) error = std::current_exception();  // the cause; aborted waits throw later
      barrier.abort();
    }
  }
  if (error) std::rethrow_exception(error);
}

void Barrier::wait(int n_threads) {
  const int generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_threads) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  constexpr int kSpinsBeforeYield = 20000;
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (aborted_.load(std::memory_order_relaxed)) {
      throw std::runtime_error("another thread of the team failed");
    }
    if (spins > kSpinsBeforeYield) {
      std::this_thread::yield();
    } else {
      __builtin_ia32_pause();
    }
  }
}

Phase::Phase(const char* name, int thread) : record_(nullptr) {
  if (thread != 0) return;
  auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
  if (!callbacks) return;  // no profiler is active
  auto* record = new at::RecordFunction(std::move(*callbacks));
  record->before(name);
  record_ = record;
}

Phase::~Phase() { delete static_cast<at::RecordFunction*>(record_); }

}  // namespace looped_fast
