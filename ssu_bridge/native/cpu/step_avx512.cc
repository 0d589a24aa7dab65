// First, since it decides what the step is compiled for.
#include "cpu/simd_avx512.h"

#include "cpu/step.h"

namespace ssu_bridge {

void step_avx512(const StepArguments& arguments, int64_t first, int64_t last, void* scratch) {
  step(arguments, first, last, scratch);
}

}  // namespace ssu_bridge
