// FlashInfer's selective_state_update as a kernel of this project.
#ifndef SSU_BRIDGE_FLASHINFER_ADAPTER_H_
#define SSU_BRIDGE_FLASHINFER_ADAPTER_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

namespace ssu_bridge {

// Returns fn(*tensors) of the DLTensors that `names` lists: the inputs, "out", then once more what is written in place.
// It calls `function` with FlashInfer's arguments, `parameters` in their order: the same memory seen as FlashInfer asks
// for it, with parameters tied to a head spread over headdim and dstate by strides of 0, and None for what is absent
// (for D, which it insists on, a null pointer, which it takes for zeros). Nothing is copied; a call without sequences
// or tokens does nothing. With `one_token_axis`, x (b, H, P) and what has its axes are passed as (b, 1, H, P), which is
// what calls FlashInfer's kernel for many tokens. `algorithm` is its number for one of its kernels, 0 for its own
// choice among those that the arrays' addresses allow. `longest` is how many tokens a packed sequence has at most.
tvm::ffi::Function make_flashinfer_kernel(tvm::ffi::Function function, tvm::ffi::Array<tvm::ffi::String> parameters,
                                          tvm::ffi::Array<tvm::ffi::String> names, bool one_token_axis,
                                          bool dt_softplus, int64_t pad_slot_id, bool disable_state_update,
                                          int64_t algorithm, int64_t longest);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_FLASHINFER_ADAPTER_H_
