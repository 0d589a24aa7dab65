// A compiled GPU kernel as a TVM-FFI function over DLTensors.
#ifndef SSU_BRIDGE_CUDA_CUBIN_KERNEL_H_
#define SSU_BRIDGE_CUDA_CUBIN_KERNEL_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

namespace ssu_bridge {

// Returns fn(*tensors), of `tensors` DLTensors: the inputs, of which the first is the state, then the output, then the
// results that are computed in place: each has the memory of the input whose number `in_place` gives.
// `grid` is (programs, tensor, less): it launches `programs` blocks of `num_warps` warps for each entry of that
// tensor's first axis but `less` of them, on the stream of TVM-FFI's environment. `arguments` are rows of
// KernelArgument; `scratch_pointers` null pointers follow them. With `overlapping` the kernel may start before the one
// ahead of it in the stream is done, and has to wait by itself. The cubin is loaded on each device when it is first
// called there; a call with no entries only loads it.
tvm::ffi::Function make_cubin_kernel(tvm::ffi::Bytes cubin, tvm::ffi::String name, int64_t shared_bytes,
                                     int64_t num_warps, tvm::ffi::Array<int64_t> grid, int64_t tensors,
                                     tvm::ffi::Array<int64_t> in_place,
                                     tvm::ffi::Array<tvm::ffi::Array<int64_t>> arguments, int64_t scratch_pointers,
                                     bool overlapping);

// The values that such a kernel is given for these tensors, the number of its blocks first.
tvm::ffi::Array<int64_t> cubin_arguments(tvm::ffi::Array<int64_t> grid,
                                         tvm::ffi::Array<tvm::ffi::Array<int64_t>> arguments,
                                         tvm::ffi::Array<tvm::ffi::Tensor> tensors);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CUDA_CUBIN_KERNEL_H_
