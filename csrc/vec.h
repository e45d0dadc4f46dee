// Vectors of floats at the width of the instruction set, and operand types of matrix products.
//
// Everything in a header that is compiled once per instruction set sits in the inline namespace
// CPU_CAPABILITY, as in ATen: equal names must not become one symbol across instruction sets.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace looped_fast {
inline namespace CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;
using IntVec = at::vec::Vectorized<int32_t>;
constexpr int64_t kVec = Vec::size();

// Widths that are multiples of 32 are walked in strides of two vectors: two independent chains.
constexpr int64_t kStride = 2 * kVec;
static_assert(32 % kStride == 0);

inline float sum(Vec v) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, v);
}

// Maximum of each lane; b where one is NaN. at::vec::maximum spends time on NaN.
inline Vec max(Vec a, Vec b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#else
  return _mm256_max_ps(a, b);
#endif
}

inline void add_to(float* p, Vec v) { (Vec::loadu(p) + v).store(p); }

// `v` in lanes begin..end-1, `other` outside.
inline Vec keep_lanes(Vec v, Vec other, int64_t begin, int64_t end) {
  const Vec lane = Vec::arange(0.f, 1.f);
  const Vec first(static_cast<float>(begin)), last(static_cast<float>(end));
  const Vec inside = (lane >= first) & (lane < last);
  return Vec::blendv(other, v, inside);
}

// An operand type T of matrix products. The right-hand matrix [k, n] is stored as brgemm wants
// it: kPack consecutive rows interleaved, [k / kPack, n, kPack] (for bf16 called VNNI), so that
// one 32-bit word holds kPack values of a column. For float that is plain row-major.
template <class T>
struct Operand;

template <>
struct Operand<float> {
  static constexpr int64_t kPack = 1;

  static Vec load(const float* p) { return Vec::loadu(p); }
  static Vec load(const float* p, int64_t count) { return Vec::loadu(p, static_cast<int>(count)); }
  static void store(float* p, Vec v) { v.store(p); }
  static void store(float* p, Vec v, int64_t count) { v.store(p, static_cast<int>(count)); }

  // kStride columns of a row.
  static void store(float* p, Vec v_0, Vec v_1) {
    v_0.store(p);
    v_1.store(p + kVec);
  }

  // Two consecutive rows of a packed matrix of width ld, from an even row on.
  static void store_rows(float* packed, int64_t ld, Vec row_0, Vec row_1) {
    row_0.store(packed);
    row_1.store(packed + ld);
  }
  // Stores both rows in the packed matrix, and at stride ld_rows.
  static void store_rows(float* packed, int64_t ld, float* rows, int64_t ld_rows, Vec row_0,
                         Vec row_1) {
    store_rows(packed, ld, row_0, row_1);
    store_rows(rows, ld_rows, row_0, row_1);
  }
};

#if defined(__AVX512BF16__)
// Intrinsics: at::vec converts to bf16 by eight integer instructions, to run without AVX512_BF16.
template <>
struct Operand<at::BFloat16> {
  static constexpr int64_t kPack = 2;

  static Vec widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static __m256i narrow(Vec v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
  static __mmask16 first(int64_t count) {
    return static_cast<__mmask16>((1u << count) - 1);
  }

  static Vec load(const at::BFloat16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Vec load(const at::BFloat16* p, int64_t count) {
    return widen(_mm256_maskz_loadu_epi16(first(count), p));
  }
  static void store(at::BFloat16* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v));
  }
  static void store(at::BFloat16* p, Vec v, int64_t count) {
    _mm256_mask_storeu_epi16(p, first(count), narrow(v));
  }

  static void store(at::BFloat16* p, Vec v_0, Vec v_1) {
    _mm512_storeu_si512(p, narrow(v_0, v_1));
  }

