#include "cuda/grid.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <limits>

namespace ssu_bridge {
namespace {

constexpr size_t kFewestNumbers = 3, kNumbers = 8;

int64_t length(const DLTensor& tensor, int64_t axis) { return axis < tensor.ndim ? tensor.shape[axis] : 0; }

// How many segments have blocks of their own, for so many sequences.
int64_t segments(const Grid& grid, int64_t sequences, int64_t tokens) {
  if (grid.axis > 0) return sequences * std::min(grid.most, tokens / grid.least);
  return std::min(sequences * grid.most, tokens / grid.least);
}

}  // namespace

unsigned Grid::blocks(const DLTensor* const* tensors) const {
  int64_t sequences = std::max<int64_t>(0, length(*tensors[tensor], 0) - less);
  int64_t split = most == 0 ? 0 : segments(*this, sequences, length(*tensors[tokens], axis));
  int64_t parts = whole * sequences + split;
  if (parts > std::numeric_limits<int32_t>::max() / programs)
    TVM_FFI_THROW(ValueError) << sequences << " sequences of " << programs << " blocks are too many for one launch";
  return static_cast<unsigned>(parts * programs);
}

Grid parse_grid(const tvm::ffi::Array<int64_t>& row, int64_t tensors) {
  bool sane = (row.size() == kFewestNumbers || row.size() == kNumbers) && row[0] >= 1 && row[1] >= 0 &&
              row[1] < tensors && row[2] >= 0;
  if (!sane) TVM_FFI_THROW(ValueError) << "grid: expected (programs, tensor, less), at least one program";
  if (row.size() == kFewestNumbers) return {row[0], row[1], row[2]};
  sane = (row[3] == 0 || row[3] == 1) && row[4] >= 0 && row[5] >= 1 && row[6] >= 0 && row[6] < tensors && row[7] >= 0;
  if (!sane)
    TVM_FFI_THROW(ValueError) << "grid: expected (..., whole, most, least, tokens, axis), segments of at least a token";
  return {row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7]};
}

}  // namespace ssu_bridge
