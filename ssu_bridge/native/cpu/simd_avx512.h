// Sixteen floats at a time: AVX-512 F, BW, DQ and VL.
// To be included before simd.h. See simd_portable.h for what each function means.
#ifndef SSU_BRIDGE_CPU_SIMD_AVX512_H_
#define SSU_BRIDGE_CPU_SIMD_AVX512_H_

#include <immintrin.h>

#include "cpu/step_arguments.h"
#include "cpu/vector_bits.h"

namespace ssu_bridge {
namespace {

inline Vec splat(float value) { return _mm512_set1_ps(value); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// When either is a NaN these give the second operand.
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec negative_abs(Vec a) { return _mm512_or_ps(a, splat(-0.0f)); }
inline Vec round_to_integer(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec select_greater(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
}
inline Vec scale_by_power(Vec a, Vec exponent) { return _mm512_scalef_ps(a, exponent); }

inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

inline Vec widen(BFloat16, __m256i words) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
inline Vec widen(Float16, __m256i words) { return _mm512_cvtph_ps(words); }

// Not vcvtneps2bf16: that one takes subnormal numbers for zeros.
inline __m512i rounded_to_bf16(Vec value) {
  __m512i bits = _mm512_castps_si512(value);
  __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_sub_epi32(rounded, is_odd, rounded, _mm512_set1_epi32(-1));
}
inline __m256i narrow(BFloat16, Vec value) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_to_bf16(value), 16));
}
inline __m256i narrow(Float16, Vec value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }

inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline Vec load(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }
inline void store(float* to, Vec value) { _mm512_storeu_ps(to, value); }
inline void store(float* to, Vec value, int64_t count) { _mm512_mask_storeu_ps(to, first_lanes(count), value); }

template <class Half>
inline Vec load(const Half* from) {
  return widen(Half{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
template <class Half>
inline Vec load(const Half* from, int64_t count) {
  return widen(Half{}, _mm256_maskz_loadu_epi16(first_lanes(count), from));
}
template <class Half>
inline void store(Half* to, Vec value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(Half{}, value));
}
template <class Half>
inline void store(Half* to, Vec value, int64_t count) {
  _mm256_mask_storeu_epi16(to, first_lanes(count), narrow(Half{}, value));
}

inline Vec canonical(Vec a) {
  return _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), splat(__builtin_nanf("")));
}

inline __mmask32 first_words(int64_t count) { return static_cast<__mmask32>((uint64_t{1} << count) - 1); }
inline Pair pair_of(__m512i words) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-0x10000)))};
}
inline __m512i words_of(Pair pair) {
  __m512i even = _mm512_srli_epi32(rounded_to_bf16(pair.even), 16);
  return _mm512_mask_mov_epi16(even, 0xaaaaaaaau, rounded_to_bf16(pair.odd));
}
inline Pair load_pair(const BFloat16* from) { return pair_of(_mm512_loadu_si512(from)); }
inline Pair load_pair(const BFloat16* from, int64_t count) {
  return pair_of(_mm512_maskz_loadu_epi16(first_words(count), from));
}
inline void store_pair(BFloat16* to, Pair pair) { _mm512_storeu_si512(to, words_of(pair)); }
inline void store_pair(BFloat16* to, Pair pair, int64_t count) {
  _mm512_mask_storeu_epi16(to, first_words(count), words_of(pair));
}
inline Pair deinterleave(Vec low, Vec high) {
  __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
}

inline Ints load_integers(const int16_t* from) {
  return reinterpret_cast<Ints>(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
inline Ints load_integers(const int8_t* from) {
  return reinterpret_cast<Ints>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline Ints load_integers(const uint8_t* from) {
  return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline void store_integers(int16_t* to, Ints value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(value)));
}
inline void store_integers(uint8_t* to, Ints value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(value)));
}

inline Longs multiply_low_halves(Longs a, Longs b) {
  return reinterpret_cast<Longs>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}

inline Longs interleaved_even(Longs a, Longs b) {
  return reinterpret_cast<Longs>(_mm512_unpacklo_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
inline Longs interleaved_odd(Longs a, Longs b) {
  return reinterpret_cast<Longs>(_mm512_unpackhi_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}

inline Vec keep(Vec a, int64_t count) { return _mm512_maskz_mov_ps(first_lanes(count), a); }

inline __m256 halves_added(Vec a) { return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }

inline void store_sums(const Vec (&rows)[kRowGroup], float* sums) {
  __m256 pairs[4];
  for (int i = 0; i < 4; ++i) pairs[i] = _mm256_hadd_ps(halves_added(rows[2 * i]), halves_added(rows[2 * i + 1]));
  __m256 low = _mm256_hadd_ps(pairs[0], pairs[1]);
  __m256 high = _mm256_hadd_ps(pairs[2], pairs[3]);
  _mm256_storeu_ps(sums,
                   _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_SIMD_AVX512_H_
