// Reads one call's DLTensors into StepArguments, and refuses what the step cannot take.
#ifndef SSU_BRIDGE_CPU_TENSOR_READER_H_
#define SSU_BRIDGE_CPU_TENSOR_READER_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/container/tuple.h>
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

// How sequences and tokens lie: (b, ...), (b, T, ...), or rows of packed sequences (L, ...).
enum class Form { kSingle, kMulti, kPacked };
constexpr int kForms = 3;
constexpr int kMaxAxes = 8;

// One shape that an argument may have.
struct Pattern {
  std::string axes;            // a letter for each, as in core/arguments.py
  int free_axes = 0;           // so many of the first may be strided
  bool is_full = false;        // it leaves out no axis
  bool has_one_group = false;  // by leaving out the axis of the groups
};

// What an argument must look like.
struct Rule {
  std::vector<Pattern> patterns[kForms][2];  // by form, and by whether the state has an axis of heads
  int tied_axes = 0;                         // so many of the last may repeat one element, all together
  bool is_written = false;
};

// A rule as core/arguments.py spells it: shapes, free axes, how many axes a tied view repeats, whether it is written.
using ArgumentRow = tvm::ffi::Tuple<tvm::ffi::Array<tvm::ffi::String>, tvm::ffi::String, int64_t, bool>;
Rule parse_rule(const ArgumentRow& row);

struct CallRules {
  Rule inputs[kArguments], out;
};

// Fills in everything that the tensors' metadata tell; it reads no element. Raises ValueError for what core/shapes.py
// and core/validate.py refuse too: a device, type, shape or layout.
void read_tensors(const CallTensors& tensors, const CallRules& rules, StepArguments& arguments);
// Reads the seed, if there is one, after the check.
void read_seed(const CallTensors& tensors, StepArguments& arguments);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_TENSOR_READER_H_
