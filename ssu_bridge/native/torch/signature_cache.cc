#include "torch/signature_cache.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>

#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "extent.h"

namespace ssu_bridge {
namespace {

namespace ffi = tvm::ffi;

constexpr int kMaxArguments = 32;
// Passes over the words of a tensor's signature; `take` says whether to go on. Kernels for other devices than the CPU
// tell addresses apart by whether they are multiples of `vector_bytes`.
template <typename Take>
bool describe_tensor(const DLTensor& tensor, uint64_t vector_bytes, Take take) {
  uint64_t address = reinterpret_cast<uint64_t>(tensor.data) + tensor.byte_offset;
  int64_t type = tensor.dtype.code | tensor.dtype.bits << 8 | tensor.dtype.lanes << 16;
  bool in_host_memory = tensor.device.device_type == kDLCPU;
  int64_t misalignment = in_host_memory ? 0 : static_cast<int64_t>(address & (vector_bytes - 1));
  bool more = take(tensor.ndim + 1) && take(type) && take(tensor.device.device_type) && take(tensor.device.device_id) &&
              take(misalignment) && take(tensor.strides != nullptr);
  for (int i = 0; more && i < tensor.ndim; ++i)
    more = take(tensor.shape[i]) && (!tensor.strides || take(tensor.strides[i]));
  return more;
}

template <typename Take>
bool describe(ffi::PackedArgs arguments, uint64_t vector_bytes, Take take) {
  for (int i = 0; i < arguments.size(); ++i) {
    bool more =
        arguments[i] == nullptr ? take(0) : describe_tensor(*arguments[i].cast<DLTensor*>(), vector_bytes, take);
    if (!more) return false;
  }
  return true;
}

// Passes over how far the other tensors among whose bytes the one at `written` lies are from it. With the shapes and
// strides that says which elements they share.
template <typename Take>
bool describe_overlaps(const Extent* extents, int64_t count, int64_t written, Take take) {
  const Extent& one = extents[written];
  for (int64_t i = 0; i < count; ++i) {
    const Extent& other = extents[i];
    if (i == written || !one.meets(other)) continue;
    if (!take(written * kMaxArguments + i) || !take(other.begin - one.begin)) return false;
  }
  return true;
}

// The same for the output and for those at the places in `written`.
template <typename Take>
bool describe_overlaps(ffi::PackedArgs arguments, const std::vector<int64_t>& written, Take take) {
  int64_t count = arguments.size();
  Extent extents[kMaxArguments];
  for (int i = 0; i < count; ++i)
    if (arguments[i] != nullptr) extents[i] = extent_of(*arguments[i].cast<DLTensor*>());
  for (int64_t place : written)
    if (place < count && !describe_overlaps(extents, count, place, take)) return false;
  return describe_overlaps(extents, count, 0, take);
}

// Without the overlaps: calls that differ in those alone are few.
uint64_t hash_of(ffi::PackedArgs arguments, uint64_t vector_bytes) {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a, a word at a time, with its high bits mixed in
  describe(arguments, vector_bytes, [&](int64_t word) {
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x100000001b3u;
    hash ^= hash >> 29;
    return true;
  });
  return hash;
}

class SignatureCache {
 public:
  SignatureCache(const ffi::Array<int64_t>& written, int64_t limit, int64_t vector_bytes)
      : written_(written.begin(), written.end()),
        limit_(static_cast<size_t>(limit)),
        vector_bytes_(static_cast<uint64_t>(vector_bytes)) {}

  bool run(ffi::PackedArgs arguments) {
    check_count(arguments);
    std::optional<ffi::Function> kernel = find(arguments);
    if (kernel) launch(*kernel, arguments);
    return kernel.has_value();
  }

  bool knows(ffi::PackedArgs arguments) {
    check_count(arguments);
    return find(arguments).has_value();
  }

