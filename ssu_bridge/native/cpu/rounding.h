// Rounding float32 numbers to the grid of what they will be stored as.
#ifndef SSU_BRIDGE_CPU_ROUNDING_H_
#define SSU_BRIDGE_CPU_ROUNDING_H_

#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/step_arguments.h"

namespace ssu_bridge {
namespace {

// The numbers that a type can hold, up to kLargest: whole multiples of a unit, which is 2^(exponent - kMantissaBits),
// the exponent being that of the number and at least kLeastExponent, or 1 for integers.
template <class Element>
struct Grid;
template <>
struct Grid<int16_t> {
  static constexpr float kLargest = 32767.0f;
};
template <>
struct Grid<int8_t> {
  static constexpr float kLargest = 127.0f;
  static constexpr bool kIsInteger = true;
};
template <>
struct Grid<Float8> {
  static constexpr float kLargest = 448.0f;
  static constexpr bool kIsInteger = false;
  static constexpr uint32_t kMantissaBits = 3;
  static constexpr int kLeastExponent = -6;
};
template <>
struct Grid<Float16> {
  static constexpr float kLargest = 65504.0f;
  static constexpr bool kIsInteger = false;
  static constexpr uint32_t kMantissaBits = 10;
  static constexpr int kLeastExponent = -14;
};

// The exponent of the unit at a magnitude, with float32's bias.
template <class Element>
inline Bits unit_exponent(Vec magnitude) {
  if constexpr (Grid<Element>::kIsInteger) {
    return splat_bits(127);
  } else {
    Bits exponent = larger(bits_of(magnitude) >> 23, splat_bits(127 + Grid<Element>::kLeastExponent));
    return exponent - Grid<Element>::kMantissaBits;
  }
}

// Rounds |v| to the neighbour above where the way to it, in parts of 2^24, exceeds the upper 24 bits of the random
// word, and else to the one below; to that one also where there is no neighbour above. Infinities and NaNs stay.
template <class Element>
inline Vec round_randomly(Vec v, Bits words) {
  Vec largest = splat(Grid<Element>::kLargest);
  Vec magnitude = min(float_of(magnitude_of(v)), largest);
  Bits unit = unit_exponent<Element>(magnitude);
  // Scaling by a power of two is exact, and so is the difference.
  Vec scaled = mul(magnitude, float_of((254 - unit) << 23));
  Ints low = to_integer(scaled);
  Ints fraction = to_integer(mul(sub(scaled, to_float(low)), splat(0x1p24f)));
  Ints is_up = fraction > reinterpret_cast<Ints>(words >> 8);
  Vec rounded = min(mul(to_float(low - is_up), float_of(unit << 23)), largest);
  return float_of(choose(magnitude_of(v) < kInfinity, bits_of(rounded) | sign_of(v), bits_of(v)));
}

// The lower half of a float32 is the way to the next BFloat16, subnormal or not.
template <>
inline Vec round_randomly<BFloat16>(Vec v, Bits words) {
  Bits magnitude = magnitude_of(v);
  Bits low = magnitude & 0xffff0000u;
  Bits high = low + 0x10000u;
  Ints is_up = ((magnitude & 0xffffu) << 8) > (words >> 8);
  Bits rounded = choose(is_up & (high < kInfinity), high, low);
  return float_of(choose(magnitude < kInfinity, rounded | sign_of(v), bits_of(v)));
}

template <class Element>
constexpr bool kIsRoundable = false;
template <>
constexpr bool kIsRoundable<BFloat16> = true;
template <>
constexpr bool kIsRoundable<Float16> = true;
template <>
constexpr bool kIsRoundable<int8_t> = true;
template <>
constexpr bool kIsRoundable<Float8> = true;

// Stores a row of a float state. `words` is null to round to nearest.
template <class Element>
inline void write_float(Element* to, const float* from, int64_t count, const uint32_t* words) {
  if constexpr (kIsRoundable<Element>) {
    if (words) {
      for (int64_t i = 0; i < count; i += kLanes) {
        // On the grid already, so that the store's own rounding changes nothing.
        Vec v = round_randomly<Element>(canonical(load(from + i)), load_bits(words + i));
        i + kLanes <= count ? store(to + i, v) : store(to + i, v, count - i);
      }
      return;
    }
  }
  write_as(to, from, count);
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_ROUNDING_H_
