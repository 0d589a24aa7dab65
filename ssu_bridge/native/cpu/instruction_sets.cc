#include "cpu/instruction_sets.h"

#include <tvm/ffi/error.h>

#ifdef SSU_BRIDGE_X86
#include <cpuid.h>
#endif

namespace ssu_bridge {
namespace {

#ifdef SSU_BRIDGE_X86
// Registers whose contents the operating system saves: bits of XCR0.
constexpr unsigned kYmm = 0x6, kZmm = 0xe6;

struct Features {
  bool avx2 = false;
  bool avx512 = false;
};

// Asks the processor itself. In a library that zig links, __builtin_cpu_supports finds nothing.
Features features() {
  Features found;
  unsigned a, b, c, d, leaf_b, leaf_c;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return found;
  unsigned saved, high;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &leaf_b, &leaf_c, &d)) return found;
  constexpr unsigned kWide = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  found.avx2 = (saved & kYmm) == kYmm && (leaf_b & bit_AVX2) && (c & bit_FMA) && (c & bit_F16C);
  found.avx512 = found.avx2 && (saved & kZmm) == kZmm && (leaf_b & kWide) == kWide;
  return found;
}
#endif

std::vector<CpuVariant> detect() {
  std::vector<CpuVariant> variants;
#ifdef SSU_BRIDGE_X86
  if (features().avx512) variants.push_back({"avx512", step_avx512});
  if (features().avx2) variants.push_back({"avx2", step_avx2});
#endif
  variants.push_back({"portable", step_portable});
  return variants;
}

}  // namespace

const std::vector<CpuVariant>& runnable_variants() {
  static const std::vector<CpuVariant> variants = detect();
  return variants;
}

VariantPair find_variants(const std::string& name) {
  const std::vector<CpuVariant>& variants = runnable_variants();
  if (name == "auto") {
    bool wide = variants.front().name == std::string("avx512");
    return {variants[wide ? 1 : 0].step, variants.front().step};
  }
  std::string names = "auto";
  for (const CpuVariant& variant : variants) {
    if (name == variant.name) return {variant.step, variant.step};
    names += std::string(", ") + variant.name;
  }
  TVM_FFI_THROW(ValueError) << "isa must be one of " << names << " on this machine, got '" << name << "'";
  throw;  // unreachable; the line above has no way to say so
}

}  // namespace ssu_bridge
