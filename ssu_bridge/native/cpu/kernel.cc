#include "cpu/kernel.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cpu/float_environment.h"
#include "cpu/instruction_sets.h"
#include "cpu/tables.h"
#include "cpu/tensor_reader.h"
#include "cpu/thread_pool.h"

namespace ssu_bridge {
namespace {

namespace ffi = tvm::ffi;

// How the state is cut, in elements: a step takes about as long for each of them whatever their type. An item, with its
// operands, stays in the first-level cache, also where it is there a second time in float32; a chunk is what a thread
// takes at a time, in about 6 us.
#ifdef SSU_BRIDGE_SMALL_CHUNKS  // for sanitizers: what only large calls do, small ones do too
constexpr int64_t kItemElements = 128, kTiledItemElements = 128, kChunkElements = 256;
constexpr int64_t kElementsWorthWaking = 0, kElementsPerThread = 128;
#else
constexpr int64_t kItemElements = 8 << 10;
constexpr int64_t kTiledItemElements = 4 << 10;
constexpr int64_t kChunkElements = 64 << 10;
// Waking a sleeping thread takes 5 to 50 us, in which the caller steps up to half a million elements. Idle workers do
// not spin: that was no faster where it was measured, and takes cores from XLA's own threads.
constexpr int64_t kElementsWorthWaking = 768 << 10;
constexpr int64_t kElementsPerThread = 128 << 10;
#endif
// A processor wakes its 512-bit units in about a microsecond, too long for what AVX2 does in two.
constexpr int64_t kElementsWorthWideVectors = 16 << 10;
// What an element costs that needs an exponential of its own, and what it costs more to round it to a row's scale or by
// a random word.
constexpr int64_t kUntiedCost = 4;
constexpr int64_t kRoundingCost = 4;
constexpr int kUsualRounds = 10;

// A piece of scratch for each of the threads of a call. The memory stays with the thread that calls, so that a call
// allocates nothing once its thread has met the size. The caller allocates, before anything is written: a worker
// has no way to report that there is no memory.
class ThreadScratch {
 public:
  ThreadScratch(const StepArguments& a, int threads) {
    thread_local std::unique_ptr<char[]> memory;
    thread_local size_t size = 0;
    bytes_each_ = (scratch_bytes(a) + kAlignment - 1) / kAlignment * kAlignment;
    size_t bytes = bytes_each_ * static_cast<size_t>(threads) + kAlignment;
    if (!is_countable(a)) refuse(a, threads);
    if (size < bytes) {
      size = 0;
      memory.reset();
      memory.reset(new (std::nothrow) char[bytes]);
      if (!memory) refuse(a, threads);
      size = bytes;
    }
    uintptr_t address = reinterpret_cast<uintptr_t>(memory.get());
    begin_ = reinterpret_cast<char*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

  void* of(int worker) const { return begin_ + bytes_each_ * static_cast<size_t>(worker); }

 private:
  static constexpr size_t kAlignment = 64;
  // Of more columns, or of more tokens to replay, the number of bytes would not fit into 64 bits.
  static constexpr int64_t kMostColumns = int64_t{1} << 36;
  static constexpr int64_t kMostReplayed = int64_t{1} << 24;

  static bool is_countable(const StepArguments& a) {
    int64_t rows = replays(a) ? most_replayed(a) : 1;
    return rows <= kMostReplayed && a.columns <= kMostColumns / rows;
  }

  [[noreturn]] static void refuse(const StepArguments& a, int threads) {
    std::string tokens = replays(a) ? ", and of " + std::to_string(most_replayed(a)) + " tokens to replay," : "";
    TVM_FFI_THROW(MemoryError) << "no memory for the scratch of a state with " << a.columns << " columns (dstate)"
                               << tokens << " on " << threads << " threads; nothing was written";
    std::abort();  // unreachable; the line above has no way to say so
  }

  char* begin_;
  size_t bytes_each_;
};

class StepWork final : public ChunkedWork {
 public:
  StepWork(const StepArguments& arguments, StepFunction step, const ThreadScratch& scratch, int64_t items,
           int64_t items_per_chunk)
      : arguments_(arguments), step_(step), scratch_(scratch), items_(items), items_per_chunk_(items_per_chunk) {}

