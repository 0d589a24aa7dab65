// Philox-4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random words that depend on a
// key and a counter alone.
#ifndef SSU_BRIDGE_CPU_PHILOX_H_
#define SSU_BRIDGE_CPU_PHILOX_H_

#include <string.h>

#include "cpu/simd.h"
#include "cpu/step_arguments.h"

namespace ssu_bridge {
namespace {

enum StorageKind : uint32_t { kSlot = 0, kIntermediate = 1 };

// The words of the counter besides the number of the block.
struct RandomPlace {
  uint32_t token;  // of its sequence
  uint32_t kind;
};

// Each lane of 64 bits works on one block; only the lower half of it counts. Several vectors hide the time that a
// product takes.
constexpr int64_t kBlockLanes = kLanes / 2;
constexpr int kBlockVectors = 4;
constexpr int64_t kBlocksAtOnce = kBlockLanes * kBlockVectors;
static_assert(kRandomBatch % (4 * kBlocksAtOnce) == 0, "a batch is drawn in whole calls");

// The blocks of the even lanes are the first half of a vector's, so that two vectors of pairs interleave lane by lane.
inline Longs block_numbers(uint64_t first) {
  uint64_t numbers[kBlockLanes];
  for (int64_t i = 0; i < kBlockLanes; ++i) numbers[i] = static_cast<uint64_t>(i / 2 + i % 2 * (kBlockLanes / 2));
  Longs lanes;
  memcpy(&lanes, numbers, sizeof lanes);
  return lanes + first;
}

inline Longs pairs(Longs low, Longs high) { return (low & 0xffffffffu) | high << 32; }

// The words of the blocks first..first+kBlocksAtOnce-1, one block after the other.
inline void random_blocks(uint32_t* to, const RandomStream& stream, uint64_t first, RandomPlace place) {
  Longs c0[kBlockVectors], c1[kBlockVectors], c2[kBlockVectors], c3[kBlockVectors];
  for (int v = 0; v < kBlockVectors; ++v) {
    c0[v] = block_numbers(first + static_cast<uint64_t>(v * kBlockLanes));
    c1[v] = c0[v] >> 32;
    c2[v] = Longs{} + place.token;
    c3[v] = Longs{} + place.kind;
  }
  uint32_t k0 = stream.key[0], k1 = stream.key[1];
  for (int round = 0; round < stream.rounds; ++round) {
    for (int v = 0; v < kBlockVectors; ++v) {
      Longs p = multiply_low_halves(c0[v], Longs{} + 0xD2511F53u);
      Longs q = multiply_low_halves(c2[v], Longs{} + 0xCD9E8D57u);
      c0[v] = (q >> 32) ^ c1[v] ^ k0;
      c1[v] = q;
      c2[v] = (p >> 32) ^ c3[v] ^ k1;
      c3[v] = p;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int v = 0; v < kBlockVectors; ++v, to += 4 * kBlockLanes) {
    Longs front = pairs(c0[v], c1[v]), back = pairs(c2[v], c3[v]);
    Longs even = interleaved_even(front, back), odd = interleaved_odd(front, back);
    memcpy(to, &even, sizeof even);
    memcpy(to + kLanes, &odd, sizeof odd);
  }
}

// The words of one state as it is stored, drawn a batch ahead.
class RandomWords {
 public:
  // `memory` has random_scratch_words(columns) words.
  RandomWords(uint32_t* memory, const RandomStream& stream, RandomPlace place)
      : memory_(memory), stream_(stream), place_(place) {}

  // The words of the elements first..first+count-1, count <= columns, one for each.
  const uint32_t* of(uint64_t first, int64_t count) {
    uint64_t end = first + static_cast<uint64_t>(count);
    if (first < begin_ || end > end_) draw(first / 4 * 4, end);
    return memory_ + (first - begin_);
  }

 private:
  void draw(uint64_t begin, uint64_t end) {
    begin_ = end_ = begin;
    while (end_ < end || end_ < begin + kRandomBatch) {
      random_blocks(memory_ + (end_ - begin), stream_, end_ / 4, place_);
      end_ += 4 * kBlocksAtOnce;
    }
  }

  uint32_t* memory_;
  const RandomStream& stream_;
  RandomPlace place_;
  uint64_t begin_ = 0, end_ = 0;
};

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_PHILOX_H_
