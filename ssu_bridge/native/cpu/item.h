// The arithmetic of one token on the rows of a work item, from where they are to where they go.
//
// Every number belongs to one row of one head of one sequence, and the operations on a row and their order depend on
// nothing outside it: not on the batch, the block of rows it is in, or the thread.
#ifndef SSU_BRIDGE_CPU_ITEM_H_
#define SSU_BRIDGE_CPU_ITEM_H_

#include "cpu/blocks.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/step_arguments.h"
#include "cpu/vector_math.h"

// In one piece with the loop over the items: calls cost a sixth more where rows are short.
#define SSU_BRIDGE_INLINE inline __attribute__((always_inline))

namespace ssu_bridge {
namespace {

// How far ahead of a load to prefetch. Rows are read several at a time, which hides from the processor that they follow
// one another in memory. At batch 64 this distance halved the time; half of it was too short, and twice no better.
constexpr int64_t kPrefetchBytes = 4096;

struct Scratch {
  float* B;
  float* C;
  float* A;      // rows of A for one group of rows, when they cannot be used where they lie
  void* zeros;   // what a sequence without a slot reads
  void* refuse;  // where a store that is skipped goes

  Scratch(void* memory, int64_t columns) {
    float* next = static_cast<float*>(memory);
    B = next;
    C = B + padded(columns);
    A = C + padded(columns);
    zeros = A + padded(columns) * kMaxRowGroup;
    refuse = A + padded(columns) * (kMaxRowGroup + 1);
  }
};

// What a work item knows about each of its rows.
struct RowNumbers {
  static constexpr int64_t kSize = kMaxRowsPerItem + 16;
  alignas(64) float x[kSize];
  alignas(64) float d[kSize];      // the time step
  alignas(64) float decay[kSize];  // exp(A d), where A is one number for a row
  alignas(64) float input[kSize];  // d x
  alignas(64) float y[kSize];
  alignas(64) float other[kSize];  // dt_bias, A, D or z in passing
};

// A block of rows of one head of one sequence, at a token.
struct Item {
  int64_t sequence, head, group, row, rows;
  int64_t token = 0;
};

inline Item item_of(const StepArguments& a, int64_t number) {
  Item item;
  int64_t head_number = number / a.blocks_per_head;
  item.row = (number - head_number * a.blocks_per_head) * a.rows_per_item;
  item.rows = a.rows - item.row < a.rows_per_item ? a.rows - item.row : a.rows_per_item;
  item.sequence = head_number / a.heads;
  item.head = head_number - item.sequence * a.heads;
  item.group = item.head / a.heads_per_group;
  return item;
}

// The state rows of an item. A stride of zero makes every row the same one, for zeros and refuse.
template <class State>
struct StateRows {
  const State* from;
  int64_t from_stride;
  State* to;
  int64_t to_stride;
};

// Rows of A in float32, where A is not one number for a row.
struct DecayRows {
  const float* A;
  int64_t stride;
};

// The columns n..n+count-1 of kRows rows, which are a block, or less when kPartial. `factor` is exp(A d), or d when
// kUntied. The rows share the loads of B and C.
template <bool kUntied, int kVectors, bool kPartial, int kRows, class State>
SSU_BRIDGE_INLINE void step_block(const StateRows<State>& state, const DecayRows& decay, const Scratch& scratch,
                                  const Vec (&factor)[kRows], const Vec (&input)[kRows], Vec (&sums)[kRowGroup],
                                  int64_t n, int64_t count) {
  Vec b[kVectors], c[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    b[i] = load(scratch.B + n + i * kLanes);
    c[i] = load(scratch.C + n + i * kLanes);
  }
  for (int r = 0; r < kRows; ++r) {
    const State* from = state.from + r * state.from_stride + n;
    __builtin_prefetch(from + kPrefetchBytes / sizeof(State));
    Block<kVectors> s = load_block<kVectors, kPartial>(from, count);
    Block<kVectors> a;
    if (kUntied) a = load_ordered<kVectors, kPartial>(decay.A + r * decay.stride + n, count);
    for (int i = 0; i < kVectors; ++i) {
      Vec f = kUntied ? canonical(exponential(mul(a.vectors[i], factor[r]))) : factor[r];
      s.vectors[i] = fma(s.vectors[i], f, mul(input[r], b[i]));
    }
    store_block<kVectors, kPartial>(state.to + r * state.to_stride + n, s, count);
    // An infinite factor makes NaNs of the zeros past the end of the row.
    if (kPartial) keep_columns(s, count);
    for (int i = 0; i < kVectors; ++i) sums[r] = fma(s.vectors[i], c[i], sums[r]);
  }
}

// Steps kRows rows. Writes kRowGroup numbers to y.
template <bool kUntied, int kRows, class State>
SSU_BRIDGE_INLINE void step_rows(const StateRows<State>& state, const DecayRows& decay, const float* factors,
                                 const float* inputs, const Scratch& scratch, int64_t columns, float* y) {
  Vec factor[kRows], input[kRows], sums[kRowGroup];
  for (int r = 0; r < kRowGroup; ++r) sums[r] = splat(0.0f);
  for (int r = 0; r < kRows; ++r) {
    factor[r] = splat(factors[r]);
    input[r] = splat(inputs[r]);
  }
  constexpr int kWidest = kWidestBlock<State>;
  constexpr int64_t kWidth = kWidest * kLanes;
  int64_t n = 0;
  for (; n + kWidth <= columns; n += kWidth)
    step_block<kUntied, kWidest, false>(state, decay, scratch, factor, input, sums, n, kWidth);
  int64_t left = columns - n;
  if (kWidest > 1 && left > kLanes)
    step_block<kUntied, kWidest, true>(state, decay, scratch, factor, input, sums, n, left);
  else if (kWidest > 1 && left == kLanes)
    step_block<kUntied, 1, false>(state, decay, scratch, factor, input, sums, n, left);
  else if (left > 0)
    step_block<kUntied, 1, true>(state, decay, scratch, factor, input, sums, n, left);
  store_sums(sums, y);
}

// float32 rows of A for the rows from `row` on, in place where possible.
inline DecayRows decay_rows(const StepArguments& a, const Item& item, int64_t row, int64_t rows,
                            const Scratch& scratch) {
  int64_t offset = item.head * a.A.head_stride + (item.row + row) * a.A.row_stride;
  if (a.A.type == ElementType::kFloat32 && a.A.column_stride == 1)
    return {static_cast<const float*>(a.A.data) + offset, a.A.row_stride};
  int64_t stride = padded(a.columns);
  for (int64_t r = 0; r < rows; ++r)
    read(scratch.A + r * stride, a.A, offset + r * a.A.row_stride, a.columns, a.A.column_stride);
  return {scratch.A, stride};
}

template <bool kUntied, class State>
SSU_BRIDGE_INLINE void step_all_rows(const StepArguments& a, const Item& item, StateRows<State> state,
                                     const Scratch& scratch, RowNumbers& numbers) {
  const float* factors = kUntied ? numbers.d : numbers.decay;
  int64_t r = 0;
  while (r < item.rows) {
    bool whole = r + kRowGroup <= item.rows;
    int64_t rows = whole ? kRowGroup : 1;
    DecayRows decay = {nullptr, 0};
    if (kUntied) decay = decay_rows(a, item, r, rows, scratch);
    if (whole)
      step_rows<kUntied, kRowGroup>(state, decay, factors + r, numbers.input + r, scratch, a.columns, numbers.y + r);
    else
      step_rows<kUntied, 1>(state, decay, factors + r, numbers.input + r, scratch, a.columns, numbers.y + r);
    state.from += rows * state.from_stride;
    state.to += rows * state.to_stride;
    r += rows;
  }
}

inline int64_t offset_of(const Operand& operand, const Item& item) {
  return item.sequence * operand.batch_stride + item.token * operand.token_stride;
}

// B or C of the item's group, in the order of the state's blocks.
template <class State>
inline void read_group(float* to, const Operand& from, const Item& item, int64_t columns) {
  read(to, from, offset_of(from, item) + item.group * from.head_stride, columns, from.column_stride);
  order_row<State>(to, columns);
}

// A row of an operand that has one number for each row of the item.
inline void read_rows(float* to, const Operand& from, const Item& item, int64_t count) {
  int64_t offset = offset_of(from, item) + item.head * from.head_stride + item.row * from.row_stride;
  read(to, from, offset, count, from.row_stride);
}

// The time steps of the first so many rows.
SSU_BRIDGE_INLINE void read_steps(const StepArguments& a, const Item& item, int64_t steps, RowNumbers& numbers) {
  read_rows(numbers.d, a.dt, item, steps);
  if (a.dt_bias.data) read_rows(numbers.other, a.dt_bias, item, steps);
  for (int64_t i = 0; i < steps; i += kLanes) {
    Vec d = load(numbers.d + i);
    if (a.dt_bias.data) d = add(d, load(numbers.other + i));
    if (a.softplus) d = softplus(d);
    store(numbers.d + i, d);
  }
}

// The time step, the decay and the input of each row; where they are tied, once for all rows.
SSU_BRIDGE_INLINE void prepare_rows(const StepArguments& a, const Item& item, RowNumbers& numbers) {
  bool tied_step = a.dt.row_stride == 0 && a.dt_bias.row_stride == 0;
  read_steps(a, item, tied_step ? 1 : item.rows, numbers);
  if (tied_step) spread(numbers.d, item.rows);
  if (a.A.column_stride == 0) {
    bool tied_decay = tied_step && a.A.row_stride == 0;
    int64_t decays = tied_decay ? 1 : item.rows;
    read_rows(numbers.other, a.A, item, decays);
    for (int64_t i = 0; i < decays; i += kLanes)
      store(numbers.decay + i, exponential(mul(load(numbers.other + i), load(numbers.d + i))));
    if (tied_decay) spread(numbers.decay, item.rows);
  }
  read_rows(numbers.x, a.x, item, item.rows);
  for (int64_t i = 0; i < item.rows; i += kLanes)
    store(numbers.input + i, mul(load(numbers.d + i), load(numbers.x + i)));
}

// y + D x, the gate, and the rounding to out's type.
inline void finish_rows(const StepArguments& a, const Item& item, RowNumbers& numbers) {
  if (a.D.data) {
    read_rows(numbers.other, a.D, item, item.rows);
    for (int64_t i = 0; i < item.rows; i += kLanes)
      store(numbers.y + i, fma(load(numbers.other + i), load(numbers.x + i), load(numbers.y + i)));
  }
  if (a.z.data) {
    read_rows(numbers.other, a.z, item, item.rows);
    for (int64_t i = 0; i < item.rows; i += kLanes)
      store(numbers.y + i, mul(load(numbers.y + i), silu(load(numbers.other + i))));
  }
  int64_t offset = offset_of(a.out, item) + item.head * a.rows + item.row;
  write(a.out.data, a.out.type, offset, numbers.y, item.rows);
}

// The whole token: from the state and the operands to the new state and out.
template <class State>
SSU_BRIDGE_INLINE void step_item(const StepArguments& a, const Item& item, const StateRows<State>& state,
                                 const Scratch& scratch, RowNumbers& numbers) {
  prepare_rows(a, item, numbers);
  if (a.A.column_stride == 0)
    step_all_rows<false>(a, item, state, scratch, numbers);
  else
    step_all_rows<true>(a, item, state, scratch, numbers);
  finish_rows(a, item, numbers);
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_ITEM_H_
