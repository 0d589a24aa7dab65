// What every kernel on CUDA tensors asks of them.
#ifndef SSU_BRIDGE_CUDA_TENSORS_H_
#define SSU_BRIDGE_CUDA_TENSORS_H_

#include <dlpack/dlpack.h>

namespace ssu_bridge {

// Raises ValueError unless all tensors lie on one CUDA device. The first is a state.
void check_on_one_device(const DLTensor* const* tensors, int count);

// Raises ValueError unless the tensor at `result` has the memory of the one at `input`.
void check_in_place(const DLTensor* const* tensors, int input, int result);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CUDA_TENSORS_H_
