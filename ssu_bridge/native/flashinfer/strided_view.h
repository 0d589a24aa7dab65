// A tensor's memory seen with other axes.
#ifndef SSU_BRIDGE_FLASHINFER_STRIDED_VIEW_H_
#define SSU_BRIDGE_FLASHINFER_STRIDED_VIEW_H_

#include <tvm/ffi/container/tensor.h>

namespace ssu_bridge {

struct Axis {
  int64_t size;
  // The elements along it are one and the same: its stride is 0.
  bool repeated;
};

// A DLTensor that owns its shape and strides. It stays where it is made, because the tensor points into it.
class StridedView {
 public:
  static constexpr int kMaxAxes = 6;

  StridedView() = default;
  StridedView(const StridedView&) = delete;
  StridedView& operator=(const StridedView&) = delete;

  // The first `outer` axes of `source` as they are, but dense where they have one entry; then the trailing `inner`
  // axes, dense but for those that repeat.
  DLTensor* view(const DLTensor& source, int outer, const Axis* inner, int inner_count);

  // What was made last, with one more axis of one entry in front.
  DLTensor* with_leading_axis();
  DLTensor* tensor() { return &tensor_; }

  // One element, of `dtype`.
  DLTensor* view_as_one(const DLTensor& source, DLDataType dtype);

  // No memory, of the dtype and on the device of `like`.
  DLTensor* null(const DLTensor& like, const Axis* axes, int count);

 private:
  DLTensor tensor_{};
  int64_t shape_[kMaxAxes] = {};
  int64_t strides_[kMaxAxes] = {};
};

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_FLASHINFER_STRIDED_VIEW_H_
