#include "memory.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>

#include <algorithm>
#include <deque>
#include <mutex>
#include <numeric>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace looped_fast {

namespace {

// Buffers of a training step: states if requested, activations, statistics, and the workspaces of
// the forward and the backward.
constexpr size_t kKept = 5;
// With activations for autograd of the paper's training step they are 880 MB.
constexpr size_t kKeptBytes = size_t{1} << 30;

class Recycler {
 public:
  c10::DataPtr take(size_t n_bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto it = free_.begin(); it != free_.end(); ++it) {
        if (it->n_bytes == n_bytes) {
          c10::DataPtr data = std::move(it->data);
          free_.erase(it);
          return data;
        }
      }
      // The size has changed, at a step of a curriculum, say: free buffers near it in size, which
      // would double the peak.
      const auto is_similar = [n_bytes](const Buffer& buffer) {
        return n_bytes / 2 <= buffer.n_bytes && buffer.n_bytes <= 2 * n_bytes;
      };
      free_.erase(std::remove_if(free_.begin(), free_.end(), is_similar), free_.end());
    }
    c10::DataPtr data = c10::GetCPUAllocator()->allocate(n_bytes);
    use_huge_pages(data.get(), n_bytes);
    return data;
  }

  void give(c10::DataPtr data, size_t n_bytes) {
    std::deque<Buffer> freed;  // after the lock is released
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back({std::move(data), n_bytes});
    const auto total = [this] {
      return std::accumulate(free_.begin(), free_.end(), size_t{0},
                             [](size_t sum, const Buffer& b) { return sum + b.n_bytes; });
    };
    while (free_.size() > kKept || total() > kKeptBytes) {
      freed.push_back(std::move(free_.front()));
      free_.pop_front();
    }
  }

  void clear() {
    std::deque<Buffer> freed;  // after the lock is released
    const std::lock_guard<std::mutex> lock(mutex_);
    freed.swap(free_);
  }

  // A fork while another thread holds the lock would leave it locked in the child.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Buffer {
    c10::DataPtr data;
    size_t n_bytes;
  };

  static void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t n_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHuge = uintptr_t{2} << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + n_bytes) / kHuge * kHuge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  }

  std::mutex mutex_;
  std::deque<Buffer> free_;  // oldest first
};

Recycler& recycler() {
  static auto* instance = new Recycler;  // never destroyed: tensors may outlive statics
  return *instance;
}

const int fork_handlers = pthread_atfork([] { recycler().lock(); }, [] { recycler().unlock(); },
                                         [] { recycler().unlock(); });

}  // namespace

at::Tensor empty_recycled(at::IntArrayRef sizes, at::ScalarType dtype) {
  const auto& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    return at::empty(sizes, dtype);
  }
  const size_t n_bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  auto* data = new c10::DataPtr(recycler().take(n_bytes));
  return at::from_blob(
      data->get(), sizes,
      [data, n_bytes](void*) {
        recycler().give(std::move(*data), n_bytes);
        delete data;
      },
      dtype);
}

void free_recycled() { recycler().clear(); }

}  // namespace looped_fast
