// The step of a token from the slot that a sequence reads straight to the slot that it writes.
#ifndef SSU_BRIDGE_CPU_DIRECT_H_
#define SSU_BRIDGE_CPU_DIRECT_H_

#include <string.h>

#include "cpu/item.h"
#include "cpu/step_arguments.h"
#include "cpu/tables.h"

namespace ssu_bridge {
namespace {

template <class State>
inline StateRows<State> slot_rows(const StepArguments& a, const Item& item, const Scratch& scratch) {
  int64_t source = read_slot(a, item.sequence);
  int64_t target = write_slot(a, item.sequence, source, 0, true);
  int64_t offset = (item.head * a.rows + item.row) * a.columns;
  State* state = static_cast<State*>(a.state.data);
  StateRows<State> rows = {static_cast<State*>(scratch.zeros), 0, static_cast<State*>(scratch.refuse), 0};
  if (!starts_from_slot(a, item.sequence, source)) {
    memset(scratch.zeros, 0, static_cast<size_t>(padded(a.columns)) * sizeof(State));
  } else {
    rows.from = state + source * a.state.stride + offset;
    rows.from_stride = a.columns;
  }
  if (target != kNone) {
    rows.to = state + target * a.state.stride + offset;
    rows.to_stride = a.columns;
  }
  return rows;
}

template <class State>
void step_directly(const StepArguments& a, int64_t first, int64_t last, void* memory) {
  Scratch scratch(memory, a.columns);
  RowNumbers numbers;
  int64_t loaded_sequence = -1, loaded_group = -1;
  for (int64_t number = first; number < last; ++number) {
    Item item = item_of(a, number);
    if (item.sequence != loaded_sequence || item.group != loaded_group) {
      read_group<State>(scratch.B, a.B, item, a.columns);
      read_group<State>(scratch.C, a.C, item, a.columns);
      loaded_sequence = item.sequence;
      loaded_group = item.group;
    }
    step_item(a, item, slot_rows<State>(a, item, scratch), scratch, numbers);
  }
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_DIRECT_H_
