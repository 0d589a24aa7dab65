// The step as a TVM-FFI function over host tensors.
#ifndef SSU_BRIDGE_CPU_KERNEL_H_
#define SSU_BRIDGE_CPU_KERNEL_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include "cpu/tensor_reader.h"

namespace ssu_bridge {

// Returns fn(*inputs, *results). `rows` has the row of the table of arguments of each input, the required ones among
// them, and then of out. The results are out, then those of the inputs that are written, each with the very memory of
// the input of its name; the state is one if `updates_state`. `philox_rounds` counts when there is a rand_seed; 0 means
// 10. A `replay_window` makes the state a checkpoint, with that many pending tokens at most and `replay_tokens` new
// ones; it is 0 without replay. `isa` is "auto" or a name from runnable_variants().
tvm::ffi::Function make_cpu_kernel(tvm::ffi::Array<ArgumentRow> rows, bool updates_state, bool dt_softplus,
                                   int64_t pad_slot_id, int64_t philox_rounds, int64_t intermediate_stride,
                                   bool rounds_each_token, int64_t replay_window, int64_t replay_tokens,
                                   tvm::ffi::String isa);

// Returns a function of the same arguments that raises what the kernel raises for their metadata, and runs nothing: the
// tensors need no memory of their own.
tvm::ffi::Function make_cpu_check(tvm::ffi::Array<ArgumentRow> rows, bool updates_state, int64_t intermediate_stride,
                                  int64_t replay_window, int64_t replay_tokens);

// A letter of the patterns, one of H, P, N and G, and the size that it stands for.
using SizeRow = tvm::ffi::Tuple<tvm::ffi::String, int64_t>;

// The same for a kernel that was compiled elsewhere, for any device: for tensors of the layout with this number (of
// Layout), with these sizes, and of so many tokens a sequence, at least and at most.
tvm::ffi::Function make_compiled_check(tvm::ffi::Array<ArgumentRow> rows, bool updates_state,
                                       int64_t intermediate_stride, int64_t layout, tvm::ffi::Array<SizeRow> sizes,
                                       tvm::ffi::Array<int64_t> tokens);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_KERNEL_H_
