// What one call of the CPU step works on, and the functions that work on it.
//
// This header is also included by the files that are compiled for a wider instruction set. It must stay free of the
// standard library's inline functions: the linker keeps one copy of each, and it might keep the one with AVX in it.
#ifndef SSU_BRIDGE_CPU_STEP_H_
#define SSU_BRIDGE_CPU_STEP_H_

#include <stddef.h>
#include <stdint.h>

namespace ssu_bridge {

enum class ElementType : int32_t { kFloat32, kBFloat16, kFloat16 };

// The 16-bit types as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A read-only operand. Strides count elements; a tied or absent axis has stride 0. `data` is null for an absent
// operand.
struct Operand {
  const void* data = nullptr;
  ElementType type = ElementType::kFloat32;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;  // of a group, for B and C
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

// Slot numbers, one a sequence. `data` is null when sequence i uses slot i.
struct SlotTable {
  const void* data = nullptr;
  int64_t stride = 0;
  bool is_64_bit = false;
};

// One single-token step: sequences x heads x rows (headdim) x columns (dstate).
struct StepArguments {
  int64_t sequences = 0;
  int64_t heads = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t heads_per_group = 1;

  void* state = nullptr;
  ElementType state_type = ElementType::kFloat32;
  int64_t slots = 0;
  int64_t slot_stride = 0;  // heads, rows and columns lie densely inside a slot

  Operand x, dt, A, B, C, D, z, dt_bias;
  SlotTable read_slots, write_slots;
  int64_t pad_slot = -1;
  bool softplus = false;

  void* out = nullptr;
  ElementType out_type = ElementType::kFloat32;
  int64_t out_batch_stride = 0;

  // A work item is a block of rows of one head of one sequence; items are numbered in that order.
  int64_t rows_per_item = 0;
  int64_t blocks_per_head = 0;
};

// The most rows that an item may have: per-row numbers live on the stack.
constexpr int64_t kMaxRowsPerItem = 512;

// Computes items first..last-1. `scratch` has scratch_bytes(columns) bytes at a multiple of 64, for this thread alone.
using StepFunction = void (*)(const StepArguments& arguments, int64_t first, int64_t last, void* scratch);

// The widest block of rows that any variant takes through the columns at once.
constexpr int64_t kMaxRowGroup = 8;

// Rows of scratch are padded, so that a vector may run over their end.
constexpr int64_t padded(int64_t columns) { return (columns + 31) / 32 * 32; }

// B, C, a group of rows of A, a zero row to read and a row to throw away.
constexpr size_t scratch_bytes(int64_t columns) {
  return static_cast<size_t>(padded(columns)) * sizeof(float) * (4 + kMaxRowGroup);
}

void step_portable(const StepArguments& arguments, int64_t first, int64_t last, void* scratch);
void step_avx2(const StepArguments& arguments, int64_t first, int64_t last, void* scratch);
void step_avx512(const StepArguments& arguments, int64_t first, int64_t last, void* scratch);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_STEP_H_
