// The step from a checkpoint: outputs from its rows as they are stored and from the tokens since, which lie in rings.
//
// With S_0 the rows of the checkpoint, and for each token k since, the new ones included, d_k its time step and a_k = A
// d_k, token i gives
//   y_i = exp(a_1 + ... + a_i) S_0 C_i + sum over k <= i of exp(a_{k+1} + ... + a_i) d_k (B_k C_i) x_k.
// So a token reads the rows and writes none. Where a window is full, a flush puts the pending tokens into the
// checkpoint.
//
// No two items write the same element, nor one that another reads: what is new goes to rows of the rings that are not
// pending, and nobody reads it from there in the same call.
#ifndef SSU_BRIDGE_CPU_REPLAY_H_
#define SSU_BRIDGE_CPU_REPLAY_H_

#include <string.h>

#include "cpu/item.h"
#include "cpu/quantise.h"
#include "cpu/step_arguments.h"
#include "cpu/tables.h"
#include "cpu/tile.h"

namespace ssu_bridge {
namespace {

// Tokens are counted from the first that is pending; their rows are in float32 and end in zeros, up to a whole vector.
struct ReplayScratch {
  int64_t row_size, x_size, numbers_size;
  float *B, *C;     // of the group; C of the new tokens
  float* products;  // B_k C_i, a row for each new token
  float* x;         // of the item
  float* d;
  float* a;
  float* weights;    // of the x of each token
  float* exponents;  // of each token, and at their end of the checkpoint
  Tile tile;

  ReplayScratch(void* memory, const StepArguments& a)
      : row_size(padded(a.columns)),
        x_size(padded(a.rows_per_item)),
        numbers_size(padded(most_replayed(a) + kMaxRowGroup)) {
    int64_t tokens = most_replayed(a);
    float* next = static_cast<float*>(memory);
    auto take = [&next](int64_t floats) { return (next += floats) - floats; };
    B = take(tokens * row_size);
    C = take(a.longest * row_size);
    x = take(tokens * x_size);
    products = take(a.longest * numbers_size);
    d = take(numbers_size);
    this->a = take(numbers_size);
    weights = take(numbers_size);
    exponents = take(numbers_size);
    float* rows = take(kReplayTileRows * row_size);
    tile = {rows, row_size, reinterpret_cast<uint32_t*>(next)};
  }
};

// The tokens of a sequence: those that are pending in its slot, and the new ones.
struct Replayed {
  Phase phase;
  TokenRange fresh;

