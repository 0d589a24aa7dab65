#include "cuda/scratch.h"

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>

#include "cuda/driver.h"

namespace ssu_bridge {
namespace {

namespace ffi = tvm::ffi;

constexpr DLDataType kByte = {kDLUInt, 8, 1};

// Allocates and frees in the order of the stream that is TVM-FFI's at the time of the call.
class FromDriver {
 public:
  void AllocData(DLTensor* tensor) {
    DLDevice device = tensor->device;
    CurrentContext current(cuda_driver().primary_context(device.device_id));
    stream_ = TVMFFIEnvGetStream(device.device_type, device.device_id);
    cuda_driver().check(cuda_driver().allocate(&address_, ffi::GetDataSize(*tensor), stream_), "cuMemAllocAsync");
    tensor->data = reinterpret_cast<void*>(address_);
  }

  void FreeData(DLTensor* tensor) {
    CurrentContext current(cuda_driver().primary_context(tensor->device.device_id));
    cuda_driver().free(address_, stream_);
  }

 private:
  uint64_t address_ = 0;
  CudaStream stream_ = nullptr;
};

}  // namespace

ffi::Tensor allocate_scratch(int64_t bytes, DLDevice device) {
  if (TVMFFIEnvGetDLPackManagedTensorAllocator())
    return ffi::Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, {bytes}, kByte, device);
  return ffi::Tensor::FromNDAlloc(FromDriver(), {bytes}, kByte, device);
}

void check_scratch(const DLTensor& given, int64_t bytes) {
  int64_t has = static_cast<int64_t>(ffi::GetDataSize(given));
  if (has < bytes) TVM_FFI_THROW(ValueError) << "scratch memory: expected at least " << bytes << " bytes, got " << has;
}

}  // namespace ssu_bridge
