// Reads one call's DLTensors into StepArguments, and refuses what the step cannot take.
#ifndef SSU_BRIDGE_CPU_TENSOR_READER_H_
#define SSU_BRIDGE_CPU_TENSOR_READER_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/string.h>

#include <string>
#include <vector>

#include "cpu/step_arguments.h"

namespace ssu_bridge {

// What a call may pass besides out, in any order; the first six are always there.
enum class Argument {
  kState,
  kX,
  kDt,
  kA,
  kB,
  kC,
  kD,
  kZ,
  kDtBias,
  kReadSlots,
  kWriteSlots,
  kAcceptedTokens,
  kSequenceStarts,
  kIntermediates,
  kIntermediateEntries,
  kParents,
  kHasInitialState,
  kScales,
  kIntermediateScales,
  kSeed,
};
constexpr int kArguments = 20;
constexpr int kRequiredArguments = 6;
extern const char* const kArgumentNames[kArguments];

// The tensors of a call; null where an optional one is absent.
struct CallTensors {
  const DLTensor* inputs[kArguments] = {};
  const DLTensor* out = nullptr;

  const DLTensor* operator[](Argument argument) const { return inputs[static_cast<int>(argument)]; }
};

// The shapes that an operand may have, in the letters of the table of arguments in core/arguments.py: H heads, P rows,
// N columns, G groups, and a * for the axes of the tokens, which come first where there are any.
struct Layouts {
  bool has_tokens = false;
  // The axes besides those of the tokens, beside a state without a head axis and beside one with it.
  std::vector<std::string> axes[2];
};
Layouts parse_layouts(const tvm::ffi::Array<tvm::ffi::String>& shapes);

struct CallLayouts {
  Layouts inputs[kArguments], out;
};

// Fills in everything that the tensors tell. Raises ValueError for a device, type, shape or layout that is not taken.
void read_tensors(const CallTensors& tensors, const CallLayouts& layouts, StepArguments& arguments);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_TENSOR_READER_H_
