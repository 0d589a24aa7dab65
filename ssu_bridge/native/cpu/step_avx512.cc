#include "cpu/step.h"

// The operations first: the step is written in them.
#include "cpu/simd_avx512.inc"

#include "cpu/step.inc"

namespace ssu_bridge {

void step_avx512(const StepArguments& arguments, int64_t first, int64_t last, void* scratch) {
  step(arguments, first, last, scratch);
}

}  // namespace ssu_bridge
