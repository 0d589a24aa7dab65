#include "cpu/tensor_reader.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/tensor_check.h"

namespace ssu_bridge {

namespace {

void* data_of(const DLTensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

ElementType float_type(const DLTensor& tensor, const char* name) {
  if (is_type(tensor.dtype, kDLFloat, 32)) return ElementType::kFloat32;
  if (is_type(tensor.dtype, kDLBfloat, 16)) return ElementType::kBFloat16;
  if (is_type(tensor.dtype, kDLFloat, 16)) return ElementType::kFloat16;
  refuse_type(tensor, name, "float32, bfloat16 or float16");
}

ElementType state_type(const DLTensor& tensor, const char* name) {
  if (is_type(tensor.dtype, kDLInt, 16)) return ElementType::kInt16;
  if (is_type(tensor.dtype, kDLInt, 8)) return ElementType::kInt8;
  if (is_type(tensor.dtype, kDLFloat8_e4m3fn, 8)) return ElementType::kFloat8;
  return float_type(tensor, name);
}

// The stride of an axis of one element is arbitrary; zero lets it count as tied.
int64_t stride_of(const DLTensor& tensor, int axis, int64_t dense) {
  if (tensor.shape[axis] == 1) return 0;
  return tensor.strides ? tensor.strides[axis] : dense;
}

int64_t& stride_of(Operand& operand, char axis) {
  switch (axis) {
    case 'b':
    case 'S':
      return operand.batch_stride;
    case 'T':
    case 'L':
    case 'R':
      return operand.token_stride;
    case 'G':
    case 'H':
      return operand.head_stride;
    case 'P':
      return operand.row_stride;
    default:
      return operand.column_stride;
  }
}

Operand read_operand(Argument argument, CheckedCall& call) {
  Operand operand;
  const DLTensor* tensor = call.tensors[argument];
  if (!tensor) return operand;
  const Pattern& pattern = check(argument, call);
  operand.data = data_of(*tensor);
  operand.type = float_type(*tensor, name_of(argument));
  int64_t dense = 1;
  for (int axis = tensor->ndim - 1; axis >= 0; --axis) {
    stride_of(operand, pattern.axes[axis]) = stride_of(*tensor, axis, dense);
    dense *= tensor->shape[axis];
  }
  return operand;
}

// A table with a row for each sequence, and a column for each token where it has two axes.
IndexTable read_table(Argument argument, CheckedCall& call) {
  IndexTable table;
  const DLTensor* tensor = call.tensors[argument];
  if (!tensor) return table;
  const char* name = name_of(argument);
  check(argument, call);
  table.is_64_bit = is_type(tensor->dtype, kDLInt, 64);
  if (!table.is_64_bit && !is_type(tensor->dtype, kDLInt, 32)) refuse_type(*tensor, name, "int32 or int64");
  // A table without columns has no memory, and is not absent for that.
  static const int64_t nothing = 0;
  table.data = tensor->data ? data_of(*tensor) : &nothing;
  table.has_columns = tensor->ndim == 2;
  if (table.has_columns) {
    table.columns = tensor->shape[1];
    table.column_stride = stride_of(*tensor, 1, 1);
  }
  table.stride = stride_of(*tensor, 0, table.columns);
  return table;
}

// A table of slots, which has a column for each token at least, if it has any.
IndexTable read_slots(Argument argument, CheckedCall& call) {
  IndexTable table = read_table(argument, call);
  if (table.has_columns && table.columns < call.sequence_tokens())
    TVM_FFI_THROW(ValueError) << name_of(argument) << " must have a column for each of " << call.sequence_tokens()
                              << " tokens, got " << table.columns;
  return table;
}

// A number for each token: a row for each sequence, or for each row of packed ones.
IndexTable read_parents(CheckedCall& call) {
  IndexTable table = read_table(Argument::kParents, call);
  if (!table.data) return table;
  if (const DLTensor* slots = call.tensors[Argument::kWriteSlots]; slots && slots->ndim == 1)
    TVM_FFI_THROW(ValueError) << "dst_state_batch_indices must have a column for each token with parent_tokens";
  if (call.sequence_tokens() > kMaxTreeTokens)
    TVM_FFI_THROW(ValueError) << "a tree has at most " << kMaxTreeTokens << " tokens, got " << call.sequence_tokens();
  return table;
}

FlagTable read_flags(Argument argument, CheckedCall& call) {
  FlagTable table;
  const DLTensor* tensor = call.tensors[argument];
  if (!tensor) return table;
  check(argument, call);
  if (!is_type(tensor->dtype, kDLBool, 8) && !is_type(tensor->dtype, kDLUInt, 8))
    refuse_type(*tensor, name_of(argument), "bool or uint8");
  table.data = static_cast<const uint8_t*>(data_of(*tensor));
  table.stride = stride_of(*tensor, 0, 1);
  return table;
}

// The distance between two of what the first axis counts, where the others lie densely.
int64_t dense_stride(const DLTensor& tensor) {
  int64_t dense = 1;
  for (int axis = 1; axis < tensor.ndim; ++axis) dense *= tensor.shape[axis];
  return tensor.strides && tensor.shape[0] > 1 ? tensor.strides[0] : dense;
}

// `scales` names what holds one number for each row of `values`, and is absent where the values are floats.
StateStorage read_storage(Argument values, Argument scales, CheckedCall& call) {
  const DLTensor& tensor = *call.tensors[values];
  check(values, call);
  StateStorage storage;
  storage.data = data_of(tensor);
  storage.type = state_type(tensor, name_of(values));
  storage.entries = tensor.shape[0];
  storage.stride = dense_stride(tensor);
  const DLTensor* rows = call.tensors[scales];
  if (is_quantised(storage.type) != (rows != nullptr))
    TVM_FFI_THROW(ValueError) << name_of(scales) << " must be there for a quantised " << name_of(values)
                              << ", and only then";
  if (rows) {
    check(scales, call);
    if (!is_type(rows->dtype, kDLFloat, 32)) refuse_type(*rows, name_of(scales), "float32");
    storage.scales = static_cast<float*>(data_of(*rows));
    storage.scale_stride = dense_stride(*rows);
  }
  return storage;
}

void check_size(char symbol, const char* what, const CheckedCall& call) {
  if (call.sizes.of(symbol) < 1) TVM_FFI_THROW(ValueError) << "expected " << what << " of at least 1, got 0";
}

void read_state(CheckedCall& call, StepArguments& a) {
  a.state = read_storage(Argument::kState, Argument::kScales, call);
  check_size('H', "nheads", call);
  check_size('P', "headdim", call);
  check_size('N', "dstate", call);
  a.heads = call.sizes.of('H');
  a.rows = call.sizes.of('P');
  a.columns = call.sizes.of('N');
}

void read_intermediates(CheckedCall& call, StepArguments& a) {
  const DLTensor* tensor = call.tensors[Argument::kIntermediates];
  if (!tensor) return;
  const char* name = name_of(Argument::kIntermediates);
  a.intermediates = read_storage(Argument::kIntermediates, Argument::kIntermediateScales, call);
  a.intermediates.steps = tensor->shape[1];
  if (a.intermediates.type != a.state.type) TVM_FFI_THROW(ValueError) << name << " must have the type of state";
  int64_t steps = call.sequence_tokens() / a.intermediate_stride;
  if (a.intermediates.steps < steps)
    TVM_FFI_THROW(ValueError) << name << " must have at least " << steps << " steps, got " << a.intermediates.steps;
}

Operand read_ring(Argument argument, ElementType type, CheckedCall& call) {
  Operand ring = read_operand(argument, call);
  if (ring.type != type)
    TVM_FFI_THROW(ValueError) << name_of(argument) << " must have the type of what it keeps, float32 for step sizes";
  return ring;
}

IndexTable read_cursor(Argument argument, CheckedCall& call) {
  IndexTable table = read_table(argument, call);
  if (table.is_64_bit) refuse_type(*call.tensors[argument], name_of(argument), "int32");
  return table;
}

// The rings of a checkpoint and where its cursor is in them.
void read_replay(CheckedCall& call, StepArguments& a) {
  a.replay.x = read_ring(Argument::kReplayX, a.x.type, call);
  a.replay.B = read_ring(Argument::kReplayB, a.B.type, call);
  a.replay.dt = read_ring(Argument::kReplayDt, ElementType::kFloat32, call);
  a.replay.start = read_cursor(Argument::kReplayStart, call);
  a.replay.pending = read_cursor(Argument::kReplayPending, call);
  a.replay.length = call.sizes.of('R');
  if (a.read_slots.has_columns) TVM_FFI_THROW(ValueError) << "state_batch_indices must have one axis with replay_x";
}

// The most tokens of a sequence; packed ones beyond them belong to none.
int64_t longest_sequence(const CheckedCall& call, const StepArguments& a) {
  if (call.tensors[Argument::kParents]) return std::min(a.tokens, kMaxTreeTokens);
  return replays(a) ? std::min(a.tokens, call.rules.compiled_for.most_tokens) : a.tokens;
}

// Whether there are heads, and how sequences and tokens lie: the axes of the state and x and cu_seqlens tell.
void read_layout(CheckedCall& call) {
  const DLTensor &state = *call.tensors[Argument::kState], &x = *call.tensors[Argument::kX];
  const DLTensor* starts = call.tensors[Argument::kSequenceStarts];
  if (state.ndim != 3 && state.ndim != 4)
    TVM_FFI_THROW(ValueError) << "state must have 3 or 4 axes, got " << state.ndim;
  call.has_heads = state.ndim == 4;
  if (call.tensors[Argument::kReplayX] && !call.has_heads)
    TVM_FFI_THROW(ValueError) << "state must have 4 axes to be a checkpoint, got " << state.ndim;
  for (auto [symbol, size] : call.rules.compiled_for.sizes) call.sizes.set(symbol, size);
  if (!call.has_heads) {
    for (char symbol : {'H', 'G'}) {
      if (call.sizes.contradict(symbol, 1))
        TVM_FFI_THROW(ValueError) << "state must have an axis of heads, got " << state.ndim << " axes";
      call.sizes.set(symbol, 1);
    }
  }
  int more = x.ndim - (state.ndim - 1);
  if (more < 0 || more > (starts ? 0 : 1))
    TVM_FFI_THROW(ValueError) << "x has " << x.ndim << " axes, which does not go with a state of " << state.ndim
                              << (starts ? " and cu_seqlens" : "");
  call.layout = starts ? Layout::kPacked : more ? Layout::kMulti : Layout::kSingle;
  int layout = call.rules.compiled_for.layout;
  if (layout >= 0 && layout != static_cast<int>(call.layout))
    TVM_FFI_THROW(ValueError) << "x has " << x.ndim << " axes, which the kernel was not compiled for";
  if (!starts) return;
  if (starts->ndim != 1 || starts->shape[0] < 1)
    TVM_FFI_THROW(ValueError) << "cu_seqlens must have shape (sequences + 1,)";
  call.sizes.set('b', starts->shape[0] - 1);
}

void read_groups(CheckedCall& call, StepArguments& a) {
  a.B = read_operand(Argument::kB, call);
  int64_t groups = call.sizes.of('G');
  if (groups < 1 || a.heads % groups != 0)
    TVM_FFI_THROW(ValueError) << "B has " << groups << " groups, which does not divide " << a.heads << " heads";
  a.heads_per_group = a.heads / groups;
}

void check_tokens(const CheckedCall& call) {
  const CompiledFor& expected = call.rules.compiled_for;
  // No tokens take the kernel of one.
  int64_t tokens = std::max<int64_t>(call.sequence_tokens(), 1);
  if (tokens < expected.least_tokens || tokens > expected.most_tokens)
    TVM_FFI_THROW(ValueError) << "the kernel was compiled for " << expected.least_tokens << " to "
                              << expected.most_tokens << " tokens, got " << tokens;
}

bool is_pair(const DLTensor& seed) { return is_type(seed.dtype, kDLUInt, 32); }

// One int64, or the two words of a key.
void check_seed(CheckedCall& call, StepArguments& a) {
  const DLTensor* seed = call.tensors[Argument::kSeed];
  if (!seed) return;
  check(Argument::kSeed, call);
  if (!is_pair(*seed) && !is_type(seed->dtype, kDLInt, 64)) refuse_type(*seed, "rand_seed", "int64 or uint32");
  if (is_pair(*seed) ? seed->ndim == 0 || seed->shape[0] != 2 : seed->ndim > 0 && seed->shape[0] != 1)
    TVM_FFI_THROW(ValueError) << "rand_seed must be one int64 or two uint32";
  if (a.state.type == ElementType::kFloat32 || a.state.type == ElementType::kInt16)
    TVM_FFI_THROW(ValueError) << "rand_seed goes with a state of float16, bfloat16, int8 or float8_e4m3fn only";
  a.random.is_used = true;
}

}  // namespace

void read_tensors(const CallTensors& tensors, const CallRules& rules, StepArguments& a) {
  CheckedCall call{tensors, rules, Layout::kSingle, false, {}};
  read_layout(call);
  read_state(call, a);
  a.x = read_operand(Argument::kX, call);
  a.dt = read_operand(Argument::kDt, call);
  a.A = read_operand(Argument::kA, call);
  read_groups(call, a);
  a.C = read_operand(Argument::kC, call);
  a.D = read_operand(Argument::kD, call);
  a.z = read_operand(Argument::kZ, call);
  a.dt_bias = read_operand(Argument::kDtBias, call);
  check_tokens(call);
  a.sequences = call.sizes.of('b');
  a.tokens = call.layout == Layout::kPacked ? call.sizes.of('L') : call.sequence_tokens();
  call.sizes.set('Q', a.sequences + 1);
  a.read_slots = read_slots(Argument::kReadSlots, call);
  a.write_slots = read_slots(Argument::kWriteSlots, call);
  a.accepted_tokens = read_table(Argument::kAcceptedTokens, call);
  a.sequence_starts = read_table(Argument::kSequenceStarts, call);
  a.intermediate_entries = read_table(Argument::kIntermediateEntries, call);
  a.parents = read_parents(call);
  a.has_initial_state = read_flags(Argument::kHasInitialState, call);
  read_intermediates(call, a);
  check_seed(call, a);
  if (tensors[Argument::kReplayX]) read_replay(call, a);
  a.longest = longest_sequence(call, a);
  a.out = read_operand(Argument::kOut, call);

  if (a.out.type != a.x.type) TVM_FFI_THROW(ValueError) << "out must have the type of x";
  if (tensors[Argument::kAcceptedTokens] && !a.read_slots.has_columns)
    TVM_FFI_THROW(ValueError) << "num_accepted_tokens goes with a state_batch_indices of two axes only";
  if (!tensors[Argument::kReadSlots] && a.state.entries < a.sequences)
    TVM_FFI_THROW(ValueError) << "state has " << a.state.entries << " slots for " << a.sequences << " sequences";
  a.is_direct = a.tokens == 1 && !a.sequence_starts.data && !a.intermediates.data && !a.random.is_used &&
                !is_quantised(a.state.type);
}

void read_seed(const CallTensors& tensors, StepArguments& a) {
  const DLTensor* seed = tensors[Argument::kSeed];
  if (!seed) return;
  // Eight bytes: an int64, or the two words of the key with the lower one first.
  uint64_t key;
  std::memcpy(&key, data_of(*seed), sizeof key);
  a.random.key[0] = static_cast<uint32_t>(key);
  a.random.key[1] = static_cast<uint32_t>(key >> 32);
}

}  // namespace ssu_bridge
