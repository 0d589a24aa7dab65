#include "cuda/cubin_module.h"

#include <tvm/ffi/error.h>

#include <memory>

namespace ssu_bridge {
namespace {

// The driver's numbers for CU_STREAM_CAPTURE_MODE_RELAXED and CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES.
constexpr int kRelaxedCapture = 2;
constexpr int kMaxDynamicSharedBytes = 8;
// More than this a kernel gets only if it asks.
constexpr unsigned kUnaskedSharedBytes = 48 << 10;

// While a stream is captured the driver lets a thread load nothing, unless the thread says that it knows what it does:
// loading is not ordered with any stream.
class RelaxedCapture {
 public:
  RelaxedCapture() { cuda_driver().exchange_capture_mode(&mode_); }
  ~RelaxedCapture() { cuda_driver().exchange_capture_mode(&mode_); }

 private:
  int mode_ = kRelaxedCapture;
};

}  // namespace

const LoadedKernel& CubinModule::on_device(int ordinal) {
  check_ordinal(ordinal);
  const LoadedKernel* found = loaded_[ordinal].load(std::memory_order_acquire);
  return found ? *found : *load(ordinal);
}

const LoadedKernel* CubinModule::load(int ordinal) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (const LoadedKernel* found = loaded_[ordinal].load(std::memory_order_relaxed)) return found;
  const CudaDriver& driver = cuda_driver();
  auto kernel = std::make_unique<LoadedKernel>();
  kernel->context = driver.primary_context(ordinal);
  CurrentContext current(kernel->context);
  RelaxedCapture relaxed;
  CudaModule module;
  driver.check(driver.module_load(&module, cubin_.data()), "cuModuleLoadData");
  driver.check(driver.module_get_function(&kernel->function, module, name_.c_str()), "cuModuleGetFunction");
  if (shared_bytes_ > kUnaskedSharedBytes) {
    int bytes = static_cast<int>(shared_bytes_);
    driver.check(driver.function_set_attribute(kernel->function, kMaxDynamicSharedBytes, bytes), "cuFuncSetAttribute");
  }
  const LoadedKernel* loaded = kernel.release();
  loaded_[ordinal].store(loaded, std::memory_order_release);
  return loaded;
}

}  // namespace ssu_bridge
