// Tensors over memory that somebody else owns.
#ifndef SSU_BRIDGE_BORROWED_TENSOR_H_
#define SSU_BRIDGE_BORROWED_TENSOR_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

namespace ssu_bridge {

// A host tensor at `address`, for arrays that do not export themselves through DLPack. It does not keep the memory
// alive. Strides count elements and may be zero.
tvm::ffi::Tensor borrowed_tensor(int64_t address, tvm::ffi::Shape shape, tvm::ffi::Shape strides, DLDataType dtype);

// Returns fn(looks_for_overlaps, *addresses) -> bool, which calls `function` on host tensors like `tensors` at these
// addresses, one for each, followed by those at the places in `in_place` once more. These and the last tensor are
// written: if one of them may share memory with another tensor and the caller wants to know, fn calls nothing and
// returns false.
tvm::ffi::Function make_at_addresses(tvm::ffi::Function function, tvm::ffi::Array<tvm::ffi::Tensor> tensors,
                                     tvm::ffi::Array<int64_t> in_place);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_BORROWED_TENSOR_H_
