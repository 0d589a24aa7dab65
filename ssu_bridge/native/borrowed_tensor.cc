#include "borrowed_tensor.h"

#include <tvm/ffi/error.h>

namespace ssu_bridge {
namespace {

// What Tensor asks for memory: here it is there already, and stays when the tensor goes.
struct ForeignMemory {
  void* address;

  void AllocData(DLTensor* tensor) { tensor->data = address; }
  void FreeData(DLTensor*) {}
};

}  // namespace

tvm::ffi::Tensor foreign_tensor(int64_t address, tvm::ffi::Shape shape, tvm::ffi::Shape strides, DLDataType dtype) {
  if (shape.size() != strides.size())
    TVM_FFI_THROW(ValueError) << "view: " << shape.size() << " sizes and " << strides.size() << " strides";
  ForeignMemory memory{reinterpret_cast<void*>(static_cast<uintptr_t>(address))};
  return tvm::ffi::Tensor::FromNDAllocStrided(memory, shape, strides, dtype, DLDevice{kDLCPU, 0});
}

}  // namespace ssu_bridge
