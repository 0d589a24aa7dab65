#include "torch/repeat_guard.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

namespace ssu_bridge {
namespace {

namespace ffi = tvm::ffi;

constexpr int kMaxArguments = 32;
// Kernels for other devices tell addresses apart by whether they are multiples of this.
constexpr uint64_t kVectorBytes = 16;

// Passes over the words that describe a call's arguments; `take` says whether to go on.
template <typename Take>
bool describe_tensor(const DLTensor& tensor, Take take) {
  uint64_t address = reinterpret_cast<uint64_t>(tensor.data) + tensor.byte_offset;
  int64_t type = tensor.dtype.code | tensor.dtype.bits << 8 | tensor.dtype.lanes << 16;
  bool in_host_memory = tensor.device.device_type == kDLCPU;
  int64_t misalignment = in_host_memory ? 0 : static_cast<int64_t>(address % kVectorBytes);
  bool more = take(tensor.ndim + 1) && take(type) && take(tensor.device.device_type) && take(tensor.device.device_id) &&
              take(misalignment) && take(tensor.strides != nullptr);
  for (int i = 0; more && i < tensor.ndim; ++i)
    more = take(tensor.shape[i]) && (!tensor.strides || take(tensor.strides[i]));
  return more;
}

template <typename Take>
bool describe(ffi::PackedArgs arguments, Take take) {
  for (int i = 0; i < arguments.size(); ++i) {
    bool more = arguments[i] == nullptr ? take(0) : describe_tensor(*arguments[i].cast<DLTensor*>(), take);
    if (!more) return false;
  }
  return true;
}

class Guarded {
 public:
  Guarded(ffi::Function function, const ffi::Array<int64_t>& written)
      : function_(std::move(function)), written_(written.begin(), written.end()) {}

  bool call(ffi::PackedArgs arguments) {
    if (!matches(arguments)) return false;
    ffi::AnyView given[2 * kMaxArguments];
    int count = 0;
    for (int i = 0; i < arguments.size(); ++i)
      if (arguments[i] != nullptr) given[count++] = arguments[i];
    for (int64_t place : written_) given[count++] = arguments[static_cast<int>(place)];
    ffi::Any result;
    function_.CallPacked(given, count, &result);
    return true;
  }

 private:
  bool matches(ffi::PackedArgs arguments) {
    if (arguments.size() < 1 || arguments.size() > kMaxArguments)
      TVM_FFI_THROW(ValueError) << "expected 1 to " << kMaxArguments << " arguments, got " << arguments.size();
    for (int64_t place : written_)
      if (place >= arguments.size()) TVM_FFI_THROW(ValueError) << "expected an argument " << place;
    if (!noted_.load(std::memory_order_acquire)) note(arguments);
    const int64_t *next = words_.data(), *end = next + words_.size();
    bool alike = describe(arguments, [&](int64_t word) { return next != end && *next++ == word; });
    return alike && next == end;
  }

  void note(ffi::PackedArgs arguments) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (noted_.load(std::memory_order_relaxed)) return;
    describe(arguments, [&](int64_t word) {
      words_.push_back(word);
      return true;
    });
    noted_.store(true, std::memory_order_release);
  }

  const ffi::Function function_;
  const std::vector<int64_t> written_;
  std::mutex mutex_;
  std::atomic<bool> noted_{false};
  std::vector<int64_t> words_;
};

}  // namespace

ffi::Function make_guarded(ffi::Function function, ffi::Array<int64_t> written) {
  if (written.size() > kMaxArguments)
    TVM_FFI_THROW(ValueError) << "expected at most " << kMaxArguments << " written arguments, got " << written.size();
  for (int64_t place : written)
    if (place < 0) TVM_FFI_THROW(ValueError) << "expected places of arguments, got " << place;
  auto guarded = std::make_shared<Guarded>(std::move(function), written);
  return ffi::Function::FromPacked(
      [guarded](ffi::PackedArgs arguments, ffi::Any* result) { *result = guarded->call(arguments); });
}

}  // namespace ssu_bridge
