#include "cuda/cubin_kernel.h"

#include <tvm/ffi/extra/c_env_api.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cuda/cubin_module.h"
#include "cuda/kernel_arguments.h"
#include "cuda/tensors.h"

namespace ssu_bridge {
namespace {

namespace ffi = tvm::ffi;

constexpr int kThreadsInWarp = 32;
constexpr int kState = 0;
constexpr int kFewestTensors = 2;

// How many blocks a launch has: so many programs for each sequence, and a tensor that tells how many sequences.
struct Grid {
  int64_t programs;
  int64_t tensor;
  int64_t less;

  unsigned blocks(const DLTensor* const* tensors) const {
    const DLTensor& counted = *tensors[tensor];
    int64_t sequences = std::max<int64_t>(0, (counted.ndim > 0 ? counted.shape[0] : 0) - less);
    if (sequences > std::numeric_limits<int32_t>::max() / programs)
      TVM_FFI_THROW(ValueError) << sequences << " sequences of " << programs << " blocks are too many for one launch";
    return static_cast<unsigned>(sequences * programs);
  }
};

Grid parse_grid(const ffi::Array<int64_t>& row, int64_t tensors) {
  bool sane = row.size() == 3 && row[0] >= 1 && row[1] >= 0 && row[1] < tensors && row[2] >= 0;
  if (!sane) TVM_FFI_THROW(ValueError) << "grid: expected (programs, tensor, less), at least one program";
  return {row[0], row[1], row[2]};
}

class CubinKernel {
 public:
  CubinKernel(std::shared_ptr<CubinModule> module, unsigned shared_bytes, unsigned threads, Grid grid, int tensors,
              std::vector<int> in_place, std::vector<KernelArgument> arguments, int scratch_pointers, bool overlapping)
      : module_(std::move(module)),
        shared_bytes_(shared_bytes),
        threads_(threads),
        grid_(grid),
        tensors_(tensors),
        in_place_(std::move(in_place)),
        arguments_(std::move(arguments)),
        values_(static_cast<int>(arguments_.size()) + scratch_pointers),
        overlapping_(overlapping) {}

  void operator()(ffi::PackedArgs given, ffi::Any*) const {
    const DLTensor* tensors[kMaxTensors];
    read_tensors(given, tensors);
    uint64_t values[kMaxKernelArguments] = {};
    read_kernel_arguments(arguments_, tensors, values);
    unsigned blocks = grid_.blocks(tensors);
    const LoadedKernel& kernel = module_->on_device(tensors[kState]->device.device_id);
    if (blocks > 0) launch(kernel, blocks, values, tensors[kState]->device);
  }

 private:
  void read_tensors(ffi::PackedArgs given, const DLTensor** tensors) const {
    if (given.size() != tensors_)
      TVM_FFI_THROW(ValueError) << "expected " << tensors_ << " tensors, got " << given.size();
    for (int i = 0; i < tensors_; ++i) tensors[i] = given[i].cast<DLTensor*>();
    check_on_one_device(tensors, tensors_);
    int result = tensors_ - static_cast<int>(in_place_.size());
    for (int input : in_place_) move_to_result(tensors[input], tensors[result++]);
  }

  void launch(const LoadedKernel& kernel, unsigned blocks, uint64_t* values, DLDevice device) const {
    void* pointers[kMaxKernelArguments];
    for (int i = 0; i < values_; ++i) pointers[i] = &values[i];
    void* stream = TVMFFIEnvGetStream(device.device_type, device.device_id);
    CurrentContext current(kernel.context);
    cuda_driver().launch_row(kernel.function, blocks, threads_, shared_bytes_, stream, pointers, overlapping_);
  }

  // Shared, because TVM-FFI copies what it is given.
  std::shared_ptr<CubinModule> module_;
  unsigned shared_bytes_;
  unsigned threads_;
  Grid grid_;
  int tensors_;
  std::vector<int> in_place_;
  std::vector<KernelArgument> arguments_;
  int values_;
  bool overlapping_;
};

void check_counts(int64_t num_warps, int64_t tensors, int64_t scratch_pointers, size_t arguments) {
  if (num_warps < 1 || num_warps > 32) TVM_FFI_THROW(ValueError) << "expected 1 to 32 warps, got " << num_warps;
  if (tensors < kFewestTensors || tensors > kMaxTensors)
    TVM_FFI_THROW(ValueError) << "tensors: expected 2 to " << kMaxTensors << ", got " << tensors;
  if (scratch_pointers < 0 || static_cast<int64_t>(arguments) + scratch_pointers > kMaxKernelArguments)
    TVM_FFI_THROW(ValueError) << "arguments: at most " << kMaxKernelArguments << " with the scratch pointers";
}

std::vector<int> parse_in_place(const ffi::Array<int64_t>& inputs, int64_t tensors) {
  std::vector<int> in_place;
  int64_t count = tensors - 1 - static_cast<int64_t>(inputs.size());
  for (int64_t input : inputs) {
    if (input < 0 || input >= count)
      TVM_FFI_THROW(ValueError) << "in_place: expected inputs, below " << count << ", got " << input;
    in_place.push_back(static_cast<int>(input));
  }
  return in_place;
}

}  // namespace

ffi::Function make_cubin_kernel(ffi::Bytes cubin, ffi::String name, int64_t shared_bytes, int64_t num_warps,
                                ffi::Array<int64_t> grid, int64_t tensors, ffi::Array<int64_t> in_place,
                                ffi::Array<ffi::Array<int64_t>> arguments, int64_t scratch_pointers, bool overlapping) {
  check_counts(num_warps, tensors, scratch_pointers, arguments.size());
  unsigned shared = static_cast<unsigned>(shared_bytes);
  auto module = std::make_shared<CubinModule>(cubin, name, shared);
  return ffi::Function::FromPacked(CubinKernel(
      std::move(module), shared, static_cast<unsigned>(num_warps * kThreadsInWarp), parse_grid(grid, tensors),
      static_cast<int>(tensors), parse_in_place(in_place, tensors),
      parse_kernel_arguments(arguments, static_cast<int>(tensors)), static_cast<int>(scratch_pointers), overlapping));
}

ffi::Array<int64_t> cubin_arguments(ffi::Array<int64_t> grid, ffi::Array<ffi::Array<int64_t>> arguments,
                                    ffi::Array<ffi::Tensor> tensors) {
  check_counts(1, static_cast<int64_t>(tensors.size()), 0, arguments.size());
  const DLTensor* pointers[kMaxTensors];
  for (size_t i = 0; i < tensors.size(); ++i) pointers[i] = tensors[i].GetDLTensorPtr();
  std::vector<KernelArgument> parsed = parse_kernel_arguments(arguments, static_cast<int>(tensors.size()));
  std::vector<uint64_t> values(parsed.size());
  read_kernel_arguments(parsed, pointers, values.data());
  unsigned blocks = parse_grid(grid, static_cast<int64_t>(tensors.size())).blocks(pointers);
  ffi::Array<int64_t> result{static_cast<int64_t>(blocks)};
  for (uint64_t value : values) result.push_back(static_cast<int64_t>(value));
  return result;
}

}  // namespace ssu_bridge
