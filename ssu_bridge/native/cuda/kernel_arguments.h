// What a compiled kernel is given, read from the DLTensors of a call.
#ifndef SSU_BRIDGE_CUDA_KERNEL_ARGUMENTS_H_
#define SSU_BRIDGE_CUDA_KERNEL_ARGUMENTS_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>

#include <vector>

namespace ssu_bridge {

// An argument of the kernel: a tensor's address, or the stride (in elements) or the size of one of its axes.
// The kernel was compiled for multiples of `divisor`: bytes of an address, elements of a stride.
struct KernelArgument {
  enum Kind : int64_t { kAddress, kStride, kSize };

  Kind kind;
  int64_t tensor;
  int64_t axis;
  int64_t divisor;
};

constexpr int kMaxTensors = 24;
constexpr int kMaxKernelArguments = 64;

// From rows of (kind, tensor, axis, divisor). Raises ValueError for one that makes no sense with so many tensors.
std::vector<KernelArgument> parse_kernel_arguments(const tvm::ffi::Array<tvm::ffi::Array<int64_t>>& rows, int tensors);

// Writes the value of each argument. Raises ValueError for one that is not a multiple of its divisor, or of an axis
// that the tensor does not have.
void read_kernel_arguments(const std::vector<KernelArgument>& arguments, const DLTensor* const* tensors,
                           uint64_t* values);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CUDA_KERNEL_ARGUMENTS_H_
