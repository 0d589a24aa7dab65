// The vector of the instruction set that a file is compiled for, and operations on its bits in the vector extensions of
// GCC and Clang: the same text for every Vec.
#ifndef SSU_BRIDGE_CPU_VECTOR_BITS_H_
#define SSU_BRIDGE_CPU_VECTOR_BITS_H_

#include <stdint.h>
#include <string.h>

#if defined(SSU_BRIDGE_CPU_SIMD_AVX512_H_) || defined(SSU_BRIDGE_CPU_SIMD_AVX2_H_)
#include <immintrin.h>
#endif

namespace ssu_bridge {
namespace {

// Floats in a vector, and rows of the state that are stepped at a time, as many as there are registers for.
#if defined(SSU_BRIDGE_CPU_SIMD_AVX512_H_)
using Vec = __m512;
constexpr int kRowGroup = 8;
#elif defined(SSU_BRIDGE_CPU_SIMD_AVX2_H_)
using Vec = __m256;
constexpr int kRowGroup = 4;
#else
typedef float Vec __attribute__((vector_size(16)));
constexpr int kRowGroup = 4;
#endif
constexpr int64_t kLanes = sizeof(Vec) / sizeof(float);

struct Pair {
  Vec even, odd;
};

// Comparisons give Ints of -1 where they hold and 0 elsewhere.
typedef int32_t Ints __attribute__((vector_size(sizeof(Vec))));
typedef uint32_t Bits __attribute__((vector_size(sizeof(Vec))));
typedef uint64_t Longs __attribute__((vector_size(sizeof(Vec))));

inline Bits bits_of(Vec a) { return reinterpret_cast<Bits>(a); }
inline Vec float_of(Bits a) { return reinterpret_cast<Vec>(a); }
inline Bits splat_bits(uint32_t value) { return Bits{} + value; }
inline Bits choose(Ints mask, Bits yes, Bits no) {
  return (reinterpret_cast<Bits>(mask) & yes) | (~reinterpret_cast<Bits>(mask) & no);
}
inline Bits larger(Bits a, Bits b) { return choose(a > b, a, b); }
inline Bits load_bits(const uint32_t* from) {
  Bits bits;
  memcpy(&bits, from, sizeof bits);
  return bits;
}

// The bits of |a|. In this order infinity is above every finite number, and every NaN above infinity.
inline Bits magnitude_of(Vec a) { return bits_of(a) & 0x7fffffffu; }
inline Bits sign_of(Vec a) { return bits_of(a) & 0x80000000u; }
constexpr uint32_t kInfinity = 0x7f800000u;

// Whole numbers of at most 24 bits; the fraction is cut off.
inline Ints to_integer(Vec a) { return __builtin_convertvector(a, Ints); }
inline Vec to_float(Ints a) { return __builtin_convertvector(a, Vec); }

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_VECTOR_BITS_H_
