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

// How the state is cut, in elements: a step takes about as long for each of them whatever their type.
// An item, with its operands, stays in the first-level cache; a chunk is what a thread takes at a time, in about 6 us.
constexpr int64_t kItemElements = 8 << 10;
constexpr int64_t kChunkElements = 64 << 10;
// Waking a sleeping thread takes 5 to 50 us, in which the caller steps up to half a million elements. Idle workers do
// not spin: that was no faster where it was measured, and takes cores from XLA's own threads.
constexpr int64_t kElementsWorthWaking = 768 << 10;
constexpr int64_t kElementsPerThread = 128 << 10;
// A processor wakes its 512-bit units in about a microsecond, too long for what AVX2 does in two.
constexpr int64_t kElementsWorthWideVectors = 16 << 10;
// What an element costs that needs an exponential of its own.
constexpr int64_t kUntiedCost = 4;

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

int threads_for(const StepArguments& a) {
  int64_t elements = a.sequences * a.heads * a.rows * a.columns;
  if (a.A.column_stride != 0) elements *= kUntiedCost;
  if (elements < kElementsWorthWaking) return 1;
  return static_cast<int>(std::min<int64_t>(thread_count(), elements / kElementsPerThread));
}

void run_step(StepArguments& a, StepFunction step) {
  if (a.sequences == 0 || a.heads == 0 || a.rows == 0) return;
  int64_t columns = std::max<int64_t>(1, a.columns);
  int64_t rows = std::clamp<int64_t>(kItemElements / columns / 16 * 16, 16, kMaxRowsPerItem);
  a.rows_per_item = std::min(rows, a.rows);
  a.blocks_per_head = (a.rows + a.rows_per_item - 1) / a.rows_per_item;

  int64_t items = a.sequences * a.heads * a.blocks_per_head;
  int64_t item_elements = a.rows_per_item * columns;
  int threads = threads_for(a);
  int64_t items_per_chunk = threads == 1 ? items : std::max<int64_t>(1, kChunkElements / item_elements);
  StepWork work(a, step, items, items_per_chunk);
  run_chunks(work, (items + items_per_chunk - 1) / items_per_chunk, threads);
}

class CpuKernel {
 public:
  CpuKernel(std::vector<Argument> inputs, bool softplus, int64_t pad_slot, const VariantPair& steps)
      : inputs_(std::move(inputs)), softplus_(softplus), pad_slot_(pad_slot), steps_(steps) {}

  void operator()(ffi::PackedArgs arguments, ffi::Any*) const {
    int inputs = static_cast<int>(inputs_.size());
    if (arguments.size() != inputs + 2)
      TVM_FFI_THROW(ValueError) << "expected " << inputs << " inputs, out and new_state, got " << arguments.size()
                                << " arguments";
    CallTensors tensors;
    for (int i = 0; i < inputs; ++i) tensors.inputs[static_cast<int>(inputs_[i])] = arguments[i].cast<DLTensor*>();
    tensors.out = arguments[inputs].cast<DLTensor*>();
    tensors.new_state = arguments[inputs + 1].cast<DLTensor*>();

    StepArguments step_arguments;
    step_arguments.softplus = softplus_;
    step_arguments.pad_slot = pad_slot_;
    read_tensors(tensors, step_arguments);
    run_step(step_arguments, step_for(step_arguments));
  }

 private:
  // By the size of one sequence, not of the batch, so that a sequence's result does not depend on its company.
  StepFunction step_for(const StepArguments& a) const {
    return a.heads * a.rows * a.columns < kElementsWorthWideVectors ? steps_.small : steps_.large;
  }

  std::vector<Argument> inputs_;
  bool softplus_;
  int64_t pad_slot_;
  VariantPair steps_;
};

// The position of each name among kArgumentNames; they must ascend and hold the required ones.
std::vector<Argument> parse_names(const ffi::Array<ffi::String>& names) {
  std::vector<Argument> arguments;
  int next = 0;
  for (const ffi::String& name : names) {
    int found = next;
    while (found < kArguments && name != kArgumentNames[found]) ++found;
    if (found == kArguments)
      TVM_FFI_THROW(ValueError) << "argument_names: '" << std::string(name)
                                << "' is unknown, twice there or out of order";
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
  return ffi::Function::FromPacked(CpuKernel(parse_names(argument_names), dt_softplus, pad_slot_id, find_variants(isa)));
}

}  // namespace ssu_bridge
