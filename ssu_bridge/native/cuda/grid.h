// How many blocks the launch of a kernel has.
#ifndef SSU_BRIDGE_CUDA_GRID_H_
#define SSU_BRIDGE_CUDA_GRID_H_

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/array.h>

namespace ssu_bridge {

// `programs` blocks for each sequence, of which there are as many as entries of a tensor's first axis but `less`; and,
// if `most` is not 0, for each segment but the last one of a sequence: at most `most`, of at least `least` tokens, of
// which the axis of `tokens` tells the number: of each sequence, or, if it is the first, of all of them packed.
struct Grid {
  int64_t programs;
  int64_t tensor;
  int64_t less;
  int64_t whole = 1;  // 0: none for the sequences themselves
  int64_t most = 0;
  int64_t least = 1;
  int64_t tokens = 0;
  int64_t axis = 0;

  // Raises ValueError if one launch cannot have so many.
  unsigned blocks(const DLTensor* const* tensors) const;
};

// From (programs, tensor, less), with or without the rest. Raises ValueError for one that makes no sense with so many
// tensors.
Grid parse_grid(const tvm::ffi::Array<int64_t>& row, int64_t tensors);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CUDA_GRID_H_
