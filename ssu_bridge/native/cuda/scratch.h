// Memory that a call's kernels hand on to each other.
#ifndef SSU_BRIDGE_CUDA_SCRATCH_H_
#define SSU_BRIDGE_CUDA_SCRATCH_H_

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/tensor.h>

namespace ssu_bridge {

// Memory for as many bytes on a device: from the allocator of the framework that calls, in the order of its stream; for
// a framework that TVM-FFI knows none of, from the driver's pool. Raises RuntimeError where there is too little.
tvm::ffi::Tensor allocate_scratch(int64_t bytes, DLDevice device);

// Raises ValueError unless a tensor that the caller allocated has as many bytes.
void check_scratch(const DLTensor& given, int64_t bytes);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CUDA_SCRATCH_H_
