// A tile: the rows of an item in float32, between their storage and the steps of their tokens.
#ifndef SSU_BRIDGE_CPU_TILE_H_
#define SSU_BRIDGE_CPU_TILE_H_

#include "cpu/item.h"
#include "cpu/philox.h"
#include "cpu/quantise.h"
#include "cpu/rounding.h"
#include "cpu/rows.h"
#include "cpu/step_arguments.h"

namespace ssu_bridge {
namespace {

struct Tile {
  float* rows;  // they end in zeros, up to a whole vector
  int64_t stride;
  uint32_t* words;  // random_scratch_words(columns) of them

  float* row(int64_t r) const { return rows + r * stride; }
};

// The tiles of an item: that of the state that a sequence starts from and, of a tree, one more for each token, after it
// in memory.
struct Tiles {
  uint32_t* words;
  float* rows;
  int64_t stride, size;

  Tiles(float* memory, const StepArguments& a)
      : words(reinterpret_cast<uint32_t*>(memory)),
        rows(memory + random_scratch_words(a.columns)),
        stride(padded(a.columns)),
        size(padded(a.columns) * a.rows_per_item) {}

  Tile first() const { return {rows, stride, words}; }
  // Of the state after a token of a tree; for kNone the first.
  Tile after(int64_t token) const { return {rows + (token + 1) * size, stride, words}; }
};

// Puts the zeros where the rows of a tile end.
inline void end_rows(const StepArguments& a, const Item& item, const Tile& tile) {
  if (tile.stride == a.columns) return;
  size_t bytes = static_cast<size_t>(tile.stride - a.columns) * sizeof(float);
  for (int64_t r = 0; r < item.rows; ++r) memset(tile.row(r) + a.columns, 0, bytes);
}

// The rows of an item where they are stored.
struct StoredRows {
  void* values;
  float* scales;
  uint64_t number;  // of their first element, which random words go by
};

inline StoredRows stored_rows(const StepArguments& a, const Item& item, const StateStorage& storage, int64_t entry,
                              int64_t step) {
  int64_t rows_in_all = a.heads * a.rows;
  int64_t row = item.head * a.rows + item.row;
  int64_t row_of_entry = step * rows_in_all + row;
  int64_t bytes = (entry * storage.stride + row_of_entry * a.columns) * size_of(storage.type);
  uint64_t row_number = static_cast<uint64_t>(entry) * static_cast<uint64_t>(rows_in_all) + static_cast<uint64_t>(row);
  return {static_cast<char*>(storage.data) + bytes,
          storage.scales ? storage.scales + entry * storage.scale_stride + row_of_entry : nullptr,
          row_number * static_cast<uint64_t>(a.columns)};
}

// Calls `function` with an element of the type.
template <class Function>
inline void with_element(ElementType type, Function function) {
  switch (type) {
    case ElementType::kFloat32:
      return function(float());
    case ElementType::kBFloat16:
      return function(BFloat16());
    case ElementType::kFloat16:
      return function(Float16());
    case ElementType::kInt16:
      return function(int16_t());
    case ElementType::kInt8:
      return function(int8_t());
    case ElementType::kFloat8:
      return function(Float8());
  }
}

template <class Element>
inline void prefetch(const Element* from, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(Element);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i);
}

inline void load_tile(const StepArguments& a, const Item& item, const Tile& tile, const StateStorage& storage,
                      int64_t entry) {
  StoredRows from = stored_rows(a, item, storage, entry, 0);
  with_element(storage.type, [&](auto element) {
    using Element = decltype(element);
    const Element* values = static_cast<const Element*>(from.values);
    for (int64_t r = 0; r < item.rows; ++r, values += a.columns) {
      prefetch(values + kPrefetchBytes / sizeof(Element), a.columns);
      if constexpr (kIsQuantised<Element>)
        read_quantised(tile.row(r), values, from.scales[r], a.columns);
      else
        read_as(tile.row(r), values, a.columns, 1);
    }
  });
}

// Stores the state after a token, whose number in the sequence random words go by as well.
inline void store_tile(const StepArguments& a, const Item& item, const Tile& tile, const StateStorage& storage,
                       int64_t entry, int64_t step, int64_t token, StorageKind kind) {
  StoredRows to = stored_rows(a, item, storage, entry, step);
  RandomWords random(tile.words, a.random, {static_cast<uint32_t>(token), kind});
  with_element(storage.type, [&](auto element) {
    using Element = decltype(element);
    Element* values = static_cast<Element*>(to.values);
    uint64_t number = to.number;
    for (int64_t r = 0; r < item.rows; ++r, values += a.columns, number += static_cast<uint64_t>(a.columns)) {
      const uint32_t* words = a.random.is_used ? random.of(number, a.columns) : nullptr;
      if constexpr (kIsQuantised<Element>)
        write_quantised(values, to.scales + r, tile.row(r), a.columns, words);
      else
        write_float(values, tile.row(r), a.columns, words);
    }
  });
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_TILE_H_
