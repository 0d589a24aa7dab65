// The variants of the CPU step, and which of them this machine can run.
#ifndef SSU_BRIDGE_CPU_INSTRUCTION_SETS_H_
#define SSU_BRIDGE_CPU_INSTRUCTION_SETS_H_

#include <string>
#include <vector>

#include "cpu/step_arguments.h"

namespace ssu_bridge {

struct CpuVariant {
  const char* name;
  StepFunction step;
};

// Best first. Never empty: "portable" runs everywhere.
const std::vector<CpuVariant>& runnable_variants();

// The steps to take for sequences with a small and with a large state.
struct VariantPair {
  StepFunction small;
  StepFunction large;
};

// The variant of that name for both, or for "auto" the best one for each. Raises ValueError for a name that this
// machine cannot run.
VariantPair find_variants(const std::string& name);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_INSTRUCTION_SETS_H_
