// Rows of quantised states: int16, int8 or float8_e4m3fn with one float32 scale.
#ifndef SSU_BRIDGE_CPU_QUANTISE_H_
#define SSU_BRIDGE_CPU_QUANTISE_H_

#include <string.h>

#include "cpu/rounding.h"
#include "cpu/simd.h"
#include "cpu/step_arguments.h"

namespace ssu_bridge {
namespace {

template <class Element>
constexpr bool kIsQuantised = false;
template <>
constexpr bool kIsQuantised<int16_t> = true;
template <>
constexpr bool kIsQuantised<int8_t> = true;
template <>
constexpr bool kIsQuantised<Float8> = true;

// The bytes of an element as an integer of its size, with a sign where that says something.
inline const int16_t* integers(const int16_t* values) { return values; }
inline const int8_t* integers(const int8_t* values) { return values; }
inline const uint8_t* integers(const Float8* values) { return &values->bits; }
inline int16_t* integers(int16_t* values) { return values; }
inline uint8_t* integers(int8_t* values) { return reinterpret_cast<uint8_t*>(values); }
inline uint8_t* integers(Float8* values) { return &values->bits; }

template <class Element>
inline Vec widen(Element, Ints values) {
  return to_float(values);
}

inline Vec widen(Float8, Ints values) {
  Bits bytes = reinterpret_cast<Bits>(values);
  Bits magnitude = bytes & 0x7fu;
  Vec subnormal = mul(to_float(values & 0x7f), splat(0x1p-9f));
  Bits normal = (magnitude << 20) + (120u << 23);
  Bits finite = choose(magnitude < 8, bits_of(subnormal), normal);
  return float_of((bytes & 0x80u) << 24 | choose(magnitude == 0x7f, bits_of(splat(__builtin_nanf(""))), finite));
}

// The element nearest to a number within the range; ties go to the even one. An integer cannot be NaN: it becomes 0.
template <class Element>
inline Ints narrow(Element, Vec v) {
  Vec number = float_of(choose(magnitude_of(v) > kInfinity, splat_bits(0), bits_of(v)));
  return to_integer(round_to_integer(number));
}

inline Ints narrow(Float8, Vec v) {
  Bits magnitude = magnitude_of(v);
  // Adding 2^14 leaves a unit of 2^-9, that of a subnormal Float8, in the last place: the addition rounds.
  Bits subnormal = bits_of(add(float_of(magnitude), splat(0x1p14f))) - bits_of(splat(0x1p14f));
  Bits normal = (magnitude - (120u << 23) + 0x7ffffu + ((magnitude >> 20) & 1)) >> 20;
  Bits finite = choose(magnitude < (121u << 23), subnormal, normal);
  return reinterpret_cast<Ints>(choose(magnitude > kInfinity, splat_bits(0x7f), sign_of(v) >> 24 | finite));
}

template <class Element>
inline Vec load_quantised(const Element* from) {
  return widen(Element{}, load_integers(integers(from)));
}
template <class Element>
inline Vec load_quantised(const Element* from, int64_t count) {
  Element lanes[kLanes] = {};
  memcpy(lanes, from, static_cast<size_t>(count) * sizeof(Element));
  return load_quantised(lanes);
}

template <class Element>
inline void store_quantised(Element* to, Vec value) {
  store_integers(integers(to), narrow(Element{}, value));
}
template <class Element>
inline void store_quantised(Element* to, Vec value, int64_t count) {
  Element lanes[kLanes];
  store_quantised(lanes, value);
  memcpy(to, lanes, static_cast<size_t>(count) * sizeof(Element));
}

// Writes whole vectors, with zeros past `count` whatever the scale.
template <class Element>
inline void read_quantised(float* to, const Element* from, float scale, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, mul(load_quantised(from + i), splat(scale)));
  if (i < count) store(to + i, keep(mul(load_quantised(from + i, count - i), splat(scale)), count - i));
}

// The largest magnitude of a row that ends in zeros, or a NaN if there is one.
inline float largest_magnitude(const float* row, int64_t count) {
  Bits lanes = splat_bits(0);
  for (int64_t i = 0; i < count; i += kLanes) lanes = larger(lanes, magnitude_of(load(row + i)));
  uint32_t each[kLanes];
  memcpy(each, &lanes, sizeof lanes);
  uint32_t bits = 0;
  for (uint32_t lane : each) bits = lane > bits ? lane : bits;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Where the reciprocal of the scale would be infinite (a scale of 0 included), the scale is 1 and the row becomes
// zeros.
inline float scale_for(float magnitude, float reciprocal) {
  float scale = magnitude * reciprocal;
  return scale <= 0x1p-128f ? 1.0f : scale;
}

// Stores a row that ends in zeros, and its scale. `words` is null to round to nearest.
template <class Element>
inline void write_quantised(Element* to, float* scale, const float* from, int64_t count, const uint32_t* words) {
  constexpr float kReciprocal = static_cast<float>(1.0 / Grid<Element>::kLargest);
  Vec largest = splat(Grid<Element>::kLargest), least = splat(-Grid<Element>::kLargest);
  *scale = scale_for(largest_magnitude(from, count), kReciprocal);
  Vec inverse = splat(1.0f / *scale);
  for (int64_t i = 0; i < count; i += kLanes) {
    // A NaN passes: it is the second operand.
    Vec v = max(least, min(largest, mul(load(from + i), inverse)));
    if constexpr (kIsRoundable<Element>)
      if (words) v = round_randomly<Element>(v, load_bits(words + i));
    i + kLanes <= count ? store_quantised(to + i, v) : store_quantised(to + i, v, count - i);
  }
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_QUANTISE_H_
