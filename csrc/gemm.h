// Matrix products through the batch-reduce GEMM that torch ships (oneDNN underneath): it
// dispatches on the instruction set at run time and reaches peak on packed right-hand matrices.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>

#include "threads.h"
#include "vec.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// Columns of a packed matrix that are stored together. A tile of kTileRows x kPanel floats and
// its operands stay in the first-level cache between the product and its epilogue.
constexpr int64_t kPanel = 64;
constexpr int64_t kTileRows = 96;

// c (+)= a b; a: [m, k] row-major, b: [k, n] packed, c: [m, n] row-major floats.
template <class T>
inline void brgemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
                   int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c,
                              /*is_vnni=*/Operand<T>::kPack == 2);
}

// Releases per-thread tile state (AMX) after a thread's last product.
template <class T>
struct BrgemmScope {
  ~BrgemmScope() { at::native::cpublas::brgemm_release(Operand<T>::kPack == 2); }
};

// A right-hand matrix [depth, n_columns] in panels: [n_columns / 64][depth / kPack][64][kPack].
// The last panel is narrower if n_columns is not a multiple of 64.
template <class T>
struct PackedMatrix {
  T* data;
  int64_t depth;
  int64_t n_columns;

  int64_t n_panels() const { return (n_columns + kPanel - 1) / kPanel; }
  int64_t width(int64_t panel) const { return std::min(kPanel, n_columns - panel * kPanel); }
  T* panel(int64_t index) const { return data + index * kPanel * depth; }
};

// A product's tile of floats in the first-level cache: rows and columns of the result.
struct Tile {
  float* data;  // [rows.size()][kPanel]
  Range rows;
  Range columns;
};

// Calls epilogue(tile) for every tile of a[rows] b. a: [., depth] row-major.
template <class T, class Epilogue>
inline void multiply(const T* a, int64_t lda, const PackedMatrix<T>& b, Range rows, float* tile,
                     Epilogue&& epilogue) {
  for (int64_t p = 0; p < b.n_panels(); ++p) {
    const int64_t column = p * kPanel, width = b.width(p);
    for (int64_t i = rows.begin; i < rows.end; i += kTileRows) {
      const int64_t m = std::min(kTileRows, rows.end - i);
      brgemm(m, width, b.depth, a + i * lda, lda, b.panel(p), width, tile, kPanel, false);
      epilogue(Tile{tile, {i, i + m}, {column, column + width}});
    }
  }
}

// c[rows] (+)= a[rows] b; c: [., n_columns] row-major floats.
template <class T>
inline void multiply_into(const T* a, int64_t lda, const PackedMatrix<T>& b, Range rows, float* c,
                          bool accumulate) {
  for (int64_t p = 0; p < b.n_panels() && rows.size() > 0; ++p) {
    brgemm(rows.size(), b.width(p), b.depth, a + rows.begin * lda, lda, b.panel(p), b.width(p),
           c + rows.begin * b.n_columns + p * kPanel, b.n_columns, accumulate);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
