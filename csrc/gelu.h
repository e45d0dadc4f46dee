// GELU in its tanh form, as x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), and its derivative.
#pragma once

#include "vec.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

constexpr float kGeluSlope = 2 * 0.7978845608028654f;  // 2 sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;

// 1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)), the reciprocal of the sigmoid.
template <class T>
inline Vec gelu_denominator(Vec x, Vec x_squared) {
  const Vec slope = at::vec::fmadd(x_squared, Vec(-kGeluSlope * kGeluCubic * kLog2E),
                                   Vec(-kGeluSlope * kLog2E));
  return exp2<T>(x * slope) + Vec(1.f);
}

template <class T>
inline Vec gelu(Vec x) {
  return quotient<T>(x, gelu_denominator<T>(x, x * x));
}

struct GeluAndDerivative {
  Vec value;
  Vec derivative;
};

template <class T>
inline GeluAndDerivative gelu_and_derivative(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  const Vec bounded = x;
#else  // 2^t stops at 2^126, so that the sigmoid of a large x is not 0, which x^2 would magnify
  const Vec bounded = at::vec::clamp(x, Vec(-20.f), Vec(20.f));
#endif
  const Vec x_squared = bounded * bounded;
  const Vec sigmoid = quotient<T>(Vec(1.f), gelu_denominator<T>(bounded, x_squared));
  const Vec slope = at::vec::fmadd(x_squared, Vec(3 * kGeluSlope * kGeluCubic), Vec(kGeluSlope));
  const Vec rest = bounded * sigmoid * (Vec(1.f) - sigmoid);
  return {x * sigmoid, at::vec::fmadd(rest, slope, sigmoid)};
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
