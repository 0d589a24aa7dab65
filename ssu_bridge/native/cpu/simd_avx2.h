// Eight floats at a time: AVX2 with FMA and F16C.
// To be included before simd.h. See simd_portable.h for what each function means.
#ifndef SSU_BRIDGE_CPU_SIMD_AVX2_H_
#define SSU_BRIDGE_CPU_SIMD_AVX2_H_

#include <immintrin.h>
#include <string.h>

#include "cpu/step_arguments.h"
#include "cpu/vector_bits.h"

namespace ssu_bridge {
namespace {

inline Vec splat(float value) { return _mm256_set1_ps(value); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// When either is a NaN these give the second operand.
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec negative_abs(Vec a) { return _mm256_or_ps(a, splat(-0.0f)); }
inline Vec round_to_integer(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec select_greater(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

inline Vec power_of_two(__m256i exponent) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
}

inline Vec scale_by_power(Vec a, Vec exponent) {
  __m256i whole = _mm256_cvtps_epi32(exponent);
  __m256i half = _mm256_srai_epi32(whole, 1);
  return mul(mul(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}

inline __m128i load_words(const uint16_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
inline __m128i load_words(const uint16_t* from, int64_t count) {
  alignas(16) uint16_t words[8] = {};
  memcpy(words, from, static_cast<size_t>(count) * 2);
  return load_words(words);
}
inline void store_words(uint16_t* to, __m128i words) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words); }
inline void store_words(uint16_t* to, __m128i value, int64_t count) {
  alignas(16) uint16_t words[8];
  store_words(words, value);
  memcpy(to, words, static_cast<size_t>(count) * 2);
}

inline Vec widen(BFloat16, __m128i words) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}
inline Vec widen(Float16, __m128i words) { return _mm256_cvtph_ps(words); }

inline __m256i rounded_to_bf16(Vec value) {
  __m256i bits = _mm256_castps_si256(value);
  __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), is_odd);
}
inline __m128i narrow(BFloat16, Vec value) {
  __m256i high = _mm256_srli_epi32(rounded_to_bf16(value), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i narrow(Float16, Vec value) { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }

inline __m256i first_lanes(int64_t count) {
  __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}

inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline Vec load(const float* from, int64_t count) { return _mm256_maskload_ps(from, first_lanes(count)); }
inline void store(float* to, Vec value) { _mm256_storeu_ps(to, value); }
inline void store(float* to, Vec value, int64_t count) { _mm256_maskstore_ps(to, first_lanes(count), value); }

template <class Half>
inline Vec load(const Half* from) {
  return widen(Half{}, load_words(&from->bits));
}
template <class Half>
inline Vec load(const Half* from, int64_t count) {
  return widen(Half{}, load_words(&from->bits, count));
}
template <class Half>
inline void store(Half* to, Vec value) {
  store_words(&to->bits, narrow(Half{}, value));
}
template <class Half>
inline void store(Half* to, Vec value, int64_t count) {
  store_words(&to->bits, narrow(Half{}, value), count);
}

inline Vec canonical(Vec a) {
  return _mm256_blendv_ps(a, splat(__builtin_nanf("")), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}

inline Pair pair_of(__m256i words) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-0x10000)))};
}
inline __m256i words_of(Pair pair) {
  __m256i even = _mm256_srli_epi32(rounded_to_bf16(pair.even), 16);
  return _mm256_blend_epi16(even, rounded_to_bf16(pair.odd), 0xaa);
}
inline Pair load_pair(const BFloat16* from) {
  return pair_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Pair load_pair(const BFloat16* from, int64_t count) {
  BFloat16 words[2 * kLanes] = {};
  memcpy(words, from, static_cast<size_t>(count) * sizeof(BFloat16));
  return load_pair(words);
}
inline void store_pair(BFloat16* to, Pair pair) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words_of(pair)); }
inline void store_pair(BFloat16* to, Pair pair, int64_t count) {
  BFloat16 words[2 * kLanes];
  store_pair(words, pair);
  memcpy(to, words, static_cast<size_t>(count) * sizeof(BFloat16));
}
inline Vec quarters_in_order(Vec a) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), _MM_SHUFFLE(3, 1, 2, 0)));
}
inline Pair deinterleave(Vec low, Vec high) {
  return {quarters_in_order(_mm256_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0))),
          quarters_in_order(_mm256_shuffle_ps(low, high, _MM_SHUFFLE(3, 1, 3, 1)))};
}

inline Ints load_integers(const int16_t* from) {
  return reinterpret_cast<Ints>(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline Ints load_integers(const int8_t* from) {
  return reinterpret_cast<Ints>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline Ints load_integers(const uint8_t* from) {
  return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
// The lower halves of the lanes.
inline __m128i low_words(Ints value) {
  __m256i words = _mm256_and_si256(reinterpret_cast<__m256i>(value), _mm256_set1_epi32(0xffff));
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
inline void store_integers(int16_t* to, Ints value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), low_words(value));
}
inline void store_integers(uint8_t* to, Ints value) {
  __m128i words = low_words(value & 0xff);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
}

inline Longs multiply_low_halves(Longs a, Longs b) {
  return reinterpret_cast<Longs>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}

inline Longs interleaved_even(Longs a, Longs b) {
  return reinterpret_cast<Longs>(_mm256_unpacklo_epi64(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
inline Longs interleaved_odd(Longs a, Longs b) {
  return reinterpret_cast<Longs>(_mm256_unpackhi_epi64(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}

inline Vec keep(Vec a, int64_t count) { return _mm256_and_ps(a, _mm256_castsi256_ps(first_lanes(count))); }

inline void store_sums(const Vec (&rows)[kRowGroup], float* sums) {
  Vec pairs = _mm256_hadd_ps(_mm256_hadd_ps(rows[0], rows[1]), _mm256_hadd_ps(rows[2], rows[3]));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_SIMD_AVX2_H_
