#include "recorded_work.h"

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <mutex>

#include "cuda_driver.h"

namespace ssu_bridge {
namespace {

namespace ffi = tvm::ffi;

// The driver's number for CU_EVENT_DISABLE_TIMING.
constexpr unsigned kNoTiming = 2;

// The one event of a device. As it is recorded again and again, each record also waits for the one before: whoever waits
// late, when the event stands for another stream's work, waits for its own as well.
class Event {
 public:
  void record(int ordinal, CudaStream stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    const CudaDriver& driver = cuda_driver();
    if (!context_) context_ = driver.primary_context(ordinal);
    CurrentContext current(context_);
    if (!event_) driver.check(driver.event_create(&event_, kNoTiming), "cuEventCreate");
    driver.check(driver.stream_wait_event(stream, event_, 0), "cuStreamWaitEvent");
    driver.check(driver.event_record(event_, stream), "cuEventRecord");
  }

  void wait(CudaStream stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!event_) return;
    CurrentContext current(context_);
    cuda_driver().check(cuda_driver().stream_wait_event(stream, event_, 0), "cuStreamWaitEvent");
  }

 private:
  std::mutex mutex_;
  CudaContext context_ = nullptr;
  CudaEvent event_ = nullptr;
};

Event& event_of(int64_t ordinal) {
  static Event events[kMaxCudaDevices];
  check_ordinal(ordinal);
  return events[ordinal];
}

void wait(ffi::PackedArgs tensors, ffi::Any*) {
  int count = tensors.size() / 2;
  if (count < 1 || tensors.size() != 2 * count)
    TVM_FFI_THROW(ValueError) << "expected as many results as tensors, got " << tensors.size() << " in all";
  const DLDevice device = tensors[0].cast<DLTensor*>()->device;
  for (int i = 0; i < count; ++i) {
    const DLTensor &before = *tensors[i].cast<DLTensor*>(), &after = *tensors[count + i].cast<DLTensor*>();
    // A copy would have been made before the wait.
    if (before.data != after.data)
      TVM_FFI_THROW(ValueError) << "result " << i << ": expected the memory of argument " << i;
    if (before.device.device_type != kDLCUDA || before.device.device_id != device.device_id)
      TVM_FFI_THROW(ValueError) << "argument " << i << ": expected memory of the CUDA device that the first is on";
  }
  event_of(device.device_id).wait(TVMFFIEnvGetStream(device.device_type, device.device_id));
}

}  // namespace

void record_work(int64_t ordinal, int64_t stream) {
  event_of(ordinal).record(static_cast<int>(ordinal), reinterpret_cast<CudaStream>(stream));
}

ffi::Function make_waiting_kernel() { return ffi::Function::FromPacked(wait); }

}  // namespace ssu_bridge
