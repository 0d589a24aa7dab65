#include "cpu/tensor_check.h"

#include <tvm/ffi/dtype.h>
#include <tvm/ffi/error.h>

#include <cstdlib>
#include <utility>
#include <vector>

namespace ssu_bridge {

namespace {

void check_device(const DLTensor& tensor, const char* name, const CheckedCall& call) {
  DLDeviceType type = tensor.device.device_type;
  if (!call.rules.compiled_for.is_on_host) {
    DLDevice expected = call.tensors[Argument::kState]->device;
    if (type == expected.device_type && tensor.device.device_id == expected.device_id) return;
    TVM_FFI_THROW(ValueError) << name << " must be on the device of state, got DLPack device type "
                              << static_cast<int>(type) << ", number " << tensor.device.device_id;
  }
  if (type == kDLCPU || type == kDLCUDAHost || type == kDLROCMHost) return;
  TVM_FFI_THROW(ValueError) << name << " must be in host memory, got DLPack device type " << static_cast<int>(type);
}

bool is_empty(const DLTensor& tensor) { return std::count(tensor.shape, tensor.shape + tensor.ndim, 0) > 0; }

// The first axis that contradicts the sizes that are known, or the number of axes.
int first_wrong_axis(const DLTensor& tensor, const Pattern& pattern, const SymbolSizes& sizes) {
  int axis = 0;
  while (axis < tensor.ndim && !sizes.contradict(pattern.axes[axis], tensor.shape[axis])) ++axis;
  return axis;
}

// The shape that a tensor has of those that it may have; learns the sizes that it fixes.
const Pattern& match(const DLTensor& tensor, const char* name, const Rule& rule, CheckedCall& call) {
  const Pattern* wrong = nullptr;
  for (const Pattern& pattern : rule.patterns[static_cast<int>(call.layout)][call.has_heads]) {
    if (static_cast<int>(pattern.axes.size()) != tensor.ndim) continue;
    wrong = &pattern;
    if (first_wrong_axis(tensor, pattern, call.sizes) < tensor.ndim) continue;
    if (pattern.has_one_group && call.sizes.contradict('G', 1))
      TVM_FFI_THROW(ValueError) << name << " has no axis for the " << call.sizes.of('G') << " groups";
    for (int axis = 0; axis < tensor.ndim; ++axis) call.sizes.set(pattern.axes[axis], tensor.shape[axis]);
    if (pattern.has_one_group) call.sizes.set('G', 1);
    return pattern;
  }
  if (!wrong)
    TVM_FFI_THROW(ValueError) << name << " has " << tensor.ndim << " axes, which does not go with a state "
                              << (call.has_heads ? "of 4" : "of 3") << " and the axes of x";
  int axis = first_wrong_axis(tensor, *wrong, call.sizes);
  TVM_FFI_THROW(ValueError) << name << ": axis " << axis << " must have size " << call.sizes.of(wrong->axes[axis])
                            << ", got " << tensor.shape[axis];
  std::abort();  // unreachable; the line above has no way to say so
}

// How many of the last axes repeat one element: those of a tied view. The strides of an empty tensor say nothing.
int repeated_axes(const DLTensor& tensor, const Rule& rule, const Pattern& pattern, bool has_heads) {
  if (!has_heads || !pattern.is_full) return 0;
  for (int i = 1; i <= rule.tied_axes; ++i) {
    int axis = tensor.ndim - i;
    if (tensor.shape[axis] != 1 && (!tensor.strides || is_empty(tensor) || tensor.strides[axis] != 0)) return 0;
  }
  return rule.tied_axes;
}

void check_distinct(const DLTensor& tensor, const char* name, int free_axes, int64_t step) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // length of a step, number of entries
  for (int axis = 0; axis < free_axes; ++axis) axes.emplace_back(std::abs(tensor.strides[axis]), tensor.shape[axis]);
  std::sort(axes.begin(), axes.end());
  for (auto [length, entries] : axes) {
    if (entries > 1 && length < step)
      TVM_FFI_THROW(ValueError) << name << " must not overlap itself, because it is written";
    step = std::max(step, entries * length);
  }
}

// The axes that are not free lie densely, and no element of what is written lies where another does.
void check_strides(const DLTensor& tensor, const char* name, const Rule& rule, const Pattern& pattern, bool has_heads) {
  if (!tensor.strides || is_empty(tensor)) return;  // the strides of an empty tensor say nothing
  int dense = tensor.ndim - repeated_axes(tensor, rule, pattern, has_heads);
  int64_t step = 1;
  for (int axis = tensor.ndim - 1; axis >= pattern.free_axes; --axis) {
    if (tensor.shape[axis] > 1 && tensor.strides[axis] != (axis < dense ? step : 0))
      TVM_FFI_THROW(ValueError) << name << " must be contiguous from axis " << pattern.free_axes << " on";
    if (axis < dense) step *= tensor.shape[axis];
  }
  if (rule.is_written) check_distinct(tensor, name, pattern.free_axes, step);
}

void check_dtype(const DLTensor& tensor, const char* name, const Rule& rule) {
  if (rule.has_dtype && !is_type(tensor.dtype, rule.dtype.code, rule.dtype.bits))
    refuse_type(tensor, name, tvm::ffi::DLDataTypeToString(rule.dtype).c_str());
}

}  // namespace

void refuse_type(const DLTensor& tensor, const char* name, const char* expected) {
  TVM_FFI_THROW(ValueError) << name << " must be " << expected << ", got DLPack type code "
                            << static_cast<int>(tensor.dtype.code) << " with " << static_cast<int>(tensor.dtype.bits)
                            << " bits";
  std::abort();  // unreachable, as above
}

const Pattern& check(Argument argument, CheckedCall& call) {
  const DLTensor& tensor = *call.tensors[argument];
  const char* name = name_of(argument);
  const Rule& rule = call.rules[argument];
  check_device(tensor, name, call);
  check_dtype(tensor, name, rule);
  // A Torch tensor may have lost its storage, or never had one.
  if (tensor.data == nullptr && !is_empty(tensor)) TVM_FFI_THROW(ValueError) << name << " has no memory";
  const Pattern& pattern = match(tensor, name, rule, call);
  check_strides(tensor, name, rule, pattern, call.has_heads);
  bool repeats = repeated_axes(tensor, rule, pattern, call.has_heads) > 0 ||
                 (call.tensors[Argument::kReplayX] && is_empty(tensor));  // no step size differs from another
  if (rule.must_repeat && pattern.is_full && !repeats)
    TVM_FFI_THROW(ValueError) << name << " must be tied to the head: one number, or strides of 0, along its last axes";
  return pattern;
}

}  // namespace ssu_bridge
