// exp, softplus and SiLU over a vector, from the operations of simd.h.
// The coefficients are Chebyshev interpolants, good to 2e-8; results are within about two units in the last place.
#ifndef SSU_BRIDGE_CPU_VECTOR_MATH_H_
#define SSU_BRIDGE_CPU_VECTOR_MATH_H_

#include "cpu/simd.h"

namespace ssu_bridge {
namespace {

// Subnormal results, overflow to infinity and NaN come out as IEEE 754 would have them.
inline Vec exponential(Vec x) {
  x = min(splat(89.0f), max(splat(-105.0f), x));
  Vec power = round_to_integer(mul(x, splat(1.44269504f)));
  // log(2) in two parts; the product with the first is exact.
  Vec r = fma(power, splat(-0.693359375f), x);
  r = fma(power, splat(2.12194440e-4f), r);
  Vec tail = splat(0x1.6d1606p-10f);
  tail = fma(tail, r, splat(0x1.12106cp-7f));
  tail = fma(tail, r, splat(0x1.555516p-5f));
  tail = fma(tail, r, splat(0x1.5554d8p-3f));
  tail = fma(tail, r, splat(0.5f));
  Vec value = add(splat(1.0f), fma(mul(r, r), tail, r));
  return scale_by_power(value, power);
}

// log(1 + t) for 0 <= t <= 1, as 2 atanh(t / (2 + t)): keeps its relative accuracy down to the smallest t.
inline Vec log1p_of_fraction(Vec t) {
  // Twice the argument of atanh: halving a subnormal t would lose its last bit.
  Vec twice = div(add(t, t), add(splat(2.0f), t));
  Vec square = mul(mul(twice, twice), splat(0.25f));
  Vec tail = splat(0x1.a9bafcp-4f);
  tail = fma(tail, square, splat(0x1.65ad56p-4f));
  tail = fma(tail, square, splat(0x1.c7fb36p-4f));
  tail = fma(tail, square, splat(0x1.248f58p-3f));
  tail = fma(tail, square, splat(0x1.9999a0p-3f));
  tail = fma(tail, square, splat(0x1.555556p-2f));
  return fma(mul(twice, square), tail, twice);
}

inline Vec softplus(Vec d) {
  Vec value = add(max(splat(0.0f), d), log1p_of_fraction(exponential(negative_abs(d))));
  return select_greater(d, splat(20.0f), d, value);
}

// z * sigmoid(z), from exp(-|z|), which cannot overflow.
inline Vec silu(Vec z) {
  Vec t = exponential(negative_abs(z));
  Vec numerator = select_greater(z, splat(0.0f), splat(1.0f), t);
  return mul(z, div(numerator, add(splat(1.0f), t)));
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_VECTOR_MATH_H_
