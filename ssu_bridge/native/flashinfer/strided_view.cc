#include "flashinfer/strided_view.h"

#include <tvm/ffi/error.h>

#include <algorithm>

namespace ssu_bridge {

DLTensor* StridedView::view(const DLTensor& source, int outer, const Axis* inner, int inner_count) {
  if (outer > source.ndim || outer + inner_count > kMaxAxes)
    TVM_FFI_THROW(ValueError) << "a tensor of " << source.ndim << " axes cannot be seen with " << outer
                              << " of them and " << inner_count << " others";
  tensor_ = source;
  tensor_.data = static_cast<char*>(source.data) + source.byte_offset;
  tensor_.byte_offset = 0;
  tensor_.ndim = outer + inner_count;
  tensor_.shape = shape_;
  tensor_.strides = strides_;
  int64_t step = 1;
  for (int i = inner_count - 1; i >= 0; --i) {
    shape_[outer + i] = inner[i].size;
    strides_[outer + i] = inner[i].repeated ? 0 : step;
    if (!inner[i].repeated) step *= inner[i].size;
  }
  for (int i = outer - 1; i >= 0; --i) {
    shape_[i] = source.shape[i];
    strides_[i] = source.strides && source.shape[i] > 1 ? source.strides[i] : step;
    step *= source.shape[i];
  }
  return &tensor_;
}

DLTensor* StridedView::with_leading_axis() {
  if (tensor_.ndim == kMaxAxes) TVM_FFI_THROW(ValueError) << "a tensor of " << kMaxAxes << " axes cannot get another";
  std::copy_backward(shape_, shape_ + tensor_.ndim, shape_ + tensor_.ndim + 1);
  std::copy_backward(strides_, strides_ + tensor_.ndim, strides_ + tensor_.ndim + 1);
  shape_[0] = 1;
  strides_[0] *= shape_[1];
  ++tensor_.ndim;
  return &tensor_;
}

DLTensor* StridedView::view_as_one(const DLTensor& source, DLDataType dtype) {
  const Axis one = {1, false};
  view(source, 0, &one, 1);
  tensor_.dtype = dtype;
  return &tensor_;
}

DLTensor* StridedView::null(const DLTensor& like, const Axis* axes, int count) {
  view(like, 0, axes, count);
  tensor_.data = nullptr;
  return &tensor_;
}

}  // namespace ssu_bridge
