// What every kernel on CUDA tensors requires of them.
#ifndef SSU_BRIDGE_CUDA_TENSORS_H_
#define SSU_BRIDGE_CUDA_TENSORS_H_

#include <dlpack/dlpack.h>

namespace ssu_bridge {

// Raises ValueError unless all tensors lie on one CUDA device. The first is a state.
void check_on_one_device(const DLTensor* const* tensors, int count);

// Raises ValueError unless the tensor at `result` has the memory of the one at `input`.
void check_in_place(const DLTensor* const* tensors, int input, int result);

// Makes `input`, which is to be updated in place, the tensor `result`. Where that has other memory, it first gets the
// elements, on the stream of the call: XLA forgets that the two are one where it writes a result straight into a slice
// of another array, and then the input must stay as it is. Raises ValueError for other memory that is not like the
// input's.
void move_to_result(const DLTensor*& input, const DLTensor* result);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CUDA_TENSORS_H_
