#include "cuda/cubin_kernel.h"

#include <tvm/ffi/extra/c_env_api.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cuda/cubin_module.h"
#include "cuda/grid.h"
#include "cuda/kernel_arguments.h"
#include "cuda/scratch.h"
#include "cuda/tensors.h"

namespace ssu_bridge {
namespace {

namespace ffi = tvm::ffi;

constexpr int kThreadsInWarp = 32;
constexpr int kState = 0;
constexpr int kFewestTensors = 2;

// A kernel of a call.
struct Launch {
  // Shared, because TVM-FFI copies what it is given.
  std::shared_ptr<CubinModule> module;
  unsigned shared_bytes;
  unsigned threads;
  Grid grid;
  std::vector<KernelArgument> arguments;
  int values;
  int64_t scratch;  // bytes for each block
};

class CubinKernel {
 public:
  CubinKernel(std::vector<Launch> launches, int tensors, std::vector<int> in_place, bool with_scratch, bool overlapping)
      : launches_(std::move(launches)),
        tensors_(tensors),
        in_place_(std::move(in_place)),
        with_scratch_(with_scratch),
        overlapping_(overlapping) {}

  void operator()(ffi::PackedArgs given, ffi::Any*) const {
    const DLTensor* tensors[kMaxTensors + 1];
    read_tensors(given, tensors);
    DLTensor none = {nullptr, tensors[kState]->device, 0, {kDLUInt, 8, 1}, nullptr, nullptr, 0};
    tensors[tensors_] = &none;
    std::optional<ffi::Tensor> allocated;  // until all is launched
    if (int64_t bytes = scratch_bytes(tensors)) {
      if (given.size() == tensors_) allocated = allocate_scratch(bytes, none.device);
      tensors[tensors_] = allocated ? allocated->GetDLTensorPtr() : given[tensors_].cast<DLTensor*>();
      check_scratch(*tensors[tensors_], bytes);
    }
    for (const Launch& one : launches_) launch(one, tensors);
  }

 private:
  void read_tensors(ffi::PackedArgs given, const DLTensor** tensors) const {
    bool with_scratch = with_scratch_ && given.size() == tensors_ + 1;
    if (given.size() != tensors_ && !with_scratch)
      TVM_FFI_THROW(ValueError) << "expected " << tensors_ << " tensors, got " << given.size();
    for (int i = 0; i < given.size(); ++i) tensors[i] = given[i].cast<DLTensor*>();
    check_on_one_device(tensors, given.size());
    int result = tensors_ - static_cast<int>(in_place_.size());
    for (int input : in_place_) move_to_result(tensors[input], tensors[result++]);
  }

  int64_t scratch_bytes(const DLTensor* const* tensors) const {
    int64_t bytes = 0;
    for (const Launch& one : launches_) bytes += one.scratch == 0 ? 0 : one.scratch * one.grid.blocks(tensors);
    return bytes;
  }

  void launch(const Launch& one, const DLTensor* const* tensors) const {
    uint64_t values[kMaxKernelArguments] = {};
    read_kernel_arguments(one.arguments, tensors, values);
    unsigned blocks = one.grid.blocks(tensors);
    DLDevice device = tensors[kState]->device;
    const LoadedKernel& kernel = one.module->on_device(device.device_id);
    if (blocks == 0) return;
    void* pointers[kMaxKernelArguments];
    for (int i = 0; i < one.values; ++i) pointers[i] = &values[i];
    void* stream = TVMFFIEnvGetStream(device.device_type, device.device_id);
    CurrentContext current(kernel.context);
    cuda_driver().launch_row(kernel.function, blocks, one.threads, one.shared_bytes, stream, pointers, overlapping_);
  }

  std::vector<Launch> launches_;
  int tensors_;
  std::vector<int> in_place_;
  bool with_scratch_;
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

Launch parse_launch(const CubinLaunch& launch, int64_t tensors, bool with_scratch) {
  int64_t warps = launch.get<3>(), scratch_pointers = launch.get<6>(), scratch = launch.get<7>();
  if (scratch < 0) TVM_FFI_THROW(ValueError) << "scratch: expected no negative number of bytes, got " << scratch;
  ffi::Array<ffi::Array<int64_t>> arguments = launch.get<5>();
  check_counts(warps, tensors, scratch_pointers, arguments.size());
  unsigned shared = static_cast<unsigned>(launch.get<2>());
  return {std::make_shared<CubinModule>(launch.get<0>(), launch.get<1>(), shared),
          shared,
          static_cast<unsigned>(warps * kThreadsInWarp),
          parse_grid(launch.get<4>(), tensors),
          parse_kernel_arguments(arguments, static_cast<int>(tensors) + with_scratch),
          static_cast<int>(arguments.size() + scratch_pointers),
          scratch};
}

}  // namespace

ffi::Function make_cubin_kernel(ffi::Array<CubinLaunch> launches, int64_t tensors, ffi::Array<int64_t> in_place,
                                bool overlapping) {
  if (launches.empty()) TVM_FFI_THROW(ValueError) << "expected a kernel";
  bool with_scratch = false;
  for (const CubinLaunch& launch : launches) with_scratch |= launch.get<7>() != 0;
  std::vector<Launch> parsed;
  for (const CubinLaunch& launch : launches) parsed.push_back(parse_launch(launch, tensors, with_scratch));
  int count = static_cast<int>(tensors);
  return ffi::Function::FromPacked(
      CubinKernel(std::move(parsed), count, parse_in_place(in_place, tensors), with_scratch, overlapping));
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
