// A kernel that runs only on tensors like those it was first called with.
#ifndef SSU_BRIDGE_TORCH_REPEAT_GUARD_H_
#define SSU_BRIDGE_TORCH_REPEAT_GUARD_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>

namespace ssu_bridge {

// Returns fn(*arguments) -> bool, where arguments are DLTensors or None. The first call notes what they look like, calls
// `function` with those that are not None and then once more with those at the places in `written`, and returns true.
// Later calls do the same if theirs look alike (which are None, shapes, strides, dtypes, devices, the low bits of device
// addresses); else they return false and do nothing. This way whoever checked a first call thoroughly need not look at
// the next ones.
tvm::ffi::Function make_guarded(tvm::ffi::Function function, tvm::ffi::Array<int64_t> written);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_TORCH_REPEAT_GUARD_H_
