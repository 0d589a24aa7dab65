#include "cpu/instruction_sets.h"

#include <tvm/ffi/error.h>

#ifdef SSU_BRIDGE_X86
#include <cpuid.h>
#endif

namespace ssu_bridge {
namespace {

#ifdef SSU_BRIDGE_X86
// Older compilers' __builtin_cpu_supports does not know this one.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

std::vector<CpuVariant> detect() {
  std::vector<CpuVariant> variants;
#ifdef SSU_BRIDGE_X86
  // These also ask whether the operating system saves the wider registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    variants.push_back({"avx512", step_avx512});
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
    variants.push_back({"avx2", step_avx2});
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
