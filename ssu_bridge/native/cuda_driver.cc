#include "cuda_driver.h"

#include <dlfcn.h>
#include <tvm/ffi/error.h>

namespace ssu_bridge {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

template <typename Function>
void find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (!function) TVM_FFI_THROW(RuntimeError) << kLibrary << " has no " << name << ": the NVIDIA driver is too old";
}

CudaDriver open_driver() {
  void* library = dlopen(kLibrary, RTLD_NOW);
  if (!library) TVM_FFI_THROW(RuntimeError) << "the NVIDIA driver's library cannot be opened: " << dlerror();
  CudaDriver driver;
  find(library, "cuInit", driver.init);
  find(library, "cuDeviceGet", driver.device_get);
  find(library, "cuDevicePrimaryCtxRetain", driver.primary_context_retain);
  find(library, "cuCtxGetCurrent", driver.context_get_current);
  find(library, "cuCtxPushCurrent_v2", driver.context_push);
  find(library, "cuCtxPopCurrent_v2", driver.context_pop);
  find(library, "cuThreadExchangeStreamCaptureMode", driver.exchange_capture_mode);
  find(library, "cuModuleLoadData", driver.module_load);
  find(library, "cuModuleGetFunction", driver.module_get_function);
  find(library, "cuFuncSetAttribute", driver.function_set_attribute);
  find(library, "cuLaunchKernel", driver.launch);
  find(library, "cuGetErrorName", driver.error_name);
  find(library, "cuGetErrorString", driver.error_text);
  driver.check(driver.init(0), "cuInit");
  return driver;
}

}  // namespace

void CudaDriver::check(int result, const char* what) const {
  if (result == 0) return;
  const char *name = nullptr, *text = nullptr;
  error_name(result, &name);
  error_text(result, &text);
  TVM_FFI_THROW(RuntimeError) << what << " failed: " << (name ? name : "unknown error") << " (" << result << "), "
                              << (text ? text : "no text");
}

const CudaDriver& cuda_driver() {
  static const CudaDriver driver = open_driver();
  return driver;
}

}  // namespace ssu_bridge
