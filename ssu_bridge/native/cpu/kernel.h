// The step as a TVM-FFI function over host tensors.
#ifndef SSU_BRIDGE_CPU_KERNEL_H_
#define SSU_BRIDGE_CPU_KERNEL_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include "cpu/tensor_reader.h"

namespace ssu_bridge {

// Returns fn(*inputs, *results). The inputs are those in `argument_names`, among kArgumentNames and with the required
// ones. `rows` has the row of the table of arguments of each of them and then of out. The results are `result_names`:
// "out", then those of the inputs that are written: state unless it is not to be updated, intermediate_states, and the
// scales of either; each has the very memory of the input of its name. `philox_rounds` counts when there is a
// rand_seed; 0 means 10. `isa` is "auto" or a name from runnable_variants().
tvm::ffi::Function make_cpu_kernel(tvm::ffi::Array<tvm::ffi::String> argument_names, tvm::ffi::Array<ArgumentRow> rows,
                                   tvm::ffi::Array<tvm::ffi::String> result_names, bool dt_softplus,
                                   int64_t pad_slot_id, int64_t philox_rounds, tvm::ffi::String isa,
                                   int64_t intermediate_stride);

// Returns a function of the same arguments that raises what the kernel raises for their metadata, and runs nothing: the
// tensors need no memory of their own.
tvm::ffi::Function make_cpu_check(tvm::ffi::Array<tvm::ffi::String> argument_names, tvm::ffi::Array<ArgumentRow> rows,
                                  tvm::ffi::Array<tvm::ffi::String> result_names, int64_t intermediate_stride);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_KERNEL_H_
