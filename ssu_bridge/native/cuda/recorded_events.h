// One CUDA stream waits for the work of another, without the host.
#ifndef SSU_BRIDGE_CUDA_RECORDED_EVENTS_H_
#define SSU_BRIDGE_CUDA_RECORDED_EVENTS_H_

#include <stdint.h>
#include <tvm/ffi/function.h>

namespace ssu_bridge {

// Records what a stream of a device has been given so far. Raises ValueError for an ordinal that no device can have,
// RuntimeError if the driver fails.
void record_work(int64_t ordinal, int64_t stream);

// A kernel that changes nothing, over tensors of one device and as many results in the same memory: it lets the stream
// of TVM-FFI's environment wait for what has been recorded of any stream of that device.
tvm::ffi::Function make_waiting_kernel();

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CUDA_RECORDED_EVENTS_H_
