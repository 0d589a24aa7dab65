#include "cpu_kernel.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "cpu_variants.h"
#include "float_environment.h"
#include "tensor_reader.h"
#include "thread_pool.h"

namespace ssu_bridge {
namespace {

namespace ffi = tvm::ffi;

// How the state is cut. An item is what stays in the first-level cache beside its operands; a chunk is what a thread
// takes at a time; below kBytesPerThread of state another thread costs more than it brings.
constexpr int64_t kItemBytes = 32 << 10;
constexpr int64_t kChunkBytes = 256 << 10;
constexpr int64_t kBytesPerThread = 256 << 10;

// Scratch that stays with the thread, so that a call allocates nothing once its thread has met the size.
void* thread_scratch(size_t bytes) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local size_t size = 0;
  constexpr size_t kAlignment = 64;
  if (size < bytes + kAlignment) {
    memory.reset(new char[bytes + kAlignment]);
    size = bytes + kAlignment;
  }
  uintptr_t address = reinterpret_cast<uintptr_t>(memory.get());
  return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

class StepWork final : public ChunkedWork {
 public:
  StepWork(const StepArguments& arguments, StepFunction step, int64_t items, int64_t items_per_chunk)
      : arguments_(arguments), step_(step), items_(items), items_per_chunk_(items_per_chunk) {}

  void run_chunk(int64_t chunk) noexcept override {
    FloatEnvironment ieee;
    int64_t first = chunk * items_per_chunk_;
    int64_t last = std::min(items_, first + items_per_chunk_);
    step_(arguments_, first, last, thread_scratch(scratch_bytes(arguments_.columns)));
  }

 private:
  const StepArguments& arguments_;
  const StepFunction step_;
  const int64_t items_;
  const int64_t items_per_chunk_;
};

void run_step(StepArguments& a, StepFunction step) {
  int64_t element_bytes = a.state_type == ElementType::kFloat32 ? 4 : 2;
  int64_t row_bytes = std::max<int64_t>(1, a.columns * element_bytes);
  int64_t rows = std::clamp<int64_t>(kItemBytes / row_bytes / 16 * 16, 16, kMaxRowsPerItem);
  a.rows_per_item = std::min(rows, a.rows);
  if (a.rows_per_item == 0) return;
  a.blocks_per_head = (a.rows + a.rows_per_item - 1) / a.rows_per_item;
  int64_t items = a.sequences * a.heads * a.blocks_per_head;
  if (items == 0) return;

  int64_t bytes = items * a.rows_per_item * row_bytes;
  int threads = static_cast<int>(std::min<int64_t>(thread_count(), std::max<int64_t>(1, bytes / kBytesPerThread)));
  int64_t items_per_chunk = threads == 1 ? items : std::max<int64_t>(1, kChunkBytes / (a.rows_per_item * row_bytes));
  StepWork work(a, step, items, items_per_chunk);
  run_chunks(work, (items + items_per_chunk - 1) / items_per_chunk, threads);
}

class CpuKernel {
 public:
  CpuKernel(std::vector<Argument> inputs, bool softplus, int64_t pad_slot, StepFunction step)
      : inputs_(std::move(inputs)), softplus_(softplus), pad_slot_(pad_slot), step_(step) {}

  void operator()(ffi::PackedArgs arguments, ffi::Any*) const {
    int inputs = static_cast<int>(inputs_.size());
    if (arguments.size() != inputs + 2)
      TVM_FFI_THROW(ValueError) << "expected " << inputs << " inputs, out and new_state, got " << arguments.size()
                                << " arguments";
    CallTensors tensors;
    for (int i = 0; i < inputs; ++i)
      tensors.inputs[static_cast<int>(inputs_[i])] = arguments[i].cast<DLTensor*>();
    tensors.out = arguments[inputs].cast<DLTensor*>();
    tensors.new_state = arguments[inputs + 1].cast<DLTensor*>();

    StepArguments step_arguments;
    step_arguments.softplus = softplus_;
    step_arguments.pad_slot = pad_slot_;
    read_tensors(tensors, step_arguments);
    run_step(step_arguments, step_);
  }

 private:
  std::vector<Argument> inputs_;
  bool softplus_;
  int64_t pad_slot_;
  StepFunction step_;
};

// The position of each name among kArgumentNames; they must ascend and hold the required ones.
std::vector<Argument> parse_names(const ffi::Array<ffi::String>& names) {
  std::vector<Argument> arguments;
  int next = 0;
  for (const ffi::String& name : names) {
    int found = next;
    while (found < kArguments && name != kArgumentNames[found]) ++found;
    if (found == kArguments)
      TVM_FFI_THROW(ValueError) << "argument_names: '" << std::string(name) << "' is unknown, twice there or out of order";
    arguments.push_back(static_cast<Argument>(found));
    next = found + 1;
  }
  for (int i = 0; i < kRequiredArguments; ++i)
    if (i >= static_cast<int>(arguments.size()) || static_cast<int>(arguments[i]) != i)
      TVM_FFI_THROW(ValueError) << "argument_names: '" << kArgumentNames[i] << "' is missing";
  return arguments;
}

}  // namespace

ffi::Function make_cpu_kernel(ffi::Array<ffi::String> argument_names, bool dt_softplus, int64_t pad_slot_id,
                              ffi::String isa) {
  thread_count();  // so that a wrong setting is reported here
  StepFunction step = find_variant(isa).step;
  return ffi::Function::FromPacked(CpuKernel(parse_names(argument_names), dt_softplus, pad_slot_id, step));
}

}  // namespace ssu_bridge