  int64_t count() const { return phase.pending + fresh.count; }
};

// A row of a ring for each pending token, then a row of the operand for each new one.
template <class ReadFresh>
inline void read_tokens(const StepArguments& a, const Replayed& tokens, const Operand& ring, int64_t offset, float* to,
                        int64_t size, int64_t count, ReadFresh read_fresh) {
  offset += tokens.phase.slot * ring.batch_stride;
  for (int64_t k = 0; k < tokens.phase.pending; ++k, to += size)
    read(to, ring, offset + ring_row(a, tokens.phase, k) * ring.token_stride, count, 1);
  for (int64_t i = 0; i < tokens.fresh.count; ++i, to += size) read_fresh(to, tokens.fresh.first + i);
}

// The columns n..n+count-1 of kRows rows, which are a block, or less when kPartial.
template <int kVectors, bool kPartial, int kRows, class State>
SSU_BRIDGE_INLINE void multiply_block(const State* rows, int64_t stride, const float* C, Vec (&sums)[kRowGroup],
                                      int64_t count) {
  for (int r = 0; r < kRows; ++r) {
    const State* from = rows + r * stride;
    __builtin_prefetch(from + kPrefetchBytes / sizeof(State));
    Block<kVectors> s;
    if constexpr (kIsQuantised<State>)
      s = {{kPartial ? load_quantised(from, count) : load_quantised(from)}};
    else
      s = load_block<kVectors, kPartial>(from, count);
    for (int i = 0; i < kVectors; ++i) sums[r] = fma(s.vectors[i], load(C + i * kLanes), sums[r]);
  }
}

// The products of kRows rows with C, in the order of the blocks of State. Writes kRowGroup numbers.
template <int kRows, class State>
SSU_BRIDGE_INLINE void multiply_rows(const State* rows, int64_t stride, const float* C, int64_t columns, float* to) {
  Vec sums[kRowGroup];
  for (int r = 0; r < kRowGroup; ++r) sums[r] = splat(0.0f);
  constexpr int kWidest = kWidestBlock<State>;
  constexpr int64_t kWidth = kWidest * kLanes;
  int64_t n = 0;
  for (; n + kWidth <= columns; n += kWidth)
    multiply_block<kWidest, false, kRows>(rows + n, stride, C + n, sums, kWidth);
  int64_t left = columns - n;
  if (kWidest > 1 && left > kLanes)
    multiply_block<kWidest, true, kRows>(rows + n, stride, C + n, sums, left);
  else if (kWidest > 1 && left == kLanes)
    multiply_block<1, false, kRows>(rows + n, stride, C + n, sums, left);
  else if (left > 0)
    multiply_block<1, true, kRows>(rows + n, stride, C + n, sums, left);
  store_sums(sums, to);
}

// The same of any number of rows; may write kRowGroup numbers more.
template <class State>
SSU_BRIDGE_INLINE void multiply(const State* rows, int64_t stride, int64_t count, const float* C, int64_t columns,
                                float* to) {
  int64_t r = 0;
  for (; r + kRowGroup <= count; r += kRowGroup)
    multiply_rows<kRowGroup>(rows + r * stride, stride, C, columns, to + r);
  for (; r < count; ++r) multiply_rows<1>(rows + r * stride, stride, C, columns, to + r);
}

// B and C of a group and their products, for the heads of it that follow.
template <class State>
inline void read_replayed_group(const StepArguments& a, Item item, const Replayed& tokens,
                                const ReplayScratch& scratch) {
  const Operand& ring = a.replay.B;
  read_tokens(a, tokens, ring, item.group * ring.head_stride, scratch.B, scratch.row_size, a.columns,
              [&](float* to, int64_t token) {
                item.token = token;
                read_group<float>(to, a.B, item, a.columns);
              });
  for (int64_t i = 0; i < tokens.fresh.count; ++i) {
    float* C = scratch.C + i * scratch.row_size;
    item.token = tokens.fresh.first + i;
    read_group<float>(C, a.C, item, a.columns);
    multiply(scratch.B, scratch.row_size, tokens.phase.pending + i + 1, C, a.columns,
             scratch.products + i * scratch.numbers_size);
    order_row<State>(C, a.columns);
  }
}

// x of the item's rows, time steps and a.
inline void read_replayed_item(const StepArguments& a, Item item, const Replayed& tokens, const ReplayScratch& scratch,
                               RowNumbers& numbers) {
  const Operand &x = a.replay.x, &dt = a.replay.dt;
  read_tokens(a, tokens, x, item.head * x.head_stride + item.row, scratch.x, scratch.x_size, item.rows,
              [&](float* to, int64_t token) {
                item.token = token;
                read_rows(to, a.x, item, item.rows);
              });
  int64_t offset = tokens.phase.slot * dt.batch_stride + item.head * dt.head_stride;
  for (int64_t k = 0; k < tokens.phase.pending; ++k)
    scratch.d[k] = static_cast<const float*>(dt.data)[offset + ring_row(a, tokens.phase, k)];
  for (int64_t i = 0; i < tokens.fresh.count; ++i) {
    item.token = tokens.fresh.first + i;
    read_steps(a, item, 1, numbers);
    scratch.d[tokens.phase.pending + i] = numbers.d[0];
  }
  read_rows(numbers.other, a.A, item, 1);
  for (int64_t k = 0; k < tokens.count(); ++k) scratch.a[k] = numbers.other[0] * scratch.d[k];
}

// What has decayed to less than the normal numbers counts as nothing: processors compute with subnormal ones a hundred
// times slower, and after a window of tokens there are many.
inline Vec without_subnormals(Vec a) {
  return float_of(choose(magnitude_of(a) < bits_of(splat(0x1p-126f)), splat_bits(0), bits_of(a)));
}
inline Vec decay_of(Vec exponent) {
  Vec least = splat(-87.33654f);  // log(2^-126)
  return select_greater(least, exponent, splat(0.0f), exponential(max(least, exponent)));
}

// What is left of the first `count` tokens after the last of them: d_k exp(a_{k+1} + ...), as weights. Returns what is
// left of the checkpoint.
inline float weigh(const ReplayScratch& scratch, int64_t count) {
  float sum = 0.0f;
  for (int64_t k = count - 1; k >= 0; --k) {
    scratch.exponents[k] = sum;
    sum += scratch.a[k];
  }
  scratch.exponents[count] = sum;
  for (int64_t k = 0; k <= count; k += kLanes) store(scratch.exponents + k, decay_of(load(scratch.exponents + k)));
  for (int64_t k = 0; k < count; k += kLanes)
    store(scratch.weights + k, mul(load(scratch.exponents + k), load(scratch.d + k)));
  return scratch.exponents[count];
}

// `y`, which are the products of the checkpoint's rows times its scales, becomes y of a new token.
inline void add_tokens(const Item& item, const ReplayScratch& scratch, const float* products, int64_t count, float left,
                       float* y) {
  for (int64_t k = 0; k < count; k += kLanes)
    store(scratch.weights + k, without_subnormals(mul(load(scratch.weights + k), load(products + k))));
  for (int64_t r = 0; r < item.rows; r += kLanes) {
    Vec sum = mul(splat(left), load(y + r));
    const float* x = scratch.x + r;
    for (int64_t k = 0; k < count; ++k, x += scratch.x_size) sum = fma(splat(scratch.weights[k]), load(x), sum);
    store(y + r, sum);
  }
}

// The products of a checkpoint's rows with C of a new token.
template <class State>
SSU_BRIDGE_INLINE void multiply_checkpoint(const StepArguments& a, const Item& item, const StoredRows& stored,
                                           const float* C, float* y) {
  multiply(static_cast<const State*>(stored.values), a.columns, item.rows, C, a.columns, y);
  if constexpr (kIsQuantised<State>)
    for (int64_t r = 0; r < item.rows; ++r) y[r] *= stored.scales[r];
}

// The columns n..n+count-1 of rows of the checkpoint, or of a tile, and what the pending tokens add to them: B times x,
// which has its weights already. The columns are whole vectors, or less than one when kPartial.
template <int kVectors, bool kPartial, int kRows, class Element>
SSU_BRIDGE_INLINE void advance_block(Element* rows, int64_t stride, const Replayed& tokens,
                                     const ReplayScratch& scratch, const float* x, float left, int64_t n,
                                     int64_t count) {
  Vec sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    const Element* from = rows + r * stride + n;
    for (int i = 0; i < kVectors; ++i) {
      Vec s = kPartial ? load(from, count) : load(from + i * kLanes);
      sums[r][i] = without_subnormals(mul(splat(left), s));
    }
  }
  const float* B = scratch.B + n;
  for (int64_t k = 0; k < tokens.phase.pending; ++k, B += scratch.row_size, x += scratch.x_size) {
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kVectors; ++i) sums[r][i] = fma(splat(x[r]), load(B + i * kLanes), sums[r][i]);
  }
  for (int r = 0; r < kRows; ++r) {
    Element* to = rows + r * stride + n;
    for (int i = 0; i < kVectors; ++i) {
      Vec s = canonical(sums[r][i]);
      kPartial ? store(to, s, count) : store(to + i * kLanes, s);
    }
  }
}

