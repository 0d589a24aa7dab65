// Tensors over memory that somebody else owns.
#ifndef SSU_BRIDGE_BORROWED_TENSOR_H_
#define SSU_BRIDGE_BORROWED_TENSOR_H_

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>

namespace ssu_bridge {

// A host tensor at `address`, for arrays that do not export themselves through DLPack. It does not keep the memory
// alive. Strides count elements and may be zero.
tvm::ffi::Tensor foreign_tensor(int64_t address, tvm::ffi::Shape shape, tvm::ffi::Shape strides, DLDataType dtype);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_BORROWED_TENSOR_H_