  void run_chunk(int64_t chunk, int worker) noexcept override {
    FloatEnvironment ieee;
    int64_t first = chunk * items_per_chunk_;
    int64_t last = std::min(items_, first + items_per_chunk_);
    step_(arguments_, first, last, scratch_.of(worker));
  }

 private:
  const StepArguments& arguments_;
  const StepFunction step_;
  const ThreadScratch& scratch_;
  const int64_t items_;
  const int64_t items_per_chunk_;
};

// How many tokens there are, how many the longest sequence has, and how many are pending at most.
struct TokenCounts {
  int64_t all = 0, most = 0, most_pending = 0;
};

// A token for each that is pending and goes into a checkpoint, which is then stored.
int64_t flush_tokens(const StepArguments& a, const Phase& phase, int64_t count) {
  return flushes(a, phase, count) ? phase.pending + kRoundingCost : 0;
}

TokenCounts count_tokens(const StepArguments& a) {
  if (!a.sequence_starts.data && !replays(a)) return {a.sequences * a.tokens, a.tokens};
  TokenCounts counts;
  for (int64_t i = 0; i < a.sequences; ++i) {
    int64_t count = tokens_of(a, i).count;
    counts.all += count;
    counts.most = std::max(counts.most, count);
    if (!replays(a)) continue;
    Phase phase = phase_of(a, i);
    counts.all += flush_tokens(a, phase, count);
    counts.most_pending = std::max(counts.most_pending, phase.pending);
  }
  return counts;
}

int64_t cost_of_element(const StepArguments& a) {
  if (replays(a)) return 1;
  int64_t cost = a.A.column_stride != 0 ? kUntiedCost : 1;
  return a.random.is_used || is_quantised(a.state.type) ? cost + kRoundingCost : cost;
}

int threads_for(const StepArguments& a, int64_t tokens) {
  int64_t elements = tokens * a.heads * a.rows * a.columns * cost_of_element(a);
  if (elements < kElementsWorthWaking) return 1;
  return static_cast<int>(std::min<int64_t>(thread_count(), elements / kElementsPerThread));
}

void run_step(StepArguments& a, StepFunction step) {
  if (a.sequences == 0) return;
  TokenCounts tokens = count_tokens(a);
  if (tokens.all == 0) return;
  // What tables name may change meanwhile: none goes beyond the scratch that is for these.
  a.longest = tokens.most;
  a.replay.most_pending = tokens.most_pending;
  int64_t elements = a.is_direct || replays(a) ? kItemElements : kTiledItemElements;
  int64_t rows = std::clamp<int64_t>(elements / a.columns / 16 * 16, 16, kMaxRowsPerItem);
  a.rows_per_item = std::min(rows, a.rows);
  a.blocks_per_head = (a.rows + a.rows_per_item - 1) / a.rows_per_item;

  int64_t items = a.sequences * a.heads * a.blocks_per_head;
  int64_t item_elements = a.rows_per_item * a.columns * tokens.most;
  int threads = threads_for(a, tokens.all);
  int64_t items_per_chunk = threads == 1 ? items : std::max<int64_t>(1, kChunkElements / item_elements);
  ThreadScratch scratch(a, threads);
  StepWork work(a, step, scratch, items, items_per_chunk);
  run_chunks(work, (items + items_per_chunk - 1) / items_per_chunk, threads);
}

bool holds(const std::vector<Argument>& arguments, Argument argument) {
  return std::find(arguments.begin(), arguments.end(), argument) != arguments.end();
}

Argument parse_name(const std::string& name) {
  for (int i = 0; i < kArguments; ++i)
    if (name == kArgumentNames[i]) return static_cast<Argument>(i);
  TVM_FFI_THROW(ValueError) << "arguments: '" << name << "' is unknown";
  std::abort();  // unreachable; the line above has no way to say so
}

// Reads the arguments of a call, which are its inputs, out, and what of the inputs is written.
class CallReader {
 public:
  // The rows are those of the inputs, then that of out.
  CallReader(const ffi::Array<ArgumentRow>& rows, bool updates_state, CompiledFor compiled_for = {}) {
    rules_.compiled_for = std::move(compiled_for);
    for (const ArgumentRow& row : rows) {
      Argument argument = parse_name(row.get<0>());
      if (holds(given_, argument))
        TVM_FFI_THROW(ValueError) << "arguments: '" << name_of(argument) << "' is twice there";
      given_.push_back(argument);
      rules_[argument] = parse_rule(row);
      bool is_state = argument == Argument::kState || argument == Argument::kScales;
      bool is_in_place = argument != Argument::kOut && (updates_state || !is_state);
      if (rules_[argument].is_written && is_in_place) in_place_.push_back(argument);
    }
    for (Argument argument : kRequiredArguments)
      if (!holds(given_, argument)) TVM_FFI_THROW(ValueError) << "arguments: '" << name_of(argument) << "' is missing";
    if (given_.back() != Argument::kOut) TVM_FFI_THROW(ValueError) << "arguments: expected 'out' at the end";
  }

