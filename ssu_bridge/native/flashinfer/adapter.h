// FlashInfer's functions as kernels of this project.
#ifndef SSU_BRIDGE_FLASHINFER_ADAPTER_H_
#define SSU_BRIDGE_FLASHINFER_ADAPTER_H_

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

namespace ssu_bridge {

// Returns fn(*tensors) of the DLTensors that `names` lists: the inputs, "out", then once more what is written in place.
// It calls each of `functions` with FlashInfer's arguments, `parameters` in their order: the same memory seen as
// FlashInfer expects it, with parameters tied to a head spread over headdim and dstate by strides of 0, the `scalars`
// by their names, and None for what is absent (for selective_state_update's D, which it insists on, a null pointer,
// which it takes for zeros). Nothing is copied; a call without sequences or tokens does nothing. `added_axis` says
// where x and what has its axes get one of one entry: 0 nowhere, 1 after the axis of sequences, 2 before it. The scalar
// "algorithm" is FlashInfer's number for one of its kernels, 0 for its own choice among those that the arrays'
// addresses allow; "cache_steps" gives way to the steps of the intermediate states.
tvm::ffi::Function make_flashinfer_kernel(tvm::ffi::Array<tvm::ffi::Function> functions,
                                          tvm::ffi::Array<tvm::ffi::String> parameters,
                                          tvm::ffi::Array<tvm::ffi::String> names,
                                          tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any> scalars, int64_t added_axis);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_FLASHINFER_ADAPTER_H_
