#include "cpu/step.h"

namespace ssu_bridge {

void step_portable(const StepArguments& arguments, int64_t first, int64_t last, void* scratch) {
  step(arguments, first, last, scratch);
}

}  // namespace ssu_bridge