  // Makes it a reader for a kernel with a window of replay of so many tokens, and so many new ones at most.
  void set_replay(int64_t window, int64_t tokens) {
    if (window < 0 || window >= INT32_MAX || tokens < (window ? 1 : 0) || tokens > window)
      TVM_FFI_THROW(ValueError) << "expected a replay_window of at least 0 and no more replay_tokens, got " << window
                                << " and " << tokens;
    for (Argument argument : kReplayArguments)
      if (holds(given_, argument) != (window > 0))
        TVM_FFI_THROW(ValueError) << "arguments: '" << name_of(argument) << "' must be there with a replay_window, and "
                                  << "only then";
    if (window == 0) return;
    if (!holds(in_place_, Argument::kState))
      TVM_FFI_THROW(ValueError) << "arguments: the state must be a result with a replay_window";
    for (Argument argument : kNotWithReplay)
      if (holds(given_, argument))
        TVM_FFI_THROW(ValueError) << "arguments: '" << name_of(argument) << "' does not go with a replay_window";
    for (Argument argument : {Argument::kDt, Argument::kA, Argument::kDtBias}) rules_[argument].must_repeat = true;
    rules_.compiled_for.sizes.emplace_back('R', window + tokens);
    rules_.compiled_for.most_tokens = tokens;
  }

  CallTensors read(ffi::PackedArgs arguments, StepArguments& step_arguments) const {
    int given = static_cast<int>(given_.size());
    int in_place = static_cast<int>(in_place_.size());
    if (arguments.size() != given + in_place)
      TVM_FFI_THROW(ValueError) << "expected " << given - 1 << " inputs, out and " << in_place
                                << " written in place, got " << arguments.size() << " arguments";
    CallTensors tensors;
    for (int i = 0; i < given; ++i) tensors[given_[i]] = arguments[i].cast<DLTensor*>();
    for (int i = 0; i < in_place; ++i) check_in_place(tensors, in_place_[i], arguments[given + i].cast<DLTensor*>());
    read_tensors(tensors, rules_, step_arguments);
    return tensors;
  }

 private:
  static void check_in_place(const CallTensors& tensors, Argument argument, const DLTensor* result) {
    const DLTensor* input = tensors[argument];
    if (result->data != input->data || result->byte_offset != input->byte_offset)
      TVM_FFI_THROW(ValueError) << "the result " << name_of(argument)
                                << " must be the memory of the input of that name: the step works in place";
  }

  std::vector<Argument> given_, in_place_;
  CallRules rules_;
};

class CpuKernel {
 public:
  // `options` holds what is not read from the tensors of a call.
  CpuKernel(CallReader reader, const StepArguments& options, const VariantPair& steps)
      : reader_(std::move(reader)), options_(options), steps_(steps) {}

  void operator()(ffi::PackedArgs arguments, ffi::Any*) const {
    StepArguments step_arguments = options_;
    read_seed(reader_.read(arguments, step_arguments), step_arguments);
    run_step(step_arguments, step_for(step_arguments));
  }

