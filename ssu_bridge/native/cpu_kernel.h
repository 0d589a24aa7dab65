// The single-token step as a TVM-FFI function over host tensors.
#ifndef SSU_BRIDGE_CPU_KERNEL_H_
#define SSU_BRIDGE_CPU_KERNEL_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

namespace ssu_bridge {

// Returns fn(*inputs, out, new_state). The inputs are those in `argument_names`, a subsequence of kArgumentNames that
// has the required ones. `isa` is "auto" or a name from runnable_variants().
tvm::ffi::Function make_cpu_kernel(tvm::ffi::Array<tvm::ffi::String> argument_names, bool dt_softplus,
                                   int64_t pad_slot_id, tvm::ffi::String isa);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_KERNEL_H_
