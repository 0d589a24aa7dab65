#include "borrowed_tensor.h"

#include <tvm/ffi/error.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace ssu_bridge {
namespace {

namespace ffi = tvm::ffi;

constexpr int kMaxTensors = 32;

// What Tensor asks for memory: here it is there already, and stays when the tensor goes.
struct ForeignMemory {
  void* address;

  void AllocData(DLTensor* tensor) { tensor->data = address; }
  void FreeData(DLTensor*) {}
};

class AtAddresses {
 public:
  AtAddresses(ffi::Function function, ffi::Array<ffi::Tensor> tensors, const ffi::Array<int64_t>& again)
      : function_(std::move(function)), tensors_(std::move(tensors)), again_(again.begin(), again.end()) {
    for (const ffi::Tensor& tensor : tensors_) like_.push_back(*tensor.GetDLTensorPtr());
  }

  void operator()(ffi::PackedArgs addresses, ffi::Any* result) const {
    int count = static_cast<int>(like_.size());
    if (addresses.size() != count)
      TVM_FFI_THROW(ValueError) << "expected " << count << " addresses, got " << addresses.size();
    DLTensor tensors[kMaxTensors];
    ffi::AnyView arguments[2 * kMaxTensors];
    for (int i = 0; i < count; ++i) {
      tensors[i] = like_[i];
      tensors[i].data = reinterpret_cast<void*>(static_cast<uintptr_t>(addresses[i].cast<int64_t>()));
      arguments[i] = &tensors[i];
    }
    for (int64_t place : again_) arguments[count++] = &tensors[place];
    function_.CallPacked(arguments, count, result);
  }

 private:
  const ffi::Function function_;
  const ffi::Array<ffi::Tensor> tensors_;  // which own the shapes and strides of those below
  const std::vector<int64_t> again_;
  std::vector<DLTensor> like_;
};

}  // namespace

tvm::ffi::Tensor foreign_tensor(int64_t address, tvm::ffi::Shape shape, tvm::ffi::Shape strides, DLDataType dtype) {
  if (shape.size() != strides.size())
    TVM_FFI_THROW(ValueError) << "view: " << shape.size() << " sizes and " << strides.size() << " strides";
  ForeignMemory memory{reinterpret_cast<void*>(static_cast<uintptr_t>(address))};
  return tvm::ffi::Tensor::FromNDAllocStrided(memory, shape, strides, dtype, DLDevice{kDLCPU, 0});
}

ffi::Function make_at_addresses(ffi::Function function, ffi::Array<ffi::Tensor> tensors, ffi::Array<int64_t> again) {
  int64_t count = static_cast<int64_t>(tensors.size());
  if (count > kMaxTensors || again.size() > kMaxTensors)
    TVM_FFI_THROW(ValueError) << "at_addresses: expected at most " << kMaxTensors << " tensors, got " << count;
  for (int64_t place : again)
    if (place < 0 || place >= count) TVM_FFI_THROW(ValueError) << "at_addresses: expected a tensor at place " << place;
  return ffi::Function::FromPacked(AtAddresses(std::move(function), std::move(tensors), again));
}

}  // namespace ssu_bridge
