#include "cpu/tensor_reader.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string_view>

namespace ssu_bridge {

const char* const kArgumentNames[kArguments] = {"state",
                                                "x",
                                                "dt",
                                                "A",
                                                "B",
                                                "C",
                                                "D",
                                                "z",
                                                "dt_bias",
                                                "state_batch_indices",
                                                "dst_state_batch_indices",
                                                "num_accepted_tokens",
                                                "cu_seqlens",
                                                "intermediate_states",
                                                "intermediate_state_indices",
                                                "parent_tokens",
                                                "has_initial_state",
                                                "state_scale",
                                                "intermediate_state_scales",
                                                "rand_seed"};

namespace {

const char* name_of(Argument argument) { return kArgumentNames[static_cast<int>(argument)]; }

using Axes = std::string_view;

struct Sizes {
  bool has_heads;
  Axes token_axes;
  int64_t b, t, g, h, p, n;

  int64_t of(char axis) const {
    switch (axis) {
      case 'b':
        return b;
      case 'T':
        return t;
      case 'G':
        return g;
      case 'H':
        return h;
      case 'P':
        return p;
      default:
        return n;
    }
  }
};

int length(Axes axes) { return static_cast<int>(axes.size()); }

void* data_of(const DLTensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

void check_device(const DLTensor& tensor, const char* name) {
  DLDeviceType type = tensor.device.device_type;
  if (type == kDLCPU || type == kDLCUDAHost || type == kDLROCMHost) return;
  TVM_FFI_THROW(ValueError) << name << " must be in host memory, got DLPack device type " << static_cast<int>(type);
}

bool is_type(DLDataType type, int code, int bits) { return type.code == code && type.bits == bits && type.lanes == 1; }

[[noreturn]] void refuse_type(const DLTensor& tensor, const char* name, const char* expected) {
  TVM_FFI_THROW(ValueError) << name << " must be " << expected << ", got DLPack type code "
                            << static_cast<int>(tensor.dtype.code) << " with " << static_cast<int>(tensor.dtype.bits)
                            << " bits";
  std::abort();  // unreachable; the line above has no way to say so
}

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

// A Torch tensor may have lost its storage, or never had one.
void check_memory(const DLTensor& tensor, const char* name) {
  int64_t elements = 1;
  for (int axis = 0; axis < tensor.ndim; ++axis) elements *= tensor.shape[axis];
  if (tensor.data == nullptr && elements != 0) TVM_FFI_THROW(ValueError) << name << " has no memory";
}

// The stride of an axis of one element is arbitrary; zero lets it count as tied.
int64_t stride_of(const DLTensor& tensor, int axis, int64_t dense) {
  if (tensor.shape[axis] == 1) return 0;
  return tensor.strides ? tensor.strides[axis] : dense;
}

int64_t& stride_of(Operand& operand, char axis) {
  switch (axis) {
    case 'b':
      return operand.batch_stride;
    case 'T':
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

Axes layout_for(const DLTensor& tensor, const char* name, const Layouts& layouts, const Sizes& sizes) {
  int axes = tensor.ndim - (layouts.has_tokens ? length(sizes.token_axes) : 0);
  for (const std::string& layout : layouts.axes[sizes.has_heads])
    if (length(layout) == axes) return layout;
  TVM_FFI_THROW(ValueError) << name << " has " << tensor.ndim << " axes, which does not go with a state "
                            << (sizes.has_heads ? "of 4" : "of 3") << " and the axes of x";
  std::abort();  // unreachable, as above
}

Operand read_operand(const DLTensor& tensor, const char* name, const Layouts& layouts, const Sizes& sizes) {
  check_device(tensor, name);
  check_memory(tensor, name);
  Axes layout = layout_for(tensor, name, layouts, sizes);
  if (layout == "n" && sizes.g != 1)
    TVM_FFI_THROW(ValueError) << name << " has no axis for the " << sizes.g << " groups of B";
  int token_axes = tensor.ndim - length(layout);
  Operand operand;
  operand.data = data_of(tensor);
  operand.type = float_type(tensor, name);
  int64_t dense = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    char axis = i < token_axes ? sizes.token_axes[i] : layout[i - token_axes];
    int64_t size = tensor.shape[i];
    if (size != sizes.of(axis))
      TVM_FFI_THROW(ValueError) << name << ": axis " << i << " must have size " << sizes.of(axis) << ", got " << size;
    stride_of(operand, axis) = stride_of(tensor, i, dense);
    dense *= size;
  }
  return operand;
}

// A table of `rows` rows, with a column for each token where it may have them and does.
IndexTable read_table(const CallTensors& tensors, Argument argument, int64_t rows, bool may_have_columns = false) {
  IndexTable table;
  const DLTensor* tensor = tensors[argument];
  if (!tensor) return table;
  const char* name = name_of(argument);
  check_device(*tensor, name);
  check_memory(*tensor, name);
  table.is_64_bit = is_type(tensor->dtype, kDLInt, 64);
  if (!table.is_64_bit && !is_type(tensor->dtype, kDLInt, 32)) refuse_type(*tensor, name, "int32 or int64");
  table.has_columns = may_have_columns && tensor->ndim == 2;
  if (tensor->ndim != (table.has_columns ? 2 : 1) || tensor->shape[0] != rows)
    TVM_FFI_THROW(ValueError) << name << " must have shape (" << rows << ",)"
                              << (may_have_columns ? " or a column for each token" : "");
  // A table without columns has no memory, and is not absent for that.
  static const int64_t nothing = 0;
  table.data = tensor->data ? data_of(*tensor) : &nothing;
  if (table.has_columns) {
    table.columns = tensor->shape[1];
    table.column_stride = stride_of(*tensor, 1, 1);
  }
  table.stride = stride_of(*tensor, 0, table.columns);
  return table;
}

// A number for each token: (sequences, tokens), or (rows,) of packed ones and of single tokens.
IndexTable read_parents(const CallTensors& tensors, const Sizes& sizes) {
  bool has_both = length(sizes.token_axes) == 2;
  IndexTable table = read_table(tensors, Argument::kParents, sizes.of(sizes.token_axes[0]), has_both);
  if (!table.data) return table;
  if (table.has_columns != has_both || (has_both && table.columns != sizes.t))
    TVM_FFI_THROW(ValueError) << name_of(Argument::kParents) << " must have the first axes of x";
  if (has_both && sizes.t > kMaxTreeTokens)
    TVM_FFI_THROW(ValueError) << "a tree has at most " << kMaxTreeTokens << " tokens, got " << sizes.t;
  return table;
}

FlagTable read_flags(const CallTensors& tensors, Argument argument, int64_t count) {
  FlagTable table;
  const DLTensor* tensor = tensors[argument];
  if (!tensor) return table;
  const char* name = name_of(argument);
  check_device(*tensor, name);
  check_memory(*tensor, name);
  if (!is_type(tensor->dtype, kDLBool, 8) && !is_type(tensor->dtype, kDLUInt, 8))
    refuse_type(*tensor, name, "bool or uint8");
  if (tensor->ndim != 1 || tensor->shape[0] != count)
    TVM_FFI_THROW(ValueError) << name << " must have shape (" << count << ",)";
  table.data = static_cast<const uint8_t*>(data_of(*tensor));
  table.stride = stride_of(*tensor, 0, 1);
  return table;
}

// Whether the axes from `first` on lie densely. The strides of an empty tensor say nothing.
bool is_dense_from(const DLTensor& tensor, int first) {
  bool dense = true;
  int64_t stride = 1;
  for (int axis = tensor.ndim - 1; axis >= first && tensor.strides; --axis) {
    if (tensor.shape[axis] != 1 && tensor.strides[axis] != stride) dense = false;
    stride *= tensor.shape[axis];
  }
  for (int axis = 0; axis < first; ++axis) stride *= tensor.shape[axis];
  return dense || stride == 0;
}

// The distance between two of what the first axis counts, where the others lie densely.
int64_t dense_stride(const DLTensor& tensor) {
  int64_t dense = 1;
  for (int axis = 1; axis < tensor.ndim; ++axis) dense *= tensor.shape[axis];
  return tensor.strides && tensor.shape[0] > 1 ? tensor.strides[0] : dense;
}

void check_shape(const DLTensor& tensor, const char* name, const int64_t* shape, int axes) {
  bool matches = tensor.ndim == axes;
  for (int axis = 0; axis < axes && matches; ++axis) matches = tensor.shape[axis] == shape[axis];
  if (!matches) TVM_FFI_THROW(ValueError) << name << " has a shape that does not go with the other states";
}

// `scales` holds one number for each row of `values`, or is null where the values are floats.
StateStorage read_storage(const DLTensor& values, const char* name, const DLTensor* scales, const char* scales_name) {
  check_device(values, name);
  check_memory(values, name);
  if (!is_dense_from(values, 1)) TVM_FFI_THROW(ValueError) << name << " must be contiguous inside an entry";
  StateStorage storage;
  storage.data = data_of(values);
  storage.type = state_type(values, name);
  storage.entries = values.shape[0];
  storage.stride = dense_stride(values);
  if (is_quantised(storage.type) != (scales != nullptr))
    TVM_FFI_THROW(ValueError) << scales_name << " must be there for a quantised " << name << ", and only then";
  if (scales) {
    check_device(*scales, scales_name);
    check_memory(*scales, scales_name);
    check_shape(*scales, scales_name, values.shape, values.ndim - 1);
    if (!is_type(scales->dtype, kDLFloat, 32)) refuse_type(*scales, scales_name, "float32");
    if (!is_dense_from(*scales, 1)) TVM_FFI_THROW(ValueError) << scales_name << " must be contiguous inside an entry";
    storage.scales = static_cast<float*>(data_of(*scales));
    storage.scale_stride = dense_stride(*scales);
  }
  return storage;
}

Sizes read_state(const CallTensors& tensors, StepArguments& a) {
  const DLTensor& state = *tensors[Argument::kState];
  if (state.ndim != 3 && state.ndim != 4)
    TVM_FFI_THROW(ValueError) << "state must have 3 or 4 axes, got " << state.ndim;
  a.state = read_storage(state, "state", tensors[Argument::kScales], name_of(Argument::kScales));
  bool has_heads = state.ndim == 4;
  a.heads = has_heads ? state.shape[1] : 1;
  a.rows = state.shape[state.ndim - 2];
  a.columns = state.shape[state.ndim - 1];
  return {has_heads, "b", 0, 1, 1, a.heads, a.rows, a.columns};
}

void read_intermediates(const CallTensors& tensors, StepArguments& a) {
  const DLTensor* tensor = tensors[Argument::kIntermediates];
  if (!tensor) return;
  const char* name = name_of(Argument::kIntermediates);
  const DLTensor& state = *tensors[Argument::kState];
  if (tensor->ndim != state.ndim + 1)
    TVM_FFI_THROW(ValueError) << name << " must have " << state.ndim + 1 << " axes, got " << tensor->ndim;
  // (entries, steps, ...) beside (slots, ...)
  for (int axis = 1; axis < state.ndim; ++axis)
    if (tensor->shape[axis + 1] != state.shape[axis])
      TVM_FFI_THROW(ValueError) << name << ": axis " << axis + 1 << " must have size " << state.shape[axis] << ", got "
                                << tensor->shape[axis + 1];
  a.intermediates =
      read_storage(*tensor, name, tensors[Argument::kIntermediateScales], name_of(Argument::kIntermediateScales));
  a.intermediates.steps = tensor->shape[1];
  if (a.intermediates.type != a.state.type) TVM_FFI_THROW(ValueError) << name << " must have the type of state";
}

// The sequences and tokens, as the axes of x or as cu_seqlens tell.
void read_tokens(const CallTensors& tensors, Sizes& sizes, StepArguments& a) {
  const DLTensor& x = *tensors[Argument::kX];
  const DLTensor* starts = tensors[Argument::kSequenceStarts];
  int axes = x.ndim - (sizes.has_heads ? 2 : 1);
  if (axes < 1 || axes > (starts ? 1 : 2))
    TVM_FFI_THROW(ValueError) << "x has " << x.ndim << " axes, which does not go with a state of "
                              << (sizes.has_heads ? 4 : 3) << (starts ? " and cu_seqlens" : "");
  if (starts) {
    if (starts->ndim != 1 || starts->shape[0] < 1)
      TVM_FFI_THROW(ValueError) << "cu_seqlens must have shape (sequences + 1,)";
    sizes.token_axes = "T";
    sizes.b = starts->shape[0] - 1;
    sizes.t = x.shape[0];
    a.sequence_starts = read_table(tensors, Argument::kSequenceStarts, sizes.b + 1);
  } else {
    sizes.token_axes = axes == 2 ? "bT" : "b";
    sizes.b = x.shape[0];
    sizes.t = axes == 2 ? x.shape[1] : 1;
  }
  a.sequences = sizes.b;
  a.tokens = sizes.t;
}

void read_groups(const CallTensors& tensors, Sizes& sizes, StepArguments& a) {
  const DLTensor& B = *tensors[Argument::kB];
  int token_axes = length(sizes.token_axes);
  sizes.g = B.ndim == token_axes + 2 ? B.shape[token_axes] : 1;
  if (sizes.g < 1 || sizes.h % sizes.g != 0)
    TVM_FFI_THROW(ValueError) << "B has " << sizes.g << " groups, which does not divide " << sizes.h << " heads";
  a.heads_per_group = sizes.h / sizes.g;
}

// Eight bytes: an int64, or the two words of the key with the lower one first.
void read_seed(const CallTensors& tensors, StepArguments& a) {
  const DLTensor* seed = tensors[Argument::kSeed];
  if (!seed) return;
  check_device(*seed, "rand_seed");
  check_memory(*seed, "rand_seed");
  bool is_pair = is_type(seed->dtype, kDLUInt, 32);
  if (!is_pair && !is_type(seed->dtype, kDLInt, 64)) refuse_type(*seed, "rand_seed", "int64 or uint32");
  if (is_pair ? seed->ndim != 1 || seed->shape[0] != 2 : seed->ndim > 1 || (seed->ndim == 1 && seed->shape[0] != 1))
    TVM_FFI_THROW(ValueError) << "rand_seed must be one int64 or two uint32";
  if (a.state.type == ElementType::kFloat32 || a.state.type == ElementType::kInt16)
    TVM_FFI_THROW(ValueError) << "rand_seed goes with a state of float16, bfloat16, int8 or float8_e4m3fn only";
  if (is_pair) {
    const uint32_t* words = static_cast<const uint32_t*>(data_of(*seed));
    a.random.key[0] = words[0];
    a.random.key[1] = words[stride_of(*seed, 0, 1)];
  } else {
    uint64_t key = *static_cast<const uint64_t*>(data_of(*seed));
    a.random.key[0] = static_cast<uint32_t>(key);
    a.random.key[1] = static_cast<uint32_t>(key >> 32);
  }
  a.random.is_used = true;
}

void read_out(const DLTensor& out, const Layouts& layouts, const Sizes& sizes, StepArguments& a) {
  a.out = read_operand(out, "out", layouts, sizes);
  if (!is_dense_from(out, length(sizes.token_axes)))
    TVM_FFI_THROW(ValueError) << "out must be contiguous behind its token axes";
}

}  // namespace

Layouts parse_layouts(const tvm::ffi::Array<tvm::ffi::String>& shapes) {
  Layouts layouts;
  for (const tvm::ffi::String& shape : shapes) {
    std::string axes = shape;
    layouts.has_tokens = axes[0] == '*';
    if (layouts.has_tokens) axes.erase(0, 1);
    layouts.axes[true].push_back(axes);
    // Without heads nothing can be tied to one.
    if (!axes.empty() && axes.back() == 'H') continue;
    axes.erase(std::remove(axes.begin(), axes.end(), 'H'), axes.end());
    layouts.axes[false].push_back(axes);
  }
  return layouts;
}

void read_tensors(const CallTensors& tensors, const CallLayouts& layouts, StepArguments& a) {
  Sizes sizes = read_state(tensors, a);
  read_tokens(tensors, sizes, a);
  read_groups(tensors, sizes, a);

  auto read = [&](Argument argument) {
    const DLTensor* tensor = tensors[argument];
    const Layouts& shapes = layouts.inputs[static_cast<int>(argument)];
    return tensor ? read_operand(*tensor, name_of(argument), shapes, sizes) : Operand();
  };
  a.x = read(Argument::kX);
  a.dt = read(Argument::kDt);
  a.A = read(Argument::kA);
  a.B = read(Argument::kB);
  a.C = read(Argument::kC);
  a.D = read(Argument::kD);
  a.z = read(Argument::kZ);
  a.dt_bias = read(Argument::kDtBias);
  a.read_slots = read_table(tensors, Argument::kReadSlots, sizes.b, true);
  a.write_slots = read_table(tensors, Argument::kWriteSlots, sizes.b, true);
  a.accepted_tokens = read_table(tensors, Argument::kAcceptedTokens, sizes.b);
  a.intermediate_entries = read_table(tensors, Argument::kIntermediateEntries, sizes.b);
  a.parents = read_parents(tensors, sizes);
  a.has_initial_state = read_flags(tensors, Argument::kHasInitialState, sizes.b);
  read_intermediates(tensors, a);
  read_seed(tensors, a);
  read_out(*tensors.out, layouts.out, sizes, a);

  if (!tensors[Argument::kReadSlots] && a.state.entries < a.sequences)
    TVM_FFI_THROW(ValueError) << "state has " << a.state.entries << " slots for " << a.sequences << " sequences";
  a.is_direct = a.tokens == 1 && !a.sequence_starts.data && !a.intermediates.data && !a.random.is_used &&
                !is_quantised(a.state.type);
}

}  // namespace ssu_bridge
