// Four floats at a time in the vector extensions of GCC and Clang, for any processor.
//
// This is the reference for the other simd_*.h, which offer the same functions over wider registers. A partial
// load reads `count` elements and sets the other lanes to zero; a partial store writes `count` elements.
#ifndef SSU_BRIDGE_CPU_SIMD_PORTABLE_H_
#define SSU_BRIDGE_CPU_SIMD_PORTABLE_H_

#include <string.h>

#include "cpu/step_arguments.h"
#include "cpu/vector_bits.h"

namespace ssu_bridge {
namespace {

typedef uint16_t Words __attribute__((vector_size(8)));

inline Vec splat(float value) { return Vec{value, value, value, value}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
// Rounds the product too: a fused operation without hardware for it would be a library call.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

// yes where a > b, else no.
inline Vec select_greater(Vec a, Vec b, Vec yes, Vec no) { return float_of(choose(a > b, bits_of(yes), bits_of(no))); }
// When either is a NaN these give the second operand.
inline Vec min(Vec a, Vec b) { return select_greater(b, a, a, b); }
inline Vec max(Vec a, Vec b) { return select_greater(a, b, a, b); }
inline Vec negative_abs(Vec a) { return float_of(bits_of(a) | splat_bits(0x80000000u)); }

// To the nearest integer, |a| < 2^22: the sum has no room for a fraction.
inline Vec round_to_integer(Vec a) {
  Vec big = splat(12582912.0f);
  return (a + big) - big;
}

inline Vec power_of_two(Ints exponent) { return reinterpret_cast<Vec>((exponent + 127) << 23); }

// a * 2^exponent, |exponent| <= 250. In two steps, since the power alone may overflow, and so that a subnormal result
// is rounded once.
inline Vec scale_by_power(Vec a, Vec exponent) {
  // A NaN has no integer; any will do, since it is multiplied by a NaN.
  Vec clean = float_of(choose(exponent == exponent, bits_of(exponent), splat_bits(0)));
  Ints whole = __builtin_convertvector(clean, Ints);
  Ints half = whole >> 1;
  return a * power_of_two(half) * power_of_two(whole - half);
}

inline Vec widen(BFloat16, Bits words) { return float_of(words << 16); }

inline Vec widen(Float16, Bits words) {
  Bits sign = (words & 0x8000u) << 16;
  Bits magnitude = words & 0x7fffu;
  Bits normal = (magnitude << 13) + splat_bits(112u << 23);
  Bits special = (magnitude << 13) | splat_bits(0x7f800000u);
  Vec subnormal = __builtin_convertvector(reinterpret_cast<Ints>(magnitude), Vec) * splat(0x1p-24f);
  Bits finite = choose(magnitude < 0x400u, bits_of(subnormal), normal);
  return float_of(sign | choose(magnitude >= 0x7c00u, special, finite));
}

// The upper halves of the lanes are the result. Rounding carries into the sign of a NaN that has its lowest bits set,
// so the value must not be one: see canonical().
inline Bits rounded_to_bf16(Vec value) {
  Bits bits = bits_of(value);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
inline Bits narrow(BFloat16, Vec value) { return rounded_to_bf16(value) >> 16; }

inline Bits narrow(Float16, Vec value) {
  Bits sign = (bits_of(value) >> 16) & 0x8000u;
  Bits magnitude = bits_of(value) & 0x7fffffffu;
  // Adding 0.5 leaves a unit of 2^-24, that of a subnormal Float16, in the last place: the addition rounds.
  Bits subnormal = bits_of(float_of(magnitude) + splat(0.5f)) - bits_of(splat(0.5f));
  Bits normal = (magnitude - splat_bits(112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  Bits finite = choose(magnitude < 0x38800000u, subnormal, normal);
  Bits bounded = choose(magnitude >= 0x477ff000u, splat_bits(0x7c00u), finite);
  Bits quiet = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
  return sign | choose(magnitude > 0x7f800000u, quiet, bounded);
}

inline Vec load(const float* from) {
  Vec value;
  memcpy(&value, from, sizeof value);
  return value;
}
inline Vec load(const float* from, int64_t count) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
}
inline void store(float* to, Vec value) { memcpy(to, &value, sizeof value); }
inline void store(float* to, Vec value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = value[i];
}

template <class Half>
inline Vec load(const Half* from) {
  Words words;
  memcpy(&words, from, sizeof words);
  return widen(Half{}, __builtin_convertvector(words, Bits));
}
template <class Half>
inline Vec load(const Half* from, int64_t count) {
  Half lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
}
template <class Half>
inline void store(Half* to, Vec value) {
  Words words = __builtin_convertvector(narrow(Half{}, value), Words);
  memcpy(to, &words, sizeof words);
}
template <class Half>
inline void store(Half* to, Vec value, int64_t count) {
  Half lanes[kLanes];
  store(lanes, value);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// a with every NaN replaced by the usual one. An operation on NaNs gives one of its operands' or the usual one.
inline Vec canonical(Vec a) { return float_of(choose(a == a, bits_of(a), bits_of(splat(__builtin_nanf(""))))); }

// Vectors of the even and the odd columns: two vectors of BFloat16 come apart into them without a shuffle.
inline Pair pair_of(Bits words) { return {float_of(words << 16), float_of(words & 0xffff0000u)}; }
inline Bits words_of(Pair pair) {
  return (rounded_to_bf16(pair.even) >> 16) | (rounded_to_bf16(pair.odd) & 0xffff0000u);
}
inline Pair load_pair(const BFloat16* from) {
  Bits words;
  memcpy(&words, from, sizeof words);
  return pair_of(words);
}
inline Pair load_pair(const BFloat16* from, int64_t count) {
  BFloat16 words[2 * kLanes] = {};
  for (int64_t i = 0; i < count; ++i) words[i] = from[i];
  return load_pair(words);
}
inline void store_pair(BFloat16* to, Pair pair) {
  Bits words = words_of(pair);
  memcpy(to, &words, sizeof words);
}
inline void store_pair(BFloat16* to, Pair pair, int64_t count) {
  BFloat16 words[2 * kLanes];
  store_pair(words, pair);
  for (int64_t i = 0; i < count; ++i) to[i] = words[i];
}
inline Pair deinterleave(Vec low, Vec high) {
  return {Vec{low[0], low[2], high[0], high[2]}, Vec{low[1], low[3], high[1], high[3]}};
}

template <class Integer>
inline Ints load_integers(const Integer* from) {
  return Ints{from[0], from[1], from[2], from[3]};
}
// The lowest bits of the lanes.
template <class Integer>
inline void store_integers(Integer* to, Ints value) {
  for (int64_t i = 0; i < kLanes; ++i) to[i] = static_cast<Integer>(value[i]);
}

// The products of 64 bits of the lower 32 bits of the lanes.
inline Longs multiply_low_halves(Longs a, Longs b) {
  return Longs{uint64_t{static_cast<uint32_t>(a[0])} * static_cast<uint32_t>(b[0]),
               uint64_t{static_cast<uint32_t>(a[1])} * static_cast<uint32_t>(b[1])};
}
// The even lanes, or the odd ones, of a and b in turn.
inline Longs interleaved_even(Longs a, Longs b) { return Longs{a[0], b[0]}; }
inline Longs interleaved_odd(Longs a, Longs b) { return Longs{a[1], b[1]}; }

// a with the lanes from `count` on set to zero, whatever they hold.
inline Vec keep(Vec a, int64_t count) {
  Ints lane = {0, 1, 2, 3};
  return float_of(choose(lane < static_cast<int32_t>(count), bits_of(a), splat_bits(0)));
}

// The sum over the lanes of each row, added in the same order whichever row it is.
inline void store_sums(const Vec (&rows)[kRowGroup], float* sums) {
  for (int i = 0; i < kRowGroup; ++i) sums[i] = (rows[i][0] + rows[i][1]) + (rows[i][2] + rows[i][3]);
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_SIMD_PORTABLE_H_
