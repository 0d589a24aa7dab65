#include "cuda/kernel_arguments.h"

#include <tvm/ffi/error.h>

#include <algorithm>

namespace ssu_bridge {
namespace {

uint64_t address_of(const DLTensor& tensor) { return reinterpret_cast<uint64_t>(tensor.data) + tensor.byte_offset; }

int64_t stride_of(const DLTensor& tensor, int64_t axis) {
  // Nothing is multiplied with the strides of an axis of one element and of an empty tensor, and they may be anything.
  if (tensor.shape[axis] <= 1 || std::count(tensor.shape, tensor.shape + tensor.ndim, 0) > 0) return 0;
  if (tensor.strides) return tensor.strides[axis];
  int64_t dense = 1;
  while (++axis < tensor.ndim) dense *= tensor.shape[axis];
  return dense;
}

uint64_t value_of(const KernelArgument& argument, const DLTensor& tensor) {
  if (argument.kind == KernelArgument::kAddress) return address_of(tensor);
  if (argument.axis >= tensor.ndim)
    TVM_FFI_THROW(ValueError) << "argument " << argument.tensor << ": expected more than " << argument.axis
                              << " axes, got " << tensor.ndim;
  int64_t axis = argument.axis;
  return static_cast<uint64_t>(argument.kind == KernelArgument::kStride ? stride_of(tensor, axis) : tensor.shape[axis]);
}

}  // namespace

std::vector<KernelArgument> parse_kernel_arguments(const tvm::ffi::Array<tvm::ffi::Array<int64_t>>& rows, int tensors) {
  if (rows.size() > kMaxKernelArguments)
    TVM_FFI_THROW(ValueError) << "arguments: at most " << kMaxKernelArguments << ", got " << rows.size();
  std::vector<KernelArgument> arguments;
  for (const tvm::ffi::Array<int64_t>& row : rows) {
    bool sane = row.size() == 4 && row[0] >= KernelArgument::kAddress && row[0] <= KernelArgument::kSize &&
                row[1] >= 0 && row[1] < tensors && row[2] >= 0 && row[3] >= 1;
    if (!sane)
      TVM_FFI_THROW(ValueError) << "arguments: row " << arguments.size() << " is no (kind, tensor, axis, divisor)";
    arguments.push_back({static_cast<KernelArgument::Kind>(row[0]), row[1], row[2], row[3]});
  }
  return arguments;
}

void read_kernel_arguments(const std::vector<KernelArgument>& arguments, const DLTensor* const* tensors,
                           uint64_t* values) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    const KernelArgument& argument = arguments[i];
    uint64_t value = value_of(argument, *tensors[argument.tensor]);
    if (value % static_cast<uint64_t>(argument.divisor) != 0)
      TVM_FFI_THROW(ValueError) << "argument " << argument.tensor << ": expected "
                                << (argument.kind == KernelArgument::kAddress ? "an address" : "a stride")
                                << " that is a multiple of " << argument.divisor << ", got " << value;
    values[i] = value;
  }
}

}  // namespace ssu_bridge
