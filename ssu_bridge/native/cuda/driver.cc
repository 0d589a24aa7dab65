#include "cuda/driver.h"

#include <dlfcn.h>
#include <tvm/ffi/error.h>

#include <atomic>

namespace ssu_bridge {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";
// The driver's number for CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION.
constexpr int kProgrammaticStreamSerialization = 6;

template <typename Function>
void find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (!function) TVM_FFI_THROW(RuntimeError) << kLibrary << " has no " << name << ": the NVIDIA driver is too old";
}

using OverlappingLaunch = decltype(CudaDriver::launch_with);

// Since CUDA 12.3 such launches can be captured into graphs, too.
OverlappingLaunch find_overlapping_launch(void* library) {
  auto get_version = reinterpret_cast<int (*)(int*)>(dlsym(library, "cuDriverGetVersion"));
  int version = 0;
  if (!get_version || get_version(&version) != 0 || version < 12030) return nullptr;
  return reinterpret_cast<OverlappingLaunch>(dlsym(library, "cuLaunchKernelEx"));
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
  driver.launch_with = find_overlapping_launch(library);
  find(library, "cuMemAllocAsync", driver.allocate);
  find(library, "cuMemFreeAsync", driver.free);
  find(library, "cuMemcpyDtoDAsync_v2", driver.copy);
  find(library, "cuEventCreate", driver.event_create);
  find(library, "cuEventRecord", driver.event_record);
  find(library, "cuStreamWaitEvent", driver.stream_wait_event);
  find(library, "cuGetErrorName", driver.error_name);
  find(library, "cuGetErrorString", driver.error_text);
  driver.check(driver.init(0), "cuInit");
  return driver;
}

}  // namespace

void CudaDriver::launch_row(CudaFunction function, unsigned blocks, unsigned threads, unsigned shared_bytes,
                            CudaStream stream, void** arguments, bool overlapping) const {
  if (!overlapping || !launch_with) {
    check(launch(function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, arguments, nullptr), "cuLaunchKernel");
    return;
  }
  CudaLaunchAttribute attribute = {kProgrammaticStreamSerialization, 0, {1}};
  CudaLaunch config = {{blocks, 1, 1}, {threads, 1, 1}, shared_bytes, stream, &attribute, 1};
  check(launch_with(&config, function, arguments, nullptr), "cuLaunchKernelEx");
}

CudaContext CudaDriver::primary_context(int ordinal) const {
  static std::atomic<CudaContext> kept[kMaxCudaDevices];
  check_ordinal(ordinal);
  CudaContext context = kept[ordinal].load(std::memory_order_acquire);
  if (context) return context;
  int device;
  check(device_get(&device, ordinal), "cuDeviceGet");
  check(primary_context_retain(&context, device), "cuDevicePrimaryCtxRetain");
  kept[ordinal].store(context, std::memory_order_release);
  return context;
}

void CudaDriver::check(int result, const char* what) const {
  if (result == 0) return;
  const char *name = nullptr, *text = nullptr;
  error_name(result, &name);
  error_text(result, &text);
  TVM_FFI_THROW(RuntimeError) << what << " failed: " << (name ? name : "unknown error") << " (" << result << "), "
                              << (text ? text : "no text");
}

CurrentContext::CurrentContext(CudaContext context) {
  const CudaDriver& driver = cuda_driver();
  CudaContext current = nullptr;
  driver.check(driver.context_get_current(&current), "cuCtxGetCurrent");
  if (current == context) return;
  driver.check(driver.context_push(context), "cuCtxPushCurrent");
  pushed_ = true;
}

CurrentContext::~CurrentContext() {
  CudaContext popped;
  if (pushed_) cuda_driver().context_pop(&popped);
}

void check_ordinal(int64_t ordinal) {
  if (ordinal < 0 || ordinal >= kMaxCudaDevices)
    TVM_FFI_THROW(ValueError) << "expected a CUDA device below " << kMaxCudaDevices << ", got " << ordinal;
}

const CudaDriver& cuda_driver() {
  static const CudaDriver driver = open_driver();
  return driver;
}

}  // namespace ssu_bridge
