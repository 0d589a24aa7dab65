// What each argument of a call must look like: rows of the table in core/arguments.py, and more for a compiled kernel.
#ifndef SSU_BRIDGE_CPU_ARGUMENT_RULES_H_
#define SSU_BRIDGE_CPU_ARGUMENT_RULES_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/container/tuple.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace ssu_bridge {

// What a call may pass, by their names in core/arguments.py; the first six and out are always there.
#define SSU_BRIDGE_ARGUMENTS(X)                         \
  X(kState, "state")                                    \
  X(kX, "x")                                            \
  X(kDt, "dt")                                          \
  X(kA, "A")                                            \
  X(kB, "B")                                            \
  X(kC, "C")                                            \
  X(kD, "D")                                            \
  X(kZ, "z")                                            \
  X(kDtBias, "dt_bias")                                 \
  X(kReadSlots, "state_batch_indices")                  \
  X(kWriteSlots, "dst_state_batch_indices")             \
  X(kAcceptedTokens, "num_accepted_tokens")             \
  X(kSequenceStarts, "cu_seqlens")                      \
  X(kIntermediates, "intermediate_states")              \
  X(kIntermediateEntries, "intermediate_state_indices") \
  X(kParents, "parent_tokens")                          \
  X(kHasInitialState, "has_initial_state")              \
  X(kScales, "state_scale")                             \
  X(kIntermediateScales, "intermediate_state_scales")   \
  X(kSeed, "rand_seed")                                 \
  X(kReplayX, "replay_x")                               \
  X(kReplayB, "replay_B")                               \
  X(kReplayDt, "replay_dt")                             \
  X(kReplayStart, "replay_start")                       \
  X(kReplayPending, "replay_pending")                   \
  X(kOut, "out")

#define SSU_BRIDGE_ENUMERATOR(enumerator, name) enumerator,
#define SSU_BRIDGE_NAME(enumerator, name) name,
enum class Argument { SSU_BRIDGE_ARGUMENTS(SSU_BRIDGE_ENUMERATOR) };
constexpr const char* kArgumentNames[] = {SSU_BRIDGE_ARGUMENTS(SSU_BRIDGE_NAME)};
constexpr const char* name_of(Argument argument) { return kArgumentNames[static_cast<int>(argument)]; }
constexpr int kArguments = sizeof(kArgumentNames) / sizeof(*kArgumentNames);
constexpr Argument kRequiredArguments[] = {Argument::kState, Argument::kX, Argument::kDt, Argument::kA,
                                           Argument::kB,     Argument::kC, Argument::kOut};
constexpr Argument kReplayArguments[] = {Argument::kReplayX, Argument::kReplayB, Argument::kReplayDt,
                                         Argument::kReplayStart, Argument::kReplayPending};
constexpr Argument kNotWithReplay[] = {
    Argument::kWriteSlots,          Argument::kAcceptedTokens, Argument::kIntermediates,  Argument::kIntermediateScales,
    Argument::kIntermediateEntries, Argument::kParents,        Argument::kHasInitialState};

// The tensors of a call; null where an optional one is absent.
struct CallTensors {
  const DLTensor* given[kArguments] = {};

  const DLTensor*& operator[](Argument argument) { return given[static_cast<int>(argument)]; }
  const DLTensor* operator[](Argument argument) const { return given[static_cast<int>(argument)]; }
};

// How sequences and tokens lie: (b, ...), (b, T, ...), or rows of packed sequences (L, ...).
enum class Layout { kSingle, kMulti, kPacked };
constexpr int kLayouts = 3;
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
  std::vector<Pattern> patterns[kLayouts][2];  // by layout, and by whether the state has an axis of heads
  int tied_axes = 0;                           // so many of the last may repeat one element, all together
  bool is_written = false;
  bool must_repeat = false;  // what has all axes is a tied view
  bool has_dtype = false;    // no other dtype than this one
  DLDataType dtype = {};
};

// A row of the table in core/arguments.py: name, shapes, free axes, how many axes a tied view repeats, whether the
// argument is written; then what a kernel was compiled for: whether it must be tied, and the dtype, "" for each that
// the step knows.
using ArgumentRow = tvm::ffi::Tuple<tvm::ffi::String, tvm::ffi::Array<tvm::ffi::String>, tvm::ffi::String, int64_t,
                                    bool, bool, tvm::ffi::String>;
Rule parse_rule(const ArgumentRow& row);

// What else a kernel was compiled for.
struct CompiledFor {
  bool is_on_host = true;                             // else on the device of the state, whatever that is
  int layout = -1;                                    // one of Layout, or -1 for each
  std::vector<std::pair<char, int64_t>> sizes;        // what letters of the patterns stand for
  int64_t least_tokens = 0, most_tokens = INT64_MAX;  // of a sequence, if they are not packed
};

struct CallRules {
  Rule rules[kArguments];
  CompiledFor compiled_for;

  Rule& operator[](Argument argument) { return rules[static_cast<int>(argument)]; }
  const Rule& operator[](Argument argument) const { return rules[static_cast<int>(argument)]; }
};

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_ARGUMENT_RULES_H_
