// What one call of the CPU step works on, and the functions that work on it.
//
// This header is also included by the files that are compiled for a wider instruction set. It must stay free of the
// standard library's inline functions: the linker keeps one copy of each, and it might keep the one with AVX in it. Its
// own functions are static for the same reason.
#ifndef SSU_BRIDGE_CPU_STEP_ARGUMENTS_H_
#define SSU_BRIDGE_CPU_STEP_ARGUMENTS_H_

#include <stddef.h>
#include <stdint.h>

namespace ssu_bridge {

enum class ElementType : int32_t { kFloat32, kBFloat16, kFloat16, kInt16, kInt8, kFloat8 };

static inline int64_t size_of(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return 4;
    case ElementType::kInt8:
    case ElementType::kFloat8:
      return 1;
    default:
      return 2;
  }
}

static inline bool is_quantised(ElementType type) { return type >= ElementType::kInt16; }

// The types that no C++ type stands for, as they lie in memory. Float8 is float8_e4m3fn.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8 {
  uint8_t bits;
};

// An operand with one number for each token, row or column. Strides count elements; a tied or absent axis has stride 0.
// `data` is null for an absent operand.
struct Operand {
  void* data = nullptr;
  ElementType type = ElementType::kFloat32;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;  // of a group, for B and C
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

// Indices, a row for each sequence. `data` is null for an absent table.
struct IndexTable {
  const void* data = nullptr;
  int64_t stride = 0;
  int64_t column_stride = 0;
  int64_t columns = 1;
  bool is_64_bit = false;
  bool has_columns = false;  // one a token
};

// A flag for each sequence. `data` is null where they are absent.
struct FlagTable {
  const uint8_t* data = nullptr;
  int64_t stride = 0;
};

// The most tokens of a sequence that are a tree: MOST_TOKENS_OF_A_TREE in core/arguments.py.
constexpr int64_t kMaxTreeTokens = 64;

// States that a call may read and write: the slots, or the entries of the intermediate states, which hold a state for
// each of several steps. Steps, heads, rows and columns lie densely inside an entry, and so do the scales, one for each
// row.
struct StateStorage {
  void* data = nullptr;
  ElementType type = ElementType::kFloat32;
  int64_t entries = 0;
  int64_t steps = 1;
  int64_t stride = 0;
  float* scales = nullptr;  // of a quantised type
  int64_t scale_stride = 0;
};

// The last tokens of each slot, in rings of so many rows, and where in them those begin that its state lacks: the state
// is a checkpoint. A window of 0 stands for none of this.
struct Replay {
  Operand x, B, dt;  // the batch axis is that of the slots, the token axis that of the rows
  IndexTable start, pending;
  int64_t window = 0, length = 0;
  int64_t most_pending = 0;  // of the sequences of the call, as counted before it
};

// The numbers that stochastic rounding draws, named by the key and by what is rounded.
struct RandomStream {
  bool is_used = false;
  uint32_t key[2] = {0, 0};
  int rounds = 10;
};

// One call: sequences x tokens x heads x rows (headdim) x columns (dstate).
struct StepArguments {
  int64_t sequences = 0;
  int64_t tokens = 1;  // of each sequence, or, when there is sequence_starts, of all together
  int64_t heads = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t heads_per_group = 1;

  StateStorage state, intermediates;
  bool updates_state = true;
  RandomStream random;
  Replay replay;

  Operand x, dt, A, B, C, D, z, dt_bias, out;
  IndexTable read_slots, write_slots, accepted_tokens, sequence_starts, intermediate_entries;
  // The token whose state a token continues, a row for each sequence, or for each token when there is sequence_starts.
  IndexTable parents;
  FlagTable has_initial_state;
  int64_t intermediate_stride = 1;
  bool rounds_each_token = false;  // of several: the state is rounded to what it is stored in after each of them
  int64_t longest = INT64_MAX;     // the most tokens of a sequence
  int64_t pad_slot = -1;
  bool softplus = false;

  // One token a sequence and a float state that is rounded to nearest: it is stepped from slot to slot as it is loaded
  // and stored. Else, and without replay, the rows of an item are held in float32 over all of its tokens.
  bool is_direct = true;

  // A work item is a block of rows of one head of one sequence; items are numbered in that order.
  int64_t rows_per_item = 0;
  int64_t blocks_per_head = 0;
};

static inline bool replays(const StepArguments& a) { return a.replay.window > 0; }

// The most rows that an item may have: per-row numbers live on the stack.
constexpr int64_t kMaxRowsPerItem = 512;

// Computes items first..last-1. `scratch` has scratch_bytes(arguments) bytes at a multiple of 64, for this thread
// alone.
using StepFunction = void (*)(const StepArguments& arguments, int64_t first, int64_t last, void* scratch);

// The widest block of rows that any variant takes through the columns at once.
constexpr int64_t kMaxRowGroup = 8;

// Rows of scratch are padded, so that a vector may run over their end.
static inline int64_t padded(int64_t columns) { return (columns + 31) / 32 * 32; }

// B, C, a group of rows of A, a zero row to read and a row to throw away.
static inline int64_t direct_scratch_floats(int64_t columns) { return padded(columns) * (4 + kMaxRowGroup); }

// How many random words are drawn ahead at least, and how many words the buffer of a row holds: the row may begin
// inside a block of four, and the last batch may end after the row.
constexpr int64_t kRandomBatch = 128;
static inline int64_t random_scratch_words(int64_t columns) { return padded(columns) + 2 * kRandomBatch; }

// The rows of a checkpoint that are advanced at a time, through a tile.
constexpr int64_t kReplayTileRows = 16;

// How many tokens a head is computed from at most: those that are pending and the new ones.
static inline int64_t most_replayed(const StepArguments& a) { return a.replay.most_pending + a.longest; }

// Rows of B and C for a group, and of x for a head; the products of those of B with each of C; four numbers for each
// token; the tile, and random words for one of its rows. A group of rows is written at a time.
static inline int64_t replay_scratch_floats(const StepArguments& a) {
  int64_t tokens = most_replayed(a), numbers = padded(tokens + kMaxRowGroup);
  int64_t floats = (tokens + a.longest + kReplayTileRows) * padded(a.columns) + tokens * padded(a.rows_per_item);
  return floats + (a.longest + 4) * numbers + random_scratch_words(a.columns);
}

static inline size_t scratch_bytes(const StepArguments& a) {
  if (replays(a)) return static_cast<size_t>(replay_scratch_floats(a)) * sizeof(float);
  int64_t floats = direct_scratch_floats(a.columns);
  // The rows of the state, of a tree after each token too, once more as they are stored, and random words for one row.
  int64_t tiles = 1;
  if (a.parents.data) tiles += a.longest;
  if (a.rounds_each_token) floats += padded(a.columns) * a.rows_per_item + padded(a.rows_per_item);
  if (!a.is_direct) floats += tiles * padded(a.columns) * a.rows_per_item + random_scratch_words(a.columns);
  return static_cast<size_t>(floats) * sizeof(float);
}

void step_portable(const StepArguments& arguments, int64_t first, int64_t last, void* scratch);
void step_avx2(const StepArguments& arguments, int64_t first, int64_t last, void* scratch);
void step_avx512(const StepArguments& arguments, int64_t first, int64_t last, void* scratch);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_STEP_ARGUMENTS_H_
