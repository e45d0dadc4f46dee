// Carving one block of memory into buffers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace looped_fast {

// Hands out 64-byte aligned pieces of a block, in order. Over a null block it only counts, so the
// code that lays buffers out also says how much memory they take.
class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)) {}

  template <class T>
  T* take(int64_t n) {
    const size_t offset = size_;
    size_ += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    return block_ ? reinterpret_cast<T*>(block_ + offset) : nullptr;
  }

  size_t size() const { return size_; }

 private:
  char* block_;
  size_t size_ = 0;
};

}  // namespace looped_fast