 private:
  // By the size of one sequence, not of the batch, so that a sequence's result does not depend on its company.
  StepFunction step_for(const StepArguments& a) const {
    return a.heads * a.rows * a.columns < kElementsWorthWideVectors ? steps_.small : steps_.large;
  }

  CallReader reader_;
  StepArguments options_;
  VariantPair steps_;
};

StepArguments options_with(int64_t intermediate_stride, int64_t replay_window = 0) {
  if (intermediate_stride < 1)
    TVM_FFI_THROW(ValueError) << "intermediate_stride: expected at least 1, got " << intermediate_stride;
  StepArguments options;
  options.intermediate_stride = intermediate_stride;
  options.replay.window = options.replay.most_pending = replay_window;
  return options;
}

CallReader reader_with(const ffi::Array<ArgumentRow>& rows, bool updates_state, int64_t replay_window,
                       int64_t replay_tokens) {
  CallReader reader(rows, updates_state);
  reader.set_replay(replay_window, replay_tokens);
  return reader;
}

ffi::Function make_check(CallReader reader, const StepArguments& options) {
  return ffi::Function::FromPacked([reader = std::move(reader), options](ffi::PackedArgs arguments, ffi::Any*) {
    StepArguments step_arguments = options;
    reader.read(arguments, step_arguments);
  });
}

}  // namespace

ffi::Function make_cpu_kernel(ffi::Array<ArgumentRow> rows, bool updates_state, bool dt_softplus, int64_t pad_slot_id,
                              int64_t philox_rounds, int64_t intermediate_stride, bool rounds_each_token,
                              int64_t replay_window, int64_t replay_tokens, ffi::String isa) {
  thread_count();  // so that a wrong setting is reported here
  if (philox_rounds < 0 || philox_rounds > INT32_MAX)
    TVM_FFI_THROW(ValueError) << "philox_rounds: expected a number from 0 to 2**31 - 1, got " << philox_rounds;
  StepArguments options = options_with(intermediate_stride, replay_window);
  options.updates_state = updates_state;
  options.softplus = dt_softplus;
  options.pad_slot = pad_slot_id;
  options.rounds_each_token = rounds_each_token;
  options.random.rounds = philox_rounds == 0 ? kUsualRounds : static_cast<int>(philox_rounds);
  CallReader reader = reader_with(rows, updates_state, replay_window, replay_tokens);
  return ffi::Function::FromPacked(CpuKernel(std::move(reader), options, find_variants(isa)));
}

ffi::Function make_cpu_check(ffi::Array<ArgumentRow> rows, bool updates_state, int64_t intermediate_stride,
                             int64_t replay_window, int64_t replay_tokens) {
  CallReader reader = reader_with(rows, updates_state, replay_window, replay_tokens);
  return make_check(std::move(reader), options_with(intermediate_stride, replay_window));
}

ffi::Function make_compiled_check(ffi::Array<ArgumentRow> rows, bool updates_state, int64_t intermediate_stride,
                                  int64_t layout, ffi::Array<SizeRow> sizes, ffi::Array<int64_t> tokens) {
  if (layout < 0 || layout >= kLayouts || tokens.size() != 2)
    TVM_FFI_THROW(ValueError) << "expected a layout from 0 to 2, got " << layout << ", and two numbers of tokens";
  CompiledFor compiled_for;
  compiled_for.is_on_host = false;
  compiled_for.layout = static_cast<int>(layout);
  for (const SizeRow& row : sizes) {
    std::string symbol = row.get<0>();
    if (symbol.size() != 1 || !std::strchr("HPNGR", symbol[0]))
      TVM_FFI_THROW(ValueError) << "sizes: expected those of H, P, N, G or R, got '" << symbol << "'";
    compiled_for.sizes.emplace_back(symbol[0], row.get<1>());
  }
  compiled_for.least_tokens = tokens[0];
  compiled_for.most_tokens = tokens[1];
  return make_check(CallReader(rows, updates_state, std::move(compiled_for)), options_with(intermediate_stride));
}

}  // namespace ssu_bridge