  static void store_rows(at::BFloat16* packed, int64_t, Vec row_0, Vec row_1) {
    _mm512_storeu_si512(packed, interleave(narrow(row_0, row_1)));
  }
  static void store_rows(at::BFloat16* packed, int64_t, at::BFloat16* rows, int64_t ld_rows,
                         Vec row_0, Vec row_1) {
    const __m512i both = narrow(row_0, row_1);
    _mm512_storeu_si512(packed, interleave(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows), _mm512_castsi512_si256(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + ld_rows),
                        _mm512_extracti64x4_epi64(both, 1));
  }

  // `count` columns, 16 at most, of two rows of operands. row_1: null for zeros.
  static void pack_rows(at::BFloat16* packed, const at::BFloat16* row_0,
                        const at::BFloat16* row_1, int64_t count) {
    const __mmask16 columns = first(count);
    const __m256i low = _mm256_maskz_loadu_epi16(columns, row_0);
    const __m256i high =
        row_1 ? _mm256_maskz_loadu_epi16(columns, row_1) : _mm256_setzero_si256();
    const __m512i words = interleave(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    if (count == kVec) {
      _mm512_storeu_si512(packed, words);
    } else {
      _mm512_mask_storeu_epi32(packed, columns, words);
    }
  }

 private:
  static __m512i narrow(Vec low, Vec high) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  }

  // Lanes 0, 16, 1, 17, ...: the two halves in turn.
  static __m512i interleave(__m512i halves) {
    alignas(64) static constexpr uint16_t kLanes[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(kLanes), halves);
  }
};
#endif

// Offset of (row, column) in a packed matrix of width ld; `row` is a multiple of kPack.
template <class T>
inline int64_t packed_offset(int64_t row, int64_t column, int64_t ld) {
  return row * ld + column * Operand<T>::kPack;
}

template <class T>
inline int64_t round_up_to_pack(int64_t n) {
  return (n + Operand<T>::kPack - 1) / Operand<T>::kPack * Operand<T>::kPack;
}

// p * 2^n, for |n| <= 126. The AVX-512 instruction also covers overflow and underflow.
inline Vec scale_by_power(Vec p, Vec n) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(p, n);
#else
  // Adding 1.5 * 2^23 leaves n in the low mantissa bits; a shift moves it to p's exponent.
  const IntVec exponent = at::vec::cast<int32_t>(n + Vec(12582912.f)) << IntVec(23);
  return at::vec::cast<float>(at::vec::cast<int32_t>(p) + exponent);
#endif
}

// 2^t, relative error 1e-7 for float operands and 1e-4 for bf16, for t > -126. An infinite t gives
// the limit, or on AVX2 2^126 or 2^-126.
template <class T>
inline Vec exp2(Vec t) {
#if defined(CPU_CAPABILITY_AVX512)
  const Vec r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  t = at::vec::clamp(t, Vec(-126.f), Vec(126.f));
  const Vec r = t - t.round();
#endif
  const Vec n = t.round();  // r = t - n is -0.5 .. 0.5, and 0 for infinite t
  Vec p;
  if constexpr (Operand<T>::kPack == 2) {
    p = at::vec::fmadd(Vec(0.0551710934f), r, Vec(0.2426111253f));
    p = at::vec::fmadd(p, r, Vec(0.6932610958f));
    p = at::vec::fmadd(p, r, Vec(0.9999280762f));
  } else {
    p = at::vec::fmadd(Vec(0.0001534575487f), r, Vec(0.001339993151f));
    p = at::vec::fmadd(p, r, Vec(0.009618489176f));
    p = at::vec::fmadd(p, r, Vec(0.05550328777f));
    p = at::vec::fmadd(p, r, Vec(0.2402264689f));
    p = at::vec::fmadd(p, r, Vec(0.6931472057f));
    p = at::vec::fmadd(p, r, Vec(1.f));
  }
  return scale_by_power(p, n);
}

// a / b, as accurately as operands of products need.
template <class T>
inline Vec quotient(Vec a, Vec b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (Operand<T>::kPack == 2) return a * Vec(_mm512_rcp14_ps(b));
#endif
  return a / b;
}

constexpr float kLog2E = 1.4426950408889634f;

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
