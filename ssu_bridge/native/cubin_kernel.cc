#include "cubin_kernel.h"

#include <tvm/ffi/extra/c_env_api.h>

#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cubin_module.h"
#include "kernel_arguments.h"

namespace ssu_bridge {
namespace {

namespace ffi = tvm::ffi;

constexpr int kThreadsInWarp = 32;
constexpr int kState = 0;
constexpr int kX = 1;
constexpr int kFewestTensors = 2;

unsigned block_count(int64_t programs, const DLTensor& x) {
  int64_t sequences = x.ndim > 0 ? x.shape[0] : 0;
  if (sequences > std::numeric_limits<int32_t>::max() / programs)
    TVM_FFI_THROW(ValueError) << sequences << " sequences of " << programs << " blocks are too many for one launch";
  return static_cast<unsigned>(sequences * programs);
}

class CubinKernel {
 public:
  CubinKernel(std::shared_ptr<CubinModule> module, unsigned shared_bytes, unsigned threads, int64_t programs,
              int tensors, std::vector<KernelArgument> arguments, int scratch_pointers, bool overlapping)
      : module_(std::move(module)),
        shared_bytes_(shared_bytes),
        threads_(threads),
        programs_(programs),
        tensors_(tensors),
        arguments_(std::move(arguments)),
        values_(static_cast<int>(arguments_.size()) + scratch_pointers),
        overlapping_(overlapping) {}

  void operator()(ffi::PackedArgs given, ffi::Any*) const {
    const DLTensor* tensors[kMaxTensors];
    read_tensors(given, tensors);
    uint64_t values[kMaxKernelArguments] = {};
    read_kernel_arguments(arguments_, tensors, values);
    unsigned blocks = block_count(programs_, *tensors[kX]);
    const LoadedKernel& kernel = module_->on_device(tensors[kState]->device.device_id);
    if (blocks > 0) launch(kernel, blocks, values, tensors[kState]->device);
  }

 private:
  void read_tensors(ffi::PackedArgs given, const DLTensor** tensors) const {
    if (given.size() != tensors_)
      TVM_FFI_THROW(ValueError) << "expected " << tensors_ << " tensors, got " << given.size();
    for (int i = 0; i < tensors_; ++i) tensors[i] = given[i].cast<DLTensor*>();
    for (int i = 0; i < tensors_; ++i) {
      DLDevice device = tensors[i]->device;
      if (device.device_type != kDLCUDA || device.device_id != tensors[kState]->device.device_id)
        TVM_FFI_THROW(ValueError) << "argument " << i << ": expected memory of the CUDA device that the state is on";
    }
    const DLTensor &state = *tensors[kState], &new_state = *tensors[tensors_ - 1];
    if (state.data != new_state.data || state.byte_offset != new_state.byte_offset)
      TVM_FFI_THROW(ValueError) << "new_state must be the memory of state: the step works in place";
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
  int64_t programs_;
  int tensors_;
  std::vector<KernelArgument> arguments_;
  int values_;
  bool overlapping_;
};

void check_counts(int64_t num_warps, int64_t programs, int64_t tensors, int64_t scratch_pointers, size_t arguments) {
  if (num_warps < 1 || num_warps > 32 || programs < 1)
    TVM_FFI_THROW(ValueError) << "expected 1 to 32 warps and at least one program, got " << num_warps << " and "
                              << programs;
  if (tensors < kFewestTensors || tensors > kMaxTensors)
    TVM_FFI_THROW(ValueError) << "tensors: expected 2 to " << kMaxTensors << ", got " << tensors;
  if (scratch_pointers < 0 || static_cast<int64_t>(arguments) + scratch_pointers > kMaxKernelArguments)
    TVM_FFI_THROW(ValueError) << "arguments: at most " << kMaxKernelArguments << " with the scratch pointers";
}

}  // namespace

ffi::Function make_cubin_kernel(ffi::Bytes cubin, ffi::String name, int64_t shared_bytes, int64_t num_warps,
                                int64_t programs, int64_t tensors, ffi::Array<ffi::Array<int64_t>> arguments,
                                int64_t scratch_pointers, bool overlapping) {
  check_counts(num_warps, programs, tensors, scratch_pointers, arguments.size());
  unsigned shared = static_cast<unsigned>(shared_bytes);
  auto module = std::make_shared<CubinModule>(cubin, name, shared);
  return ffi::Function::FromPacked(CubinKernel(
      std::move(module), shared, static_cast<unsigned>(num_warps * kThreadsInWarp), programs, static_cast<int>(tensors),
      parse_kernel_arguments(arguments, static_cast<int>(tensors)), static_cast<int>(scratch_pointers), overlapping));
}

ffi::Array<int64_t> cubin_arguments(int64_t programs, ffi::Array<ffi::Array<int64_t>> arguments,
                                    ffi::Array<ffi::Tensor> tensors) {
  check_counts(1, programs, static_cast<int64_t>(tensors.size()), 0, arguments.size());
  const DLTensor* pointers[kMaxTensors];
  for (size_t i = 0; i < tensors.size(); ++i) pointers[i] = tensors[i].GetDLTensorPtr();
  std::vector<KernelArgument> parsed = parse_kernel_arguments(arguments, static_cast<int>(tensors.size()));
  std::vector<uint64_t> values(parsed.size());
  read_kernel_arguments(parsed, pointers, values.data());
  ffi::Array<int64_t> result{static_cast<int64_t>(block_count(programs, *pointers[kX]))};
  for (uint64_t value : values) result.push_back(static_cast<int64_t>(value));
  return result;
}

}  // namespace ssu_bridge
