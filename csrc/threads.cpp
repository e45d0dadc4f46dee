#include "threads.h"

#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <c10/core/thread_pool.h>
#include <c10/util/ParallelGuard.h>
#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <climits>
#include <exception>
#include <fstream>
#include <future>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpus.h"

namespace looped_fast {

namespace {

// True if this process was forked, by a parent that did not start another program in it.
bool was_forked() {
#if defined(__linux__)
  constexpr unsigned kForkedNoExec = 0x40;  // PF_FORKNOEXEC of include/linux/sched.h
  std::ifstream file("/proc/self/stat");
  std::string line;
  std::getline(file, line);
  const size_t name_end = line.rfind(')');  // names may hold spaces and brackets
  if (name_end == std::string::npos) return false;
  std::istringstream fields(line.substr(name_end + 1));
  std::string skipped;
  for (int i = 0; i < 6; ++i) fields >> skipped;
  unsigned flags = 0;
  fields >> flags;
  return flags & kForkedNoExec;
#else
  return false;
#endif
}

std::atomic<bool> forked{was_forked()};
c10::ThreadPool* region_starter = nullptr;

const int fork_handler = pthread_atfork(nullptr, nullptr, [] {
  forked = true;
  region_starter = nullptr;  // its thread is the parent's
});

// GNU OpenMP gives a pool of threads to each thread that starts regions. The thread that forked
// keeps its pool in the child, where those threads are gone: a region would wait for them forever.
// It is the main thread there.
bool may_hold_dead_pool() {
#if defined(__linux__)
  return forked && syscall(SYS_gettid) == getpid();
#else
  return false;  // LLVM's OpenMP restarts after a fork
#endif
}

void run_region(int n_threads, ThreadBody body, void* context) {
  Barrier barrier;
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

}  // namespace

int available_threads() {
  if (at::in_parallel_region()) return 1;
  const int n_threads = at::get_num_threads();
  return n_threads == 1 ? 1 : std::max(1, std::min(n_threads, usable_cpus()));
}

void run_parallel(int n_threads, ThreadBody body, void* context) {
  if (n_threads == 1) {
    Barrier barrier;
    body(context, 0, 1, barrier);
    return;
  }
  if (!may_hold_dead_pool()) {
    run_region(n_threads, body, context);
    return;
  }
  if (!region_starter) region_starter = new c10::ThreadPool(1);
  const auto region = std::make_shared<std::packaged_task<void()>>(
      [=] { run_region(n_threads, body, context); });
  region_starter->run([region] { (*region)(); });
  region->get_future().get();
}

bool Barrier::is_over(int generation) const {
  if (aborted_.load(std::memory_order_relaxed)) {
    throw std::runtime_error("another thread of the team failed");
  }
  return generation_.load(std::memory_order_acquire) != generation;
}

void Barrier::wait(int n_threads) {
  const int generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_threads) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1);
    wake_all();
    return;
  }
  const int limit = spins_.load(std::memory_order_relaxed);
  for (int spins = 0; !is_over(generation); ++spins) {
    if (spins < limit) {
      __builtin_ia32_pause();
      continue;
    }
    if (spins == limit) spins_.store(limit / 2, std::memory_order_relaxed);
#if defined(__linux__)
    n_asleep_.fetch_add(1);  // wake_all looks here after the generation changed, the kernel before
    syscall(SYS_futex, &generation_, FUTEX_WAIT_PRIVATE, generation, nullptr, nullptr, 0);
    n_asleep_.fetch_sub(1);
#else
    std::this_thread::yield();
#endif
  }
}

void Barrier::abort() {
  aborted_.store(true);
  generation_.fetch_add(1);  // so that nobody falls asleep any more
  wake_all();
}

void Barrier::wake_all() {
#if defined(__linux__)
  if (n_asleep_.load() > 0) {
    syscall(SYS_futex, &generation_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }
#endif
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