  void add(ffi::Function kernel, ffi::PackedArgs arguments) {
    check_count(arguments);
    std::vector<int64_t> signature;
    auto append = [&](int64_t word) {
      signature.push_back(word);
      return true;
    };
    describe(arguments, vector_bytes_, append);
    describe_overlaps(arguments, written_, append);
    std::lock_guard<std::mutex> lock(mutex_);
    if (find_locked(arguments) != entries_.end()) return;  // another thread was faster
    if (entries_.size() >= limit_) entries_.clear();
    entries_.emplace(hash_of(arguments, vector_bytes_), Entry{std::move(signature), std::move(kernel)});
  }

 private:
  struct Entry {
    std::vector<int64_t> signature;
    ffi::Function kernel;
  };
  using Entries = std::unordered_multimap<uint64_t, Entry>;

  static void check_count(ffi::PackedArgs arguments) {
    if (arguments.size() < 1 || arguments.size() > kMaxArguments)
      TVM_FFI_THROW(ValueError) << "expected 1 to " << kMaxArguments << " arguments, got " << arguments.size();
  }

  std::optional<ffi::Function> find(ffi::PackedArgs arguments) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = find_locked(arguments);
    if (found == entries_.end()) return std::nullopt;
    return found->second.kernel;
  }

  Entries::iterator find_locked(ffi::PackedArgs arguments) {
    auto [first, last] = entries_.equal_range(hash_of(arguments, vector_bytes_));
    for (; first != last; ++first)
      if (matches(first->second.signature, arguments)) return first;
    return entries_.end();
  }

  bool matches(const std::vector<int64_t>& signature, ffi::PackedArgs arguments) const {
    const int64_t *next = signature.data(), *end = next + signature.size();
    auto is_next = [&](int64_t word) { return next != end && *next++ == word; };
    return describe(arguments, vector_bytes_, is_next) && describe_overlaps(arguments, written_, is_next) &&
           next == end;
  }

  void launch(const ffi::Function& kernel, ffi::PackedArgs arguments) {
    ffi::AnyView given[2 * kMaxArguments];
    int count = 0;
    for (int i = 1; i < arguments.size(); ++i)
      if (arguments[i] != nullptr) given[count++] = arguments[i];
    given[count++] = arguments[0];
    for (int64_t place : written_)
      if (place < arguments.size() && arguments[static_cast<int>(place)] != nullptr)
        given[count++] = arguments[static_cast<int>(place)];
    ffi::Any result;
    kernel.CallPacked(given, count, &result);
  }

  const std::vector<int64_t> written_;
  const size_t limit_;
  const uint64_t vector_bytes_;
  std::mutex mutex_;
  Entries entries_;
};

}  // namespace

ffi::Array<ffi::Function> make_signature_cache(ffi::Array<int64_t> written, int64_t limit, int64_t vector_bytes) {
  if (written.size() >= kMaxArguments)
    TVM_FFI_THROW(ValueError) << "expected fewer than " << kMaxArguments << " written arguments, got "
                              << written.size();
  for (int64_t place : written)
    if (place < 1) TVM_FFI_THROW(ValueError) << "expected places of arguments from 1 on, got " << place;
  if (limit < 1) TVM_FFI_THROW(ValueError) << "expected a limit of at least 1, got " << limit;
  if (vector_bytes < 1 || vector_bytes & (vector_bytes - 1))
    TVM_FFI_THROW(ValueError) << "expected vectors of a power of two bytes, got " << vector_bytes;
  auto cache = std::make_shared<SignatureCache>(written, limit, vector_bytes);
  auto run = ffi::Function::FromPacked(
      [cache](ffi::PackedArgs arguments, ffi::Any* result) { *result = cache->run(arguments); });
  auto add = ffi::Function::FromPacked([cache](ffi::PackedArgs arguments, ffi::Any*) {
    if (arguments.size() < 1) TVM_FFI_THROW(TypeError) << "expected a kernel and its arguments";
    cache->add(arguments[0].cast<ffi::Function>(), arguments.Slice(1));
  });
  auto knows = ffi::Function::FromPacked(
      [cache](ffi::PackedArgs arguments, ffi::Any* result) { *result = cache->knows(arguments); });
  return {run, add, knows};
}

}  // namespace ssu_bridge
