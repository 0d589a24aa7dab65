#include "kernel_arguments.h"

#include <tvm/ffi/error.h>

namespace ssu_bridge {
namespace {

uint64_t address_of(const DLTensor& tensor) { return reinterpret_cast<uint64_t>(tensor.data) + tensor.byte_offset; }

int64_t size_of(const DLTensor& tensor) { return tensor.ndim > 0 ? tensor.shape[0] : 1; }

int64_t stride_of(const DLTensor& tensor) {
  // Nothing is multiplied with the stride of an axis of one element, and it may be anything.
  if (size_of(tensor) <= 1) return 0;
  if (tensor.strides) return tensor.strides[0];
  int64_t dense = 1;
  for (int axis = 1; axis < tensor.ndim; ++axis) dense *= tensor.shape[axis];
  return dense;
}

uint64_t value_of(KernelArgument::Kind kind, const DLTensor& tensor) {
  switch (kind) {
    case KernelArgument::kAddress:
      return address_of(tensor);
    case KernelArgument::kStride:
      return static_cast<uint64_t>(stride_of(tensor));
    default:
      return static_cast<uint64_t>(size_of(tensor));
  }
}

}  // namespace

std::vector<KernelArgument> parse_kernel_arguments(const tvm::ffi::Array<tvm::ffi::Array<int64_t>>& rows, int tensors) {
  if (rows.size() > kMaxKernelArguments)
    TVM_FFI_THROW(ValueError) << "arguments: at most " << kMaxKernelArguments << ", got " << rows.size();
  std::vector<KernelArgument> arguments;
  for (const tvm::ffi::Array<int64_t>& row : rows) {
    bool sane = row.size() == 3 && row[0] >= KernelArgument::kAddress && row[0] <= KernelArgument::kSize &&
                row[1] >= 0 && row[1] < tensors && row[2] >= 1;
    if (!sane) TVM_FFI_THROW(ValueError) << "arguments: row " << arguments.size() << " is no (kind, tensor, divisor)";
    arguments.push_back({static_cast<KernelArgument::Kind>(row[0]), row[1], row[2]});
  }
  return arguments;
}

void read_kernel_arguments(const std::vector<KernelArgument>& arguments, const DLTensor* const* tensors,
                           uint64_t* values) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    const KernelArgument& argument = arguments[i];
    uint64_t value = value_of(argument.kind, *tensors[argument.tensor]);
    if (value % static_cast<uint64_t>(argument.divisor) != 0)
      TVM_FFI_THROW(ValueError) << "argument " << argument.tensor << ": expected "
                                << (argument.kind == KernelArgument::kAddress ? "an address" : "a stride")
                                << " that is a multiple of " << argument.divisor << ", got " << value;
    values[i] = value;
  }
}

}  // namespace ssu_bridge
