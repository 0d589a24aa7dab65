#include "cuda/recorded_events.h"

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <map>
#include <mutex>
#include <vector>

#include "cuda/driver.h"
#include "cuda/tensors.h"

namespace ssu_bridge {
namespace {

namespace ffi = tvm::ffi;

// The driver's number for CU_EVENT_DISABLE_TIMING.
constexpr unsigned kNoTiming = 2;

// What was recorded on one device: an event for each stream. A stream records again after all that it
// recorded before, so a later wait covers that, too.
class RecordedWork {
 public:
  void record(int ordinal, CudaStream stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    const CudaDriver& driver = cuda_driver();
    CurrentContext current(driver.primary_context(ordinal));
    auto found = events_.find(stream);
    if (found == events_.end()) {
      CudaEvent event;
      driver.check(driver.event_create(&event, kNoTiming), "cuEventCreate");
      found = events_.emplace(stream, event).first;
    }
    driver.check(driver.event_record(found->second, stream), "cuEventRecord");
  }

  void wait(int ordinal, CudaStream stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (events_.empty()) return;
    const CudaDriver& driver = cuda_driver();
    CurrentContext current(driver.primary_context(ordinal));
    for (const auto& recorded : events_)
      driver.check(driver.stream_wait_event(stream, recorded.second, 0), "cuStreamWaitEvent");
  }

 private:
  std::mutex mutex_;
  // Without a bound: a process keeps its streams, of which Torch makes 32 a device and priority.
  std::map<CudaStream, CudaEvent> events_;
};

RecordedWork& work_on(int64_t ordinal) {
  static RecordedWork devices[kMaxCudaDevices];
  check_ordinal(ordinal);
  return devices[ordinal];
}

void wait(ffi::PackedArgs tensors, ffi::Any*) {
  int count = tensors.size() / 2;
  if (count < 1 || tensors.size() != 2 * count)
    TVM_FFI_THROW(ValueError) << "expected as many results as tensors, got " << tensors.size() << " in all";
  std::vector<const DLTensor*> given;
  for (int i = 0; i < tensors.size(); ++i) given.push_back(tensors[i].cast<DLTensor*>());
  check_on_one_device(given.data(), tensors.size());
  // A copy would have been made before the wait.
  for (int i = 0; i < count; ++i) check_in_place(given.data(), i, count + i);
  const DLDevice device = given[0]->device;
  work_on(device.device_id).wait(device.device_id, TVMFFIEnvGetStream(device.device_type, device.device_id));
}

}  // namespace

void record_work(int64_t ordinal, int64_t stream) {
  work_on(ordinal).record(static_cast<int>(ordinal), reinterpret_cast<CudaStream>(stream));
}

ffi::Function make_waiting_kernel() { return ffi::Function::FromPacked(wait); }

}  // namespace ssu_bridge
