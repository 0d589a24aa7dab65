// One CUDA stream waits for the work of another, without the host.
#ifndef SSU_BRIDGE_RECORDED_WORK_H_
#define SSU_BRIDGE_RECORDED_WORK_H_

#include <stdint.h>
#include <tvm/ffi/function.h>

namespace ssu_bridge {

// Notes what a stream of a device has been given so far, and what was noted before. Raises RuntimeError.
void record_work(int64_t ordinal, int64_t stream);

// A kernel that changes nothing, over tensors of one device and as many results in the same memory: it lets the stream of
// TVM-FFI's environment wait for what has been noted on that device.
tvm::ffi::Function make_waiting_kernel();

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_RECORDED_WORK_H_