template <int kRows, class Element>
SSU_BRIDGE_INLINE void advance_rows(Element* rows, int64_t stride, const Replayed& tokens, const ReplayScratch& scratch,
                                    const float* x, float left, int64_t columns) {
  constexpr int kVectors = 2;  // as many as there are registers for
  int64_t n = 0;
  for (; n + kVectors * kLanes <= columns; n += kVectors * kLanes)
    advance_block<kVectors, false, kRows>(rows, stride, tokens, scratch, x, left, n, kVectors * kLanes);
  for (; n + kLanes <= columns; n += kLanes)
    advance_block<1, false, kRows>(rows, stride, tokens, scratch, x, left, n, kLanes);
  if (n < columns) advance_block<1, true, kRows>(rows, stride, tokens, scratch, x, left, n, columns - n);
}

// `x` is that of the first of the rows.
template <class Element>
inline void advance(Element* rows, int64_t stride, int64_t count, const Replayed& tokens, const ReplayScratch& scratch,
                    const float* x, float left, int64_t columns) {
  int64_t r = 0;
  for (; r + kRowGroup <= count; r += kRowGroup)
    advance_rows<kRowGroup>(rows + r * stride, stride, tokens, scratch, x + r, left, columns);
  for (; r < count; ++r) advance_rows<1>(rows + r * stride, stride, tokens, scratch, x + r, left, columns);
}

// The same through tiles of float32, for rows that are quantised or rounded by random words.
inline void advance_through_tiles(const StepArguments& a, Item item, const Replayed& tokens,
                                  const ReplayScratch& scratch, float left) {
  const float* x = scratch.x;
  for (int64_t end = item.row + item.rows; item.row < end; item.row += kReplayTileRows, x += kReplayTileRows) {
    item.rows = end - item.row < kReplayTileRows ? end - item.row : kReplayTileRows;
    const Tile& tile = scratch.tile;
    StoredRows stored = stored_rows(a, item, a.state, tokens.phase.slot, 0);
    load_tile(a, item, tile, a.state.type, stored);
    advance(tile.rows, tile.stride, item.rows, tokens, scratch, x, left, whole_vectors(a.columns));
    end_rows(a, item, tile);
    store_tile(a, item, tile, a.state.type, stored, first_element(a, item, tokens.phase.slot), {0, kSlot});
  }
}

