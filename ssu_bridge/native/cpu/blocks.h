// Blocks: what the step takes from a row of state at a time.
//
// A block is one vector of consecutive columns, or, for BFloat16, a pair of vectors: the even columns and the odd ones,
// since that order needs no shuffles. A row is cut into widest blocks and what is left over, which is one vector if it
// fits into one. B and C are brought into the same order beforehand, rows of A as they are loaded.
#ifndef SSU_BRIDGE_CPU_BLOCKS_H_
#define SSU_BRIDGE_CPU_BLOCKS_H_

#include "cpu/simd.h"
#include "cpu/step_arguments.h"

namespace ssu_bridge {
namespace {

template <class State>
constexpr int kWidestBlock = 1;
template <>
constexpr int kWidestBlock<BFloat16> = 2;

template <int kVectors>
struct Block {
  Vec vectors[kVectors];
};

// The first `count` columns of a block when kPartial, else all.
template <int kVectors, bool kPartial, class State>
inline Block<kVectors> load_block(const State* from, int64_t count) {
  if constexpr (kVectors == 1) {
    return {{kPartial ? load(from, count) : load(from)}};
  } else {
    Pair pair = kPartial ? load_pair(from, count) : load_pair(from);
    return {{pair.even, pair.odd}};
  }
}

template <int kVectors, bool kPartial, class State>
inline void store_block(State* to, const Block<kVectors>& block, int64_t count) {
  if constexpr (kVectors == 1) {
    kPartial ? store(to, block.vectors[0], count) : store(to, block.vectors[0]);
  } else {
    Pair pair = {block.vectors[0], block.vectors[1]};
    kPartial ? store_pair(to, pair, count) : store_pair(to, pair);
  }
}

// Sets to zero what lies past the first `count` columns.
template <int kVectors>
inline void keep_columns(Block<kVectors>& block, int64_t count) {
  for (int i = 0; i < kVectors; ++i) block.vectors[i] = keep(block.vectors[i], (count + kVectors - 1 - i) / kVectors);
}

// float32 numbers of a row of A, in the order of the state's block. A partial pair has more than one vector of columns.
template <int kVectors, bool kPartial>
inline Block<kVectors> load_ordered(const float* from, int64_t count) {
  if constexpr (kVectors == 1) {
    return load_block<1, kPartial>(from, count);
  } else {
    Vec high = kPartial ? load(from + kLanes, count - kLanes) : load(from + kLanes);
    Pair pair = deinterleave(load(from), high);
    return {{pair.even, pair.odd}};
  }
}

// Brings a padded row of scratch into the order of the state's blocks.
template <class State>
inline void order_row(float* row, int64_t columns) {
  if constexpr (kWidestBlock<State> == 2) {
    for (int64_t n = 0; n + kLanes < columns; n += 2 * kLanes) {
      Pair pair = deinterleave(load(row + n), load(row + n + kLanes));
      store(row + n, pair.even);
      store(row + n + kLanes, pair.odd);
    }
  }
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_BLOCKS_H_
