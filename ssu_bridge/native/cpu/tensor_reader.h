// Reads one call's DLTensors into StepArguments, and refuses what the step cannot take.
#ifndef SSU_BRIDGE_CPU_TENSOR_READER_H_
#define SSU_BRIDGE_CPU_TENSOR_READER_H_

#include <tvm/ffi/container/tensor.h>

#include "cpu/step_arguments.h"

namespace ssu_bridge {

// In the order in which they are passed; the first six are always there.
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
  kScales,
  kIntermediateScales,
  kSeed,
};
constexpr int kArguments = 18;
constexpr int kRequiredArguments = 6;
extern const char* const kArgumentNames[kArguments];

// The tensors of a call; null where an optional one is absent.
struct CallTensors {
  const DLTensor* inputs[kArguments] = {};
  const DLTensor* out = nullptr;

  const DLTensor* operator[](Argument argument) const { return inputs[static_cast<int>(argument)]; }
};

// Fills in everything that the tensors tell. Raises ValueError for a device, type, shape or layout that is not taken.
void read_tensors(const CallTensors& tensors, StepArguments& arguments);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_TENSOR_READER_H_