// Puts the pending tokens into the item's rows of the checkpoint.
template <class State>
inline void flush(const StepArguments& a, const Item& item, const StoredRows& stored, const Replayed& tokens,
                  const ReplayScratch& scratch) {
  float left = weigh(scratch, tokens.phase.pending);
  float* x = scratch.x;
  for (int64_t k = 0; k < tokens.phase.pending; ++k, x += scratch.x_size) {
    Vec weight = splat(scratch.weights[k]);
    for (int64_t r = 0; r < item.rows; r += kLanes) store(x + r, without_subnormals(mul(weight, load(x + r))));
  }
  if constexpr (!kIsQuantised<State>) {
    if (!a.random.is_used)
      return advance(static_cast<State*>(stored.values), a.columns, item.rows, tokens, scratch, scratch.x, left,
                     a.columns);
  }
  advance_through_tiles(a, item, tokens, scratch, left);
}

// Copies what lies densely.
inline void copy_to_ring(const Operand& ring, int64_t ring_offset, const Operand& from, int64_t offset, int64_t count) {
  int64_t size = size_of(ring.type);
  memcpy(static_cast<char*>(ring.data) + ring_offset * size, static_cast<const char*>(from.data) + offset * size,
         static_cast<size_t>(count * size));
}

// Puts the new tokens into the rings: x of the item's rows, and by one item each what heads and groups share.
inline void store_tokens(const StepArguments& a, Item item, const Replayed& tokens, const ReplayScratch& scratch) {
  const Operand &x = a.replay.x, &B = a.replay.B, &dt = a.replay.dt;
  bool is_first_of_group = item.row == 0 && item.head % a.heads_per_group == 0;
  for (int64_t i = 0; i < tokens.fresh.count; ++i) {
    item.token = tokens.fresh.first + i;
    int64_t row = ring_row(a, tokens.phase, tokens.phase.pending + i), slot = tokens.phase.slot;
    copy_to_ring(x, slot * x.batch_stride + item.head * x.head_stride + row * x.token_stride + item.row, a.x,
                 offset_of(a.x, item) + item.head * a.x.head_stride + item.row, item.rows);
    if (item.row == 0)
      static_cast<float*>(dt.data)[slot * dt.batch_stride + item.head * dt.head_stride + row] =
          scratch.d[tokens.phase.pending + i];
    if (is_first_of_group)
      copy_to_ring(B, slot * B.batch_stride + item.group * B.head_stride + row * B.token_stride, a.B,
                   offset_of(a.B, item) + item.group * a.B.head_stride, a.columns);
  }
}

template <class State>
SSU_BRIDGE_INLINE void replay_item(const StepArguments& a, Item item, const Replayed& tokens,
                                   const ReplayScratch& scratch, RowNumbers& numbers) {
  bool has_slot = tokens.phase.slot != kNone;
  StoredRows stored = {};
  if (has_slot) stored = stored_rows(a, item, a.state, tokens.phase.slot, 0);
  read_replayed_item(a, item, tokens, scratch, numbers);
  if (has_slot) store_tokens(a, item, tokens, scratch);  // before the output is written, which may be where x is
  for (int64_t i = 0; i < tokens.fresh.count; ++i) {
    item.token = tokens.fresh.first + i;
    int64_t count = tokens.phase.pending + i + 1;
    float left = weigh(scratch, count);
    if (has_slot) {
      multiply_checkpoint<State>(a, item, stored, scratch.C + i * scratch.row_size, numbers.y);
    } else {
      left = 0.0f;
      memset(numbers.y, 0, sizeof numbers.y);
    }
    add_tokens(item, scratch, scratch.products + i * scratch.numbers_size, count, left, numbers.y);
    read_rows(numbers.x, a.x, item, item.rows);
    finish_rows(a, item, numbers);
  }
  if (has_slot && flushes(a, tokens.phase, tokens.fresh.count)) flush<State>(a, item, stored, tokens, scratch);
}

template <class State>
void replay_items(const StepArguments& a, int64_t first, int64_t last, const ReplayScratch& scratch) {
  RowNumbers numbers;
  int64_t loaded_sequence = -1, loaded_group = -1;
  for (int64_t number = first; number < last; ++number) {
    Item item = item_of(a, number);
    Replayed tokens = {phase_of(a, item.sequence), tokens_of(a, item.sequence)};
    if (tokens.fresh.count == 0) continue;
    if (item.sequence != loaded_sequence || item.group != loaded_group) {
      read_replayed_group<State>(a, item, tokens, scratch);
      loaded_sequence = item.sequence;
      loaded_group = item.group;
    }
    replay_item<State>(a, item, tokens, scratch, numbers);
  }
}

void step_with_replay(const StepArguments& a, int64_t first, int64_t last, void* memory) {
  ReplayScratch scratch(memory, a);
  with_element(a.state.type, [&](auto element) { replay_items<decltype(element)>(a, first, last, scratch); });
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_REPLAY_H_
