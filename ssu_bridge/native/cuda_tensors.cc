#include "cuda_tensors.h"

#include <tvm/ffi/error.h>

namespace ssu_bridge {

void check_on_one_device(const DLTensor* const* tensors, int count) {
  for (int i = 0; i < count; ++i) {
    DLDevice device = tensors[i]->device;
    if (device.device_type != kDLCUDA || device.device_id != tensors[0]->device.device_id)
      TVM_FFI_THROW(ValueError) << "argument " << i << ": expected memory of the CUDA device that the state is on";
  }
}

void check_in_place(const DLTensor* const* tensors, int input, int result) {
  const DLTensor &before = *tensors[input], &after = *tensors[result];
  if (before.data != after.data || before.byte_offset != after.byte_offset)
    TVM_FFI_THROW(ValueError) << "argument " << result << ": expected the memory of argument " << input
                              << ", which is updated in place";
}

}  // namespace ssu_bridge
