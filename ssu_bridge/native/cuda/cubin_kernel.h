// A compiled GPU kernel as a TVM-FFI function over DLTensors.
#ifndef SSU_BRIDGE_CUDA_CUBIN_KERNEL_H_
#define SSU_BRIDGE_CUDA_CUBIN_KERNEL_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/container/tuple.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

namespace ssu_bridge {

// A kernel that a call launches: cubin, name, bytes of shared memory, warps, grid, arguments, null pointers after them,
// and bytes of scratch memory for each block.
using CubinLaunch = tvm::ffi::Tuple<tvm::ffi::Bytes, tvm::ffi::String, int64_t, int64_t, tvm::ffi::Array<int64_t>,
                                    tvm::ffi::Array<tvm::ffi::Array<int64_t>>, int64_t, int64_t>;

// Returns fn(*tensors), of `tensors` DLTensors: the inputs, of which the first is the state, then the output, then the
// results that are computed in place: each has the memory of the input whose number `in_place` gives.
// It launches the kernels in order on the stream of TVM-FFI's environment. A grid is a row of Grid; `arguments` are
// rows of KernelArgument. With `overlapping` a kernel may start before the one ahead of it in the stream is done, and
// has to wait by itself. The cubins are loaded on each device when they are first called there; a call with no entries
// only loads them. If a kernel has scratch memory, the last tensor of all of them is the memory of all: the one that
// the caller gives after the others, else it is allocated.
tvm::ffi::Function make_cubin_kernel(tvm::ffi::Array<CubinLaunch> launches, int64_t tensors,
                                     tvm::ffi::Array<int64_t> in_place, bool overlapping);

// The values that a kernel is given for these tensors, the number of its blocks first.
tvm::ffi::Array<int64_t> cubin_arguments(tvm::ffi::Array<int64_t> grid,
                                         tvm::ffi::Array<tvm::ffi::Array<int64_t>> arguments,
                                         tvm::ffi::Array<tvm::ffi::Tensor> tensors);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CUDA_CUBIN_KERNEL_H_
