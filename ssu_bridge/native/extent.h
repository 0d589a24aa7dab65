// The memory that a tensor lies in.
#ifndef SSU_BRIDGE_EXTENT_H_
#define SSU_BRIDGE_EXTENT_H_

#include <tvm/ffi/container/tensor.h>

namespace ssu_bridge {

// The bytes from the first to the last element of a tensor; none for one without elements.
struct Extent {
  int64_t begin = 0, end = 0;

  bool meets(const Extent& other) const { return begin < other.end && other.begin < end; }
};

inline Extent extent_of(const DLTensor& tensor) {
  int64_t first = 0, last = 0, dense = 1;
  for (int axis = tensor.ndim - 1; axis >= 0; --axis) {
    int64_t size = tensor.shape[axis];
    if (size == 0) return {};
    int64_t reach = (size - 1) * (tensor.strides ? tensor.strides[axis] : dense);
    (reach < 0 ? first : last) += reach;
    dense *= size;
  }
  int64_t address = static_cast<int64_t>(reinterpret_cast<uint64_t>(tensor.data) + tensor.byte_offset);
  int64_t bytes = (tensor.dtype.bits + 7) / 8;
  return {address + first * bytes, address + (last + 1) * bytes};
}

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_EXTENT_H_
