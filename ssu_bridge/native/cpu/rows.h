// Rows of numbers between memory and float32 scratch.
#ifndef SSU_BRIDGE_CPU_ROWS_H_
#define SSU_BRIDGE_CPU_ROWS_H_

#include "cpu/simd.h"
#include "cpu/step_arguments.h"

namespace ssu_bridge {
namespace {

inline int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

template <class Element>
inline Vec first_everywhere(const Element* from) {
  float lanes[kLanes];
  store(lanes, canonical(load(from, 1)));
  return splat(lanes[0]);
}

// Reads `count` elements, `stride` apart. Writes whole vectors; what lies past `count` is zero or a copy (stride 0).
template <class Element>
inline void read_as(float* to, const Element* from, int64_t count, int64_t stride) {
  if (stride == 1 || count == 1) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, canonical(load(from + i)));
    if (i < count) store(to + i, canonical(load(from + i, count - i)));
  } else if (stride == 0) {
    Vec value = first_everywhere(from);
    for (int64_t i = 0; i < count; i += kLanes) store(to + i, value);
  } else {
    for (int64_t i = 0; i < whole_vectors(count); ++i) to[i] = 0.0f;
    for (int64_t i = 0; i < count; ++i) store(to + i, canonical(load(from + i * stride, 1)), 1);
  }
}

inline void read(float* to, const Operand& from, int64_t offset, int64_t count, int64_t stride) {
  switch (from.type) {
    case ElementType::kBFloat16:
      return read_as(to, static_cast<const BFloat16*>(from.data) + offset, count, stride);
    case ElementType::kFloat16:
      return read_as(to, static_cast<const Float16*>(from.data) + offset, count, stride);
    default:
      return read_as(to, static_cast<const float*>(from.data) + offset, count, stride);
  }
}

template <class Element>
inline void write_as(Element* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, canonical(load(from + i)));
  if (i < count) store(to + i, canonical(load(from + i)), count - i);
}

inline void write(void* to, ElementType type, int64_t offset, const float* from, int64_t count) {
  switch (type) {
    case ElementType::kBFloat16:
      return write_as(static_cast<BFloat16*>(to) + offset, from, count);
    case ElementType::kFloat16:
      return write_as(static_cast<Float16*>(to) + offset, from, count);
    default:
      return write_as(static_cast<float*>(to) + offset, from, count);
  }
}

// Copies the first number of a row over the row.
inline void spread(float* row, int64_t count) {
  Vec value = splat(row[0]);
  for (int64_t i = 0; i < count; i += kLanes) store(row + i, value);
}

}  // namespace
}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_ROWS_H_
