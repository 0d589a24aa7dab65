// Kernels by the signatures of the calls that they were loaded for.
#ifndef SSU_BRIDGE_TORCH_SIGNATURE_CACHE_H_
#define SSU_BRIDGE_TORCH_SIGNATURE_CACHE_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>

namespace ssu_bridge {

// Returns three functions over one cache:
//   run(*arguments) -> bool   launches the kernel that was added with arguments of the same signature; false if none
//   was. add(kernel, *arguments)   keeps a kernel for calls with the signature of these arguments.
//   knows(*arguments) -> bool   whether run would launch one.
// Arguments are DLTensors or None, the output first. Their signature: which are None, shapes, strides, dtypes, devices,
// of those on a GPU how far the address is from a multiple of `vector_bytes`, and which elements what is written shares
// with others. A kernel gets the arguments that are not None from the second on, then the output, then those at the
// places in `written` that are there. A call whose signature is known needs no other check of these. A cache of `limit`
// kernels forgets them all before it takes another.
tvm::ffi::Array<tvm::ffi::Function> make_signature_cache(tvm::ffi::Array<int64_t> written, int64_t limit,
                                                         int64_t vector_bytes);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_TORCH_SIGNATURE_CACHE_H_
