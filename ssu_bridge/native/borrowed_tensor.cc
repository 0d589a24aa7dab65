#include "borrowed_tensor.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "extent.h"

namespace ssu_bridge {
namespace {

namespace ffi = tvm::ffi;

constexpr int kMaxTensors = 32;

// What Tensor asks for memory: here it is there already, and stays when the tensor goes.
struct BorrowedMemory {
  void* address;

  void AllocData(DLTensor* tensor) { tensor->data = address; }
  void FreeData(DLTensor*) {}
};

class AtAddresses {
 public:
  AtAddresses(ffi::Function function, ffi::Array<ffi::Tensor> tensors, const ffi::Array<int64_t>& in_place)
      : function_(std::move(function)), tensors_(std::move(tensors)), in_place_(in_place.begin(), in_place.end()) {
    for (const ffi::Tensor& tensor : tensors_) like_.push_back(*tensor.GetDLTensorPtr());
  }

  void operator()(ffi::PackedArgs given, ffi::Any* result) const {
    int count = static_cast<int>(like_.size());
    if (given.size() != count + 1)
      TVM_FFI_THROW(ValueError) << "expected whether to look for overlaps and " << count << " addresses, got "
                                << given.size() << " arguments";
    DLTensor tensors[kMaxTensors];
    ffi::AnyView arguments[2 * kMaxTensors];
    for (int i = 0; i < count; ++i) {
      tensors[i] = like_[i];
      tensors[i].data = reinterpret_cast<void*>(static_cast<uintptr_t>(given[i + 1].cast<int64_t>()));
      arguments[i] = &tensors[i];
    }
    bool runs = !(given[0].cast<bool>() && overlap(tensors, count));
    for (int64_t place : in_place_) arguments[count++] = &tensors[place];
    ffi::Any nothing;
    if (runs) function_.CallPacked(arguments, count, &nothing);
    *result = runs;
  }

 private:
  // Whether what is written, in place or at the end, lies among the bytes of another tensor.
  bool overlap(const DLTensor* tensors, int count) const {
    Extent extents[kMaxTensors];
    for (int i = 0; i < count; ++i) extents[i] = extent_of(tensors[i]);
    auto meets_another = [&](int64_t written) {
      for (int i = 0; i < count; ++i)
        if (i != written && extents[written].meets(extents[i])) return true;
      return false;
    };
    return meets_another(count - 1) || std::any_of(in_place_.begin(), in_place_.end(), meets_another);
  }

  const ffi::Function function_;
  const ffi::Array<ffi::Tensor> tensors_;  // which own the shapes and strides of those below
  const std::vector<int64_t> in_place_;
  std::vector<DLTensor> like_;
};

}  // namespace

tvm::ffi::Tensor borrowed_tensor(int64_t address, tvm::ffi::Shape shape, tvm::ffi::Shape strides, DLDataType dtype) {
  if (shape.size() != strides.size())
    TVM_FFI_THROW(ValueError) << "view: " << shape.size() << " sizes and " << strides.size() << " strides";
  BorrowedMemory memory{reinterpret_cast<void*>(static_cast<uintptr_t>(address))};
  return tvm::ffi::Tensor::FromNDAllocStrided(memory, shape, strides, dtype, DLDevice{kDLCPU, 0});
}

ffi::Function make_at_addresses(ffi::Function function, ffi::Array<ffi::Tensor> tensors, ffi::Array<int64_t> in_place) {
  int64_t count = static_cast<int64_t>(tensors.size());
  if (count < 1 || count > kMaxTensors || in_place.size() > kMaxTensors)
    TVM_FFI_THROW(ValueError) << "at_addresses: expected 1 to " << kMaxTensors << " tensors, got " << count;
  for (int64_t place : in_place)
    if (place < 0 || place >= count) TVM_FFI_THROW(ValueError) << "at_addresses: expected a tensor at place " << place;
  return ffi::Function::FromPacked(AtAddresses(std::move(function), std::move(tensors), in_place));
}

}  // namespace ssu_bridge
