// Which tokens, slots and entries the index tables name for a sequence. Any value may stand in a table: none of them
// leads outside the memory that it is meant for.
//
// Static and free of the standard library for the reason that step_arguments.h gives.
#ifndef SSU_BRIDGE_CPU_TABLES_H_
#define SSU_BRIDGE_CPU_TABLES_H_

#include "cpu/step_arguments.h"

namespace ssu_bridge {

constexpr int64_t kNone = -1;

static inline int64_t index_in(const IndexTable& table, int64_t row, int64_t column) {
  int64_t offset = row * table.stride + column * table.column_stride;
  return table.is_64_bit ? static_cast<const int64_t*>(table.data)[offset]
                         : static_cast<const int32_t*>(table.data)[offset];
}

static inline int64_t bounded(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value > most ? most : value;
}

// The tokens of a sequence, counted along the token axis of x.
struct TokenRange {
  int64_t first, count;
};

static inline TokenRange tokens_of(const StepArguments& a, int64_t sequence) {
  if (!a.sequence_starts.data) return {0, a.tokens};
  int64_t first = bounded(index_in(a.sequence_starts, sequence, 0), 0, a.tokens);
  int64_t end = bounded(index_in(a.sequence_starts, sequence + 1, 0), first, a.tokens);
  return {first, bounded(end - first, 0, a.longest)};
}

// The token of a tree whose state a token continues, or kNone for the state that its sequence starts from.
static inline int64_t parent_of(const StepArguments& a, int64_t sequence, const TokenRange& tokens, int64_t token) {
  int64_t parent =
      a.sequence_starts.data ? index_in(a.parents, tokens.first + token, 0) : index_in(a.parents, sequence, token);
  return parent < 0 || parent >= token ? kNone : parent;
}

// The slot that a column of a table names, or kNone for a padding index. A column that the table does not have counts
// as one.
static inline int64_t slot_in(const StepArguments& a, const IndexTable& table, int64_t sequence, int64_t column) {
  if (column >= table.columns) return kNone;
  int64_t slot = index_in(table, sequence, column);
  return slot == a.pad_slot || slot < 0 || slot >= a.state.entries ? kNone : slot;
}

// The slot that a sequence starts from, or kNone.
static inline int64_t read_slot(const StepArguments& a, int64_t sequence) {
  if (!a.read_slots.data) return sequence;
  int64_t column = 0;
  if (a.accepted_tokens.data) {
    int64_t accepted = index_in(a.accepted_tokens, sequence, 0);
    column = bounded(accepted, 1, a.read_slots.columns < 1 ? 1 : a.read_slots.columns) - 1;
  }
  return slot_in(a, a.read_slots, sequence, column);
}

// Where in the rings of its slot the tokens of a sequence begin that the checkpoint lacks, and how many they are.
struct Phase {
  int64_t slot, start, pending;
};

static inline Phase phase_of(const StepArguments& a, int64_t sequence) {
  int64_t slot = read_slot(a, sequence);
  if (slot == kNone) return {kNone, 0, 0};
  int64_t start = index_in(a.replay.start, slot, 0) % a.replay.length;
  return {slot, start < 0 ? start + a.replay.length : start,
          bounded(index_in(a.replay.pending, slot, 0), 0, a.replay.most_pending)};
}

// The row of a token, counted from the first that is pending. There are no more than the ring has rows.
static inline int64_t ring_row(const StepArguments& a, const Phase& phase, int64_t token) {
  int64_t row = phase.start + token;
  return row < a.replay.length ? row : row - a.replay.length;
}

// Whether so many tokens more write the checkpoint.
static inline bool flushes(const StepArguments& a, const Phase& phase, int64_t count) {
  return phase.slot != kNone && count > 0 && phase.pending + count > a.replay.window;
}

// Whether a sequence that read `source` starts from the state there, and not from zeros.
static inline bool starts_from_slot(const StepArguments& a, int64_t sequence, int64_t source) {
  if (source == kNone) return false;
  return !a.has_initial_state.data || a.has_initial_state.data[sequence * a.has_initial_state.stride] != 0;
}

// The slot for the state after a token of a sequence that read `source`, or kNone where it is not stored in a slot.
static inline int64_t write_slot(const StepArguments& a, int64_t sequence, int64_t source, int64_t token,
                                 bool is_last) {
  if (source == kNone || !a.updates_state) return kNone;
  if (a.write_slots.data && a.write_slots.has_columns) return slot_in(a, a.write_slots, sequence, token);
  if (!is_last || a.parents.data) return kNone;  // a tree has no last state
  return a.write_slots.data ? slot_in(a, a.write_slots, sequence, 0) : source;
}

// The step of an entry of the intermediate states for the state after a token, or kNone.
static inline int64_t intermediate_step(const StepArguments& a, int64_t token) {
  int64_t count = (token + 1) / a.intermediate_stride;
  return count * a.intermediate_stride == token + 1 && count <= a.intermediates.steps ? count - 1 : kNone;
}

// The entry, or kNone.
static inline int64_t intermediate_entry(const StepArguments& a, int64_t sequence, int64_t source, int64_t token) {
  if (source == kNone || !a.intermediates.data || intermediate_step(a, token) == kNone) return kNone;
  int64_t entry = a.intermediate_entries.data ? index_in(a.intermediate_entries, sequence, 0) : source;
  return entry < 0 || entry >= a.intermediates.entries ? kNone : entry;
}

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_TABLES_H_
