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
  if (entry != kNone) store_tile(a, item, tile, a.intermediates, entry, token, token, kIntermediate);
  int64_t slot = write_slot(a, item.sequence, source, token, is_last);
  if (slot != kNone) store_tile(a, item, tile, a.state, slot, 0, token, kSlot);
}

inline void step_tokens(const StepArguments& a, Item item, const Scratch& scratch, const Tile& tile,
                        RowNumbers& numbers) {
  TokenRange tokens = tokens_of(a, item.sequence);
  if (tokens.count == 0) return;
  int64_t source = read_slot(a, item.sequence);
  if (source == kNone)
    memset(tile.rows, 0, static_cast<size_t>(item.rows * tile.stride) * sizeof(float));
  else
    load_tile(a, item, tile, a.state, source);
  StateRows<float> rows = {tile.rows, tile.stride, tile.rows, tile.stride};
  for (int64_t token = 0; token < tokens.count; ++token) {
    item.token = tokens.first + token;
    read_group<float>(scratch.B, a.B, item, a.columns);
    read_group<float>(scratch.C, a.C, item, a.columns);
    step_item(a, item, rows, scratch, numbers);
    store_state(a, item, source, token, token + 1 == tokens.count, tile);
  }
}

void step_through_tiles(const StepArguments& a, int64_t first, int64_t last, void* memory) {
  Scratch scratch(memory, a.columns);
  Tile tile(static_cast<float*>(memory) + direct_scratch_floats(a.columns), a);
  RowNumbers numbers;
  for (int64_t number = first; number < last; ++number) step_tokens(a, item_of(a, number), scratch, tile, numbers);
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_TOKENS_H_
