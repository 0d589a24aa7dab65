// The steps of all tokens of a sequence, on rows that are held in float32 meanwhile and stored where a table says so.
#ifndef SSU_BRIDGE_CPU_TOKENS_H_
#define SSU_BRIDGE_CPU_TOKENS_H_

#include <string.h>

#include "cpu/item.h"
#include "cpu/step_arguments.h"
#include "cpu/tables.h"
#include "cpu/tile.h"

namespace ssu_bridge {
namespace {

// The entry of the intermediate states and the slot of the state that a state goes to after a token, or kNone.
struct Targets {
  int64_t entry, slot;
};

inline void store_state(const StepArguments& a, const Item& item, int64_t token, Targets targets, const Tile& tile) {
  uint32_t number = static_cast<uint32_t>(token);
  if (targets.entry != kNone)
    store_tile(a, item, tile, a.state.type,
               stored_rows(a, item, a.intermediates, targets.entry, intermediate_step(a, token)),
               first_element(a, item, targets.entry), {number, kIntermediate});
  if (targets.slot != kNone)
    store_tile(a, item, tile, a.state.type, stored_rows(a, item, a.state, targets.slot, 0),
               first_element(a, item, targets.slot), {number, kSlot});
}

// Rounds the state after a token once, by the random words of one slot, stores that and goes on from it.
inline void round_state(const StepArguments& a, const Item& item, int64_t source, int64_t token, Targets targets,
                        const Tile& tile, const StoredRows& rounded) {
  int64_t slot = targets.slot != kNone ? targets.slot : source != kNone ? source : 0;
  store_tile(a, item, tile, a.state.type, rounded, first_element(a, item, slot), {static_cast<uint32_t>(token), kSlot});
  load_tile(a, item, tile, a.state.type, rounded);
  if (targets.entry != kNone)
    copy_rows(a, item, a.state.type, rounded,
              stored_rows(a, item, a.intermediates, targets.entry, intermediate_step(a, token)));
  if (targets.slot != kNone) copy_rows(a, item, a.state.type, rounded, stored_rows(a, item, a.state, targets.slot, 0));
}

// Stores the state after a token that is held as it is stored.
template <class State>
inline void copy_state(const StepArguments& a, const Item& item, int64_t token, Targets targets, const Tile& tile) {
  if (targets.entry != kNone)
    copy_from_tile<State>(a, item, tile,
                          stored_rows(a, item, a.intermediates, targets.entry, intermediate_step(a, token)));
  if (targets.slot != kNone) copy_from_tile<State>(a, item, tile, stored_rows(a, item, a.state, targets.slot, 0));
}

// The rows of tiles as the arithmetic of a token takes them.
template <class State>
inline StateRows<State> rows_of(const Tile& from, const Tile& to) {
  return {reinterpret_cast<const State*>(from.rows), from.stride, reinterpret_cast<State*>(to.rows), to.stride};
}

// The steps of a sequence's tokens. State is float, or the float type that the state has: rounded to nearest after each
// token, it is held as it is stored, as in calls of one token.
template <class State>
SSU_BRIDGE_INLINE void step_tokens(const StepArguments& a, Item item, const Scratch& scratch, const Tiles& tiles,
                                   RowNumbers& numbers) {
  constexpr bool kIsStored = sizeof(State) != sizeof(float);
  TokenRange tokens = tokens_of(a, item.sequence);
  if (tokens.count == 0) return;
  int64_t source = read_slot(a, item.sequence);
  Tile from = tiles.first(), to = from;
  if (!starts_from_slot(a, item.sequence, source))
    memset(from.rows, 0, static_cast<size_t>(item.rows * from.stride) * sizeof(float));
  else if (kIsStored)
    copy_to_tile<State>(a, item, stored_rows(a, item, a.state, source, 0), from);
  else
    load_tile(a, item, from, a.state.type, stored_rows(a, item, a.state, source, 0));
  for (int64_t token = 0; token < tokens.count; ++token) {
    if (a.parents.data) {
      from = tiles.after(parent_of(a, item.sequence, tokens, token));
      to = tiles.after(token);
      end_rows(a, item, to);
    }
    item.token = tokens.first + token;
    read_group<State>(scratch.B, a.B, item, a.columns);
    read_group<State>(scratch.C, a.C, item, a.columns);
    step_item(a, item, rows_of<State>(from, to), scratch, numbers);
    Targets targets = {intermediate_entry(a, item.sequence, source, token),
                       write_slot(a, item.sequence, source, token, token + 1 == tokens.count)};
    if (kIsStored)
      copy_state<State>(a, item, token, targets, to);
    else if (a.rounds_each_token)
      round_state(a, item, source, token, targets, to, tiles.rounded);
    else
      store_state(a, item, token, targets, to);
  }
}

void step_through_tiles(const StepArguments& a, int64_t first, int64_t last, void* memory) {
  Scratch scratch(memory, a.columns);
  Tiles tiles(static_cast<float*>(memory) + direct_scratch_floats(a.columns), a);
  RowNumbers numbers;
  bool is_stored = a.rounds_each_token && !a.random.is_used;
  for (int64_t number = first; number < last; ++number) {
    Item item = item_of(a, number);
    if (is_stored && a.state.type == ElementType::kBFloat16)
      step_tokens<BFloat16>(a, item, scratch, tiles, numbers);
    else if (is_stored && a.state.type == ElementType::kFloat16)
      step_tokens<Float16>(a, item, scratch, tiles, numbers);
    else
      step_tokens<float>(a, item, scratch, tiles, numbers);
  }
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_TOKENS_H_
