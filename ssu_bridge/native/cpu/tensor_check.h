// Holds one tensor of a call against the rule for its argument.
#ifndef SSU_BRIDGE_CPU_TENSOR_CHECK_H_
#define SSU_BRIDGE_CPU_TENSOR_CHECK_H_

#include <tvm/ffi/container/tensor.h>

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "cpu/argument_rules.h"

namespace ssu_bridge {

// What the letters of the patterns stand for, as far as tensors have told.
class SymbolSizes {
 public:
  SymbolSizes() {
    std::fill(std::begin(sizes_), std::end(sizes_), kUnknown);
    set('1', 1);
    set('2', 2);
  }

  int64_t of(char symbol) const { return sizes_[symbol - kFirst]; }
  int64_t of(char symbol, int64_t otherwise) const { return of(symbol) == kUnknown ? otherwise : of(symbol); }
  void set(char symbol, int64_t size) { sizes_[symbol - kFirst] = size; }
  bool contradict(char symbol, int64_t size) const { return of(symbol, size) != size; }

 private:
  static constexpr int64_t kUnknown = -1;
  static constexpr char kFirst = '1', kLast = 'b';
  int64_t sizes_[kLast - kFirst + 1];
};

// A call, as far as its tensors have been checked.
struct CheckedCall {
  const CallTensors& tensors;
  const CallRules& rules;
  Layout layout;
  bool has_heads;
  SymbolSizes sizes;

  int64_t sequence_tokens() const { return sizes.of('T', 1); }
};

inline bool is_type(DLDataType type, int code, int bits) {
  return type.code == code && type.bits == bits && type.lanes == 1;
}
[[noreturn]] void refuse_type(const DLTensor& tensor, const char* name, const char* expected);

// Checks all but the types that the step knows; learns the sizes that the tensor fixes. Raises ValueError.
const Pattern& check(Argument argument, CheckedCall& call);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_TENSOR_CHECK_H_
