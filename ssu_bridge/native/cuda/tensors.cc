#include "cuda/tensors.h"

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>

#include "cuda/driver.h"

namespace ssu_bridge {
namespace {

uint64_t address_of(const DLTensor& tensor) { return reinterpret_cast<uint64_t>(tensor.data) + tensor.byte_offset; }

}  // namespace

void check_on_one_device(const DLTensor* const* tensors, int count) {
  for (int i = 0; i < count; ++i) {
    DLDevice device = tensors[i]->device;
    if (device.device_type != kDLCUDA || device.device_id != tensors[0]->device.device_id)
      TVM_FFI_THROW(ValueError) << "argument " << i << ": expected memory of the CUDA device that the state is on";
  }
}

void check_in_place(const DLTensor* const* tensors, int input, int result) {
  if (address_of(*tensors[input]) != address_of(*tensors[result]))
    TVM_FFI_THROW(ValueError) << "argument " << result << ": expected the memory of argument " << input
                              << ", which is updated in place";
}

void move_to_result(const DLTensor*& input, const DLTensor* result) {
  const DLTensor &before = *input, &after = *result;
  input = result;
  if (address_of(before) == address_of(after)) return;
  size_t bytes = tvm::ffi::GetDataSize(after);
  const DLDevice device = after.device;
  if (device.device_type != kDLCUDA || before.device.device_type != kDLCUDA ||
      before.device.device_id != device.device_id || tvm::ffi::GetDataSize(before) != bytes ||
      !tvm::ffi::IsContiguous(before) || !tvm::ffi::IsContiguous(after))
    TVM_FFI_THROW(ValueError) << "a result is neither the memory of the input that is updated in place nor like it";
  const CudaDriver& driver = cuda_driver();
  CurrentContext current(driver.primary_context(device.device_id));
  void* stream = TVMFFIEnvGetStream(device.device_type, device.device_id);
  driver.check(driver.copy(address_of(after), address_of(before), bytes, stream), "cuMemcpyDtoDAsync");
}

}  // namespace ssu_bridge
