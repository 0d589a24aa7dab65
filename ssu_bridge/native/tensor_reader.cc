#include "tensor_reader.h"

#include <tvm/ffi/error.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace ssu_bridge {

const char* const kArgumentNames[kArguments] = {
    "state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state_batch_indices", "dst_state_batch_indices"};

namespace {

// Layouts are written as one letter an axis: b sequence, g group, h head, p row, n column. A state without a head axis
// has the second set; an empty string stands for no second form.
struct Layouts {
  const char* with_heads[2];
  const char* without_heads[2];
};
constexpr Layouts kRowLayouts = {{"bhp", ""}, {"bp", ""}};
constexpr Layouts kStepLayouts = {{"bhp", "bh"}, {"bp", ""}};
constexpr Layouts kDecayLayouts = {{"hpn", "h"}, {"pn", ""}};
constexpr Layouts kGroupLayouts = {{"bgn", "bn"}, {"bgn", "bn"}};
constexpr Layouts kWeightLayouts = {{"hp", "h"}, {"p", ""}};

struct Sizes {
  bool has_heads;
  int64_t b, g, h, p, n;

  int64_t of(char axis) const {
    switch (axis) {
      case 'b':
        return b;
      case 'g':
        return g;
      case 'h':
        return h;
      case 'p':
        return p;
      default:
        return n;
    }
  }
};

void* data_of(const DLTensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

void check_device(const DLTensor& tensor, const char* name) {
  DLDeviceType type = tensor.device.device_type;
  if (type == kDLCPU || type == kDLCUDAHost || type == kDLROCMHost) return;
  TVM_FFI_THROW(ValueError) << name << " must be in host memory, got DLPack device type " << static_cast<int>(type);
}

bool is_type(DLDataType type, DLDataTypeCode code, int bits) {
  return type.code == code && type.bits == bits && type.lanes == 1;
}

ElementType element_type(const DLTensor& tensor, const char* name) {
  if (is_type(tensor.dtype, kDLFloat, 32)) return ElementType::kFloat32;
  if (is_type(tensor.dtype, kDLBfloat, 16)) return ElementType::kBFloat16;
  if (is_type(tensor.dtype, kDLFloat, 16)) return ElementType::kFloat16;
  TVM_FFI_THROW(ValueError) << name << " must be float32, bfloat16 or float16, got DLPack type code "
                            << static_cast<int>(tensor.dtype.code) << " with " << static_cast<int>(tensor.dtype.bits)
                            << " bits";
}

// A Torch tensor may have lost its storage, or never had one.
void check_memory(const DLTensor& tensor, const char* name) {
  int64_t elements = 1;
  for (int axis = 0; axis < tensor.ndim; ++axis) elements *= tensor.shape[axis];
  if (tensor.data == nullptr && elements != 0) TVM_FFI_THROW(ValueError) << name << " has no memory";
}

int64_t& stride_of(Operand& operand, char axis) {
  switch (axis) {
    case 'b':
      return operand.batch_stride;
    case 'g':
    case 'h':
      return operand.head_stride;
    case 'p':
      return operand.row_stride;
    default:
      return operand.column_stride;
  }
}

const char* layout_for(const DLTensor& tensor, const char* name, const Layouts& layouts, bool has_heads) {
  for (const char* layout : has_heads ? layouts.with_heads : layouts.without_heads)
    if (*layout && static_cast<int>(std::strlen(layout)) == tensor.ndim) return layout;
  TVM_FFI_THROW(ValueError) << name << " has " << tensor.ndim << " axes, which does not go with a state "
                            << (has_heads ? "of 4" : "of 3");
}

Operand read_operand(const DLTensor& tensor, const char* name, const Layouts& layouts, const Sizes& sizes) {
  check_device(tensor, name);
  check_memory(tensor, name);
  const char* layout = layout_for(tensor, name, layouts, sizes.has_heads);
  Operand operand;
  operand.data = data_of(tensor);
  operand.type = element_type(tensor, name);
  int64_t dense = 1;
  for (int axis = tensor.ndim - 1; axis >= 0; --axis) {
    int64_t size = tensor.shape[axis];
    if (size != sizes.of(layout[axis]))
      TVM_FFI_THROW(ValueError) << name << ": axis " << axis << " must have size " << sizes.of(layout[axis]) << ", got "
                                << size;
    // The stride of an axis of one element is arbitrary; zero lets it count as tied.
    if (size != 1) stride_of(operand, layout[axis]) = tensor.strides ? tensor.strides[axis] : dense;
    dense *= size;
  }
  return operand;
}

SlotTable read_table(const DLTensor* tensor, const char* name, int64_t sequences) {
  SlotTable table;
  if (!tensor) return table;
  check_device(*tensor, name);
  check_memory(*tensor, name);
  table.is_64_bit = is_type(tensor->dtype, kDLInt, 64);
  if (!table.is_64_bit && !is_type(tensor->dtype, kDLInt, 32))
    TVM_FFI_THROW(ValueError) << name << " must be int32 or int64";
  if (tensor->ndim != 1 || tensor->shape[0] != sequences)
    TVM_FFI_THROW(ValueError) << name << " must have shape (" << sequences << ",)";
  table.data = data_of(*tensor);
  table.stride = tensor->strides ? tensor->strides[0] : 1;
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
  return dense || stride == 0 || tensor.shape[0] == 0;
}

Sizes read_state(const DLTensor& state, StepArguments& a) {
  check_device(state, "state");
  check_memory(state, "state");
  if (state.ndim != 3 && state.ndim != 4)
    TVM_FFI_THROW(ValueError) << "state must have 3 or 4 axes, got " << state.ndim;
  if (!is_dense_from(state, 1)) TVM_FFI_THROW(ValueError) << "state must be contiguous inside a slot";
  bool has_heads = state.ndim == 4;
  a.slots = state.shape[0];
  a.heads = has_heads ? state.shape[1] : 1;
  a.rows = state.shape[state.ndim - 2];
  a.columns = state.shape[state.ndim - 1];
  a.state = data_of(state);
  a.state_type = element_type(state, "state");
  a.slot_stride = state.strides && a.slots > 1 ? state.strides[0] : a.heads * a.rows * a.columns;
  return {has_heads, 0, 1, a.heads, a.rows, a.columns};
}

void read_out(const DLTensor& out, const Sizes& sizes, StepArguments& a) {
  Operand operand = read_operand(out, "out", kRowLayouts, sizes);
  if (!is_dense_from(out, 1)) TVM_FFI_THROW(ValueError) << "out must be contiguous behind its batch axis";
  a.out = data_of(out);
  a.out_type = operand.type;
  a.out_batch_stride = operand.batch_stride;
}

void check_out_apart_from_state(const DLTensor& out, const StepArguments& a) {
  if (a.sequences == 0 || a.slots == 0) return;
  auto begin_of = [](const void* data, int64_t count, int64_t stride, size_t size) {
    int64_t back = stride < 0 ? (count - 1) * stride : 0;
    return reinterpret_cast<intptr_t>(data) + back * static_cast<int64_t>(size);
  };
  size_t state_size = a.state_type == ElementType::kFloat32 ? 4 : 2;
  size_t out_size = out.dtype.bits / 8;
  intptr_t state = begin_of(a.state, a.slots, a.slot_stride, state_size);
  intptr_t state_end = state + static_cast<int64_t>(state_size) * ((a.slots - 1) * std::abs(a.slot_stride) +
                                                                   a.heads * a.rows * a.columns);
  intptr_t first = begin_of(a.out, a.sequences, a.out_batch_stride, out_size);
  intptr_t end = first + static_cast<int64_t>(out_size) * ((a.sequences - 1) * std::abs(a.out_batch_stride) +
                                                           a.heads * a.rows);
  if (first < state_end && state < end) TVM_FFI_THROW(ValueError) << "out: expected memory apart from the state's";
}

}  // namespace

void read_tensors(const CallTensors& tensors, StepArguments& a) {
  Sizes sizes = read_state(*tensors[Argument::kState], a);
  const DLTensor& x = *tensors[Argument::kX];
  sizes.b = a.sequences = x.ndim > 0 ? x.shape[0] : 0;
  const DLTensor& B = *tensors[Argument::kB];
  sizes.g = B.ndim == 3 ? B.shape[1] : 1;
  if (sizes.g < 1 || sizes.h % sizes.g != 0)
    TVM_FFI_THROW(ValueError) << "B has " << sizes.g << " groups, which does not divide " << sizes.h << " heads";
  a.heads_per_group = sizes.h / sizes.g;

  auto read = [&](Argument argument, const Layouts& layouts) {
    const DLTensor* tensor = tensors[argument];
    return tensor ? read_operand(*tensor, kArgumentNames[static_cast<int>(argument)], layouts, sizes) : Operand();
  };
  a.x = read(Argument::kX, kRowLayouts);
  a.dt = read(Argument::kDt, kStepLayouts);
  a.A = read(Argument::kA, kDecayLayouts);
  a.B = read(Argument::kB, kGroupLayouts);
  a.C = read(Argument::kC, kGroupLayouts);
  a.D = read(Argument::kD, kWeightLayouts);
  a.z = read(Argument::kZ, kRowLayouts);
  a.dt_bias = read(Argument::kDtBias, kWeightLayouts);
  a.read_slots = read_table(tensors[Argument::kReadSlots], "state_batch_indices", sizes.b);
  a.write_slots = read_table(tensors[Argument::kWriteSlots], "dst_state_batch_indices", sizes.b);
  read_out(*tensors.out, sizes, a);

  if (!tensors[Argument::kReadSlots] && a.slots < a.sequences)
    TVM_FFI_THROW(ValueError) << "state has " << a.slots << " slots for " << a.sequences << " sequences";
  if (data_of(*tensors.new_state) != a.state)
    TVM_FFI_THROW(ValueError) << "new_state must be the memory of state: the step works in place";
  check_out_apart_from_state(*tensors.out, a);
}

}  // namespace ssu_bridge
