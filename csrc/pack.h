// Rearranging matrices into the forms that products read: interleaved rows, and transposes.
#pragma once

#include "engine.h"
#include "gemm.h"
#include "vec.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// dst[j][i] = src[i][j] of 32-bit words of any type. src: [m, n], dst: [n, m].
inline void transpose_words(const void* src, int64_t ld_src, void* dst, int64_t ld_dst, int64_t m,
                            int64_t n) {
  constexpr int64_t kBlock = 16;
  const float* from = static_cast<const float*>(src);
  float* to = static_cast<float*>(dst);
  for (int64_t i = 0; i < m; i += kBlock) {
    for (int64_t j = 0; j < n; j += kBlock) {
      const float* s = from + i * ld_src + j;
      float* d = to + j * ld_dst + i;
      if (m - i >= kBlock && n - j >= kBlock) {
        at::vec::transpose_mxn<float, kBlock, kBlock>(s, ld_src, d, ld_dst);
      } else {
        const int64_t height = std::min(kBlock, m - i), width = std::min(kBlock, n - j);
        at::vec::transpose_mxn<float>(s, ld_src, d, ld_dst, static_cast<int>(height),
                                      static_cast<int>(width));
      }
    }
  }
}

// Packs rows of operands, [n_rows, n_columns] at stride ld, into a matrix of width ld_packed.
// A missing last row of a pair is zero.
template <class T>
inline void pack_rows(const T* src, int64_t ld, int64_t n_rows, int64_t n_columns, T* dst,
                      int64_t ld_packed) {
  constexpr int64_t kPack = Operand<T>::kPack;
  for (int64_t i = 0; i < n_rows; i += kPack) {
    const T* row = src + i * ld;
    if constexpr (kPack == 1) {
      std::copy(row, row + n_columns, dst + i * ld_packed);
    } else {
      const bool single = i + 1 == n_rows;
      for (int64_t j = 0; j < n_columns; j += kVec) {
        Operand<T>::pack_rows(dst + packed_offset<T>(i, j, ld_packed), row + j,
                              single ? nullptr : row + ld + j,
                              std::min(kVec, n_columns - j));
      }
    }
  }
}

// Packs rows into the panels of `dst`, at rows 0..n_rows.
template <class T>
inline void pack_rows(const T* src, int64_t ld, int64_t n_rows, const PackedMatrix<T>& dst) {
  for (int64_t p = 0; p < dst.n_panels(); ++p) {
    pack_rows(src + p * kPanel, ld, n_rows, dst.width(p), dst.panel(p), dst.width(p));
  }
}

// dst[j][i] = src[i][j]: [n_rows, n_columns] at stride ld to [n_columns, round_up(n_rows)] at
// stride ld_dst, which is a multiple of kPack. A missing last row of a pair is zero.
template <class T>
inline void transpose_rows(const T* src, int64_t ld, int64_t n_rows, int64_t n_columns, T* dst,
                           int64_t ld_dst) {
  constexpr int64_t kPack = Operand<T>::kPack, kRows = 16 * kPack, kColumns = 64;
  alignas(64) T block[kRows * kColumns];
  for (int64_t i = 0; i < n_rows; i += kRows) {
    const int64_t m = std::min(kRows, n_rows - i);
    for (int64_t j = 0; j < n_columns; j += kColumns) {
      const int64_t n = std::min(kColumns, n_columns - j);
      pack_rows(src + i * ld + j, ld, m, n, block, kColumns);
      transpose_words(block, kColumns, dst + j * ld_dst + i, ld_dst / kPack,
                      round_up_to_pack<T>(m) / kPack, n);
    }
  }
}

// Converts floats to operands. src: [m, n], contiguous; dst at stride ld.
template <class T>
inline void store_as_operands(const float* src, int64_t m, int64_t n, T* dst, int64_t ld) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; j += kVec) {
      const int64_t count = std::min(kVec, n - j);
      Operand<T>::store(dst + i * ld + j, Vec::loadu(src + i * n + j, count), count);
    }
  }
}

// Which row of a Linear's weight is packed as row i. Its gates and what they scale, rows 0..n - 1 and
// n..2 n - 1, alternate in chunks of 32, so that each panel of a product has both; n = 0: no gates.
struct RowOrder {
  static constexpr int64_t kChunk = 32;

  int64_t n_hidden;

  int64_t operator()(int64_t i) const {
    if (n_hidden == 0) return i;
    const int64_t chunk = i / kChunk;
    return chunk % 2 * n_hidden + chunk / 2 * kChunk + i % kChunk;
  }
};

// That of an MLP's first Linear.
inline RowOrder fc_order(const LoopShape& p) { return {p.has_gates() ? p.n_hidden : 0}; }

// Packs weights w of a Linear, [n_out, n_in] floats, as the right-hand matrix [n_in, n_out] of
// x w^T: panel `p` of dst.
template <class T>
inline void pack_linear(const float* w, RowOrder order, const PackedMatrix<T>& dst, int64_t p) {
  constexpr int64_t kPack = Operand<T>::kPack, kDepth = 32;
  const int64_t n_in = dst.depth, width = dst.width(p);
  alignas(64) T block[kPanel * kDepth];
  for (int64_t k = 0; k < n_in; k += kDepth) {
    for (int64_t i = 0; i < width; ++i) {
      const float* from = w + order(p * kPanel + i) * n_in + k;
      for (int64_t j = 0; j < kDepth; j += kStride) {
        Operand<T>::store(block + i * kDepth + j, Vec::loadu(from + j),
                          Vec::loadu(from + j + kVec));
      }
    }
    transpose_words(block, kDepth / kPack, dst.panel(p) + k * width, width, width, kDepth / kPack);
  }
}

// Packs w as the right-hand matrix [n_out, n_in] of dy w, for the input's gradient.
template <class T>
inline void pack_linear_backward(const float* w, RowOrder order, const PackedMatrix<T>& dst,
                                 int64_t p) {
  const int64_t n_out = dst.depth, n_in = dst.n_columns, width = dst.width(p);
  for (int64_t i = 0; i < n_out; i += 2) {
    for (int64_t j = 0; j < width; j += kVec) {
      const float* from = w + order(i) * n_in + p * kPanel + j;
      Operand<T>::store_rows(dst.panel(p) + packed_offset<T>(i, j, width), width, Vec::loadu(from),
                             Vec::loadu(from + n_in));
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
