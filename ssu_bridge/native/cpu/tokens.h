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

inline void store_state(const StepArguments& a, const Item& item, int64_t source, int64_t token, bool is_last,
                        const Tile& tile) {
  int64_t entry = intermediate_entry(a, item.sequence, source, token);
  if (entry != kNone)
    store_tile(a, item, tile, a.intermediates, entry, intermediate_step(a, token), token, kIntermediate);
  int64_t slot = write_slot(a, item.sequence, source, token, is_last);
  if (slot != kNone) store_tile(a, item, tile, a.state, slot, 0, token, kSlot);
}

inline void step_tokens(const StepArguments& a, Item item, const Scratch& scratch, const Tiles& tiles,
                        RowNumbers& numbers) {
  TokenRange tokens = tokens_of(a, item.sequence);
  if (tokens.count == 0) return;
  int64_t source = read_slot(a, item.sequence);
  Tile from = tiles.first(), to = from;
  if (starts_from_slot(a, item.sequence, source))
    load_tile(a, item, from, a.state, source);
  else
    memset(from.rows, 0, static_cast<size_t>(item.rows * from.stride) * sizeof(float));
  for (int64_t token = 0; token < tokens.count; ++token) {
    if (a.parents.data) {
      from = tiles.after(parent_of(a, item.sequence, tokens, token));
      to = tiles.after(token);
      end_rows(a, item, to);
    }
    item.token = tokens.first + token;
    read_group<float>(scratch.B, a.B, item, a.columns);
    read_group<float>(scratch.C, a.C, item, a.columns);
    step_item(a, item, StateRows<float>{from.rows, from.stride, to.rows, to.stride}, scratch, numbers);
    store_state(a, item, source, token, token + 1 == tokens.count, to);
  }
}

void step_through_tiles(const StepArguments& a, int64_t first, int64_t last, void* memory) {
  Scratch scratch(memory, a.columns);
  Tiles tiles(static_cast<float*>(memory) + direct_scratch_floats(a.columns), a);
  RowNumbers numbers;
  for (int64_t number = first; number < last; ++number) step_tokens(a, item_of(a, number), scratch, tiles, numbers);
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_TOKENS_H_
