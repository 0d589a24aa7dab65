// A compiled kernel, loaded on each device where it is needed.
#ifndef SSU_BRIDGE_CUDA_CUBIN_MODULE_H_
#define SSU_BRIDGE_CUDA_CUBIN_MODULE_H_

#include <array>
#include <atomic>
#include <mutex>
#include <string>

#include "cuda/driver.h"

namespace ssu_bridge {

// A kernel on one device. It stays loaded for the rest of the process, as XLA's targets do.
struct LoadedKernel {
  CudaContext context;
  CudaFunction function;
};

class CubinModule {
 public:
  CubinModule(std::string cubin, std::string name, unsigned shared_bytes)
      : cubin_(std::move(cubin)), name_(std::move(name)), shared_bytes_(shared_bytes) {}

  // Loads at the first call for a device, from any thread. Raises RuntimeError if that fails.
  const LoadedKernel& on_device(int ordinal);

 private:
  const LoadedKernel* load(int ordinal);

  const std::string cubin_;
  const std::string name_;
  const unsigned shared_bytes_;
  std::mutex mutex_;
  std::array<std::atomic<const LoadedKernel*>, kMaxCudaDevices> loaded_{};
};

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CUDA_CUBIN_MODULE_H_
