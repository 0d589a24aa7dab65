// The step over a range of work items, for the instruction set that simd.h tells of.
#ifndef SSU_BRIDGE_CPU_STEP_H_
#define SSU_BRIDGE_CPU_STEP_H_

#include "cpu/direct.h"
#include "cpu/replay.h"
#include "cpu/step_arguments.h"
#include "cpu/tokens.h"

namespace ssu_bridge {
namespace {

void step(const StepArguments& a, int64_t first, int64_t last, void* scratch) {
  if (replays(a)) return step_with_replay(a, first, last, scratch);
  if (!a.is_direct) return step_through_tiles(a, first, last, scratch);
  switch (a.state.type) {
    case ElementType::kBFloat16:
      return step_directly<BFloat16>(a, first, last, scratch);
    case ElementType::kFloat16:
      return step_directly<Float16>(a, first, last, scratch);
    default:
      return step_directly<float>(a, first, last, scratch);
  }
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_STEP_H_
