// The variants of the CPU step, and which of them this machine can run.
#ifndef SSU_BRIDGE_CPU_VARIANTS_H_
#define SSU_BRIDGE_CPU_VARIANTS_H_

#include <string>
#include <vector>

#include "cpu_step.h"

namespace ssu_bridge {

struct CpuVariant {
  const char* name;
  StepFunction step;
};

// Best first. Never empty: "portable" runs everywhere.
const std::vector<CpuVariant>& runnable_variants();

// The variant of that name, or the best one for "auto". Raises ValueError for a name this machine cannot run.
const CpuVariant& find_variant(const std::string& name);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_VARIANTS_H_
