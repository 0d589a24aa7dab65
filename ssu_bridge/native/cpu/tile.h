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

// The rows of an item where they are stored.
struct StoredRows {
  void* values;
  float* scales;
};

// The tiles of an item: that of the state that a sequence starts from and, of a tree, one more for each token, after it
// in memory.
struct Tiles {
  uint32_t* words;
  float* rows;
  int64_t stride, size;
  StoredRows rounded;  // the rows of an item as they are stored, where they are rounded after each token

  Tiles(float* memory, const StepArguments& a)
      : words(reinterpret_cast<uint32_t*>(memory)), stride(padded(a.columns)), size(stride * a.rows_per_item) {
    float* next = memory + random_scratch_words(a.columns);
    if (a.rounds_each_token) {
      rounded = {next, next + size};
      next += size + padded(a.rows_per_item);
    }
    rows = next;
  }

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

inline StoredRows stored_rows(const StepArguments& a, const Item& item, const StateStorage& storage, int64_t entry,
                              int64_t step) {
  int64_t row_of_entry = (step * a.heads + item.head) * a.rows + item.row;
  int64_t bytes = (entry * storage.stride + row_of_entry * a.columns) * size_of(storage.type);
  return {static_cast<char*>(storage.data) + bytes,
          storage.scales ? storage.scales + entry * storage.scale_stride + row_of_entry : nullptr};
}

// The first of the elements of an item's rows, of all that a storage has.
inline uint64_t first_element(const StepArguments& a, const Item& item, int64_t entry) {
  int64_t row = item.head * a.rows + item.row;
  uint64_t rows_before = static_cast<uint64_t>(entry) * static_cast<uint64_t>(a.heads * a.rows);
  return (rows_before + static_cast<uint64_t>(row)) * static_cast<uint64_t>(a.columns);
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

inline void load_tile(const StepArguments& a, const Item& item, const Tile& tile, ElementType type,
                      const StoredRows& from) {
  with_element(type, [&](auto element) {
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

// Stores a tile. `number` is that of its first element, which random words go by.
inline void store_tile(const StepArguments& a, const Item& item, const Tile& tile, ElementType type,
                       const StoredRows& to, uint64_t number, RandomPlace place) {
  // In one piece, which is faster where the target is not cached.
  if (type == ElementType::kFloat32 && tile.stride == a.columns) {
    memcpy(to.values, tile.rows, static_cast<size_t>(item.rows * a.columns) * sizeof(float));
    return;
  }
  RandomWords random(tile.words, a.random, place);
  with_element(type, [&](auto element) {
    using Element = decltype(element);
    Element* values = static_cast<Element*>(to.values);
    for (int64_t r = 0; r < item.rows; ++r, values += a.columns, number += static_cast<uint64_t>(a.columns)) {
      const uint32_t* words = a.random.is_used ? random.of(number, a.columns) : nullptr;
      if constexpr (kIsQuantised<Element>)
        write_quantised(values, to.scales + r, tile.row(r), a.columns, words);
      else
        write_float(values, tile.row(r), a.columns, words);
    }
  });
}

// Copies between a tile whose rows are held as they are stored, and where they are stored.
template <class State>
inline void copy_to_tile(const StepArguments& a, const Item& item, const StoredRows& from, const Tile& tile) {
  State* to = reinterpret_cast<State*>(tile.rows);
  const State* values = static_cast<const State*>(from.values);
  for (int64_t r = 0; r < item.rows; ++r)
    memcpy(to + r * tile.stride, values + r * a.columns, static_cast<size_t>(a.columns) * sizeof(State));
}
template <class State>
inline void copy_from_tile(const StepArguments& a, const Item& item, const Tile& tile, const StoredRows& to) {
  const State* from = reinterpret_cast<const State*>(tile.rows);
  State* values = static_cast<State*>(to.values);
  for (int64_t r = 0; r < item.rows; ++r)
    memcpy(values + r * a.columns, from + r * tile.stride, static_cast<size_t>(a.columns) * sizeof(State));
}

inline void copy_rows(const StepArguments& a, const Item& item, ElementType type, const StoredRows& from,
                      const StoredRows& to) {
  memcpy(to.values, from.values, static_cast<size_t>(item.rows * a.columns * size_of(type)));
  if (is_quantised(type)) memcpy(to.scales, from.scales, static_cast<size_t>(item.rows) * sizeof(float));
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_TILE_H_
