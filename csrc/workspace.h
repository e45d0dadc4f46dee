// Carving one block of memory into buffers.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace looped_fast {

// Hands out 64-byte aligned pieces of a block, in order. Over a null block it only counts, so the
// code that lays buffers out also computes how much memory they take. AddressSanitizer sees each
// piece as an allocation.
class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)) {}

  template <class T>
  T* take(int64_t n) {
    const size_t offset = size_, n_bytes = static_cast<size_t>(n) * sizeof(T);
    size_ += (n_bytes + kRedZone + 63) / 64 * 64;
    if (!block_) return nullptr;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(block_ + offset, n_bytes);
    ASAN_POISON_MEMORY_REGION(block_ + offset + n_bytes, size_ - offset - n_bytes);
#endif
    return reinterpret_cast<T*>(block_ + offset);
  }

  size_t size() const { return size_; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kRedZone = 64;
#else
  static constexpr size_t kRedZone = 0;
#endif

  char* block_;
  size_t size_ = 0;
};

}  // namespace looped_fast
