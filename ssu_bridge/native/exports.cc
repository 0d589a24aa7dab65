// What the shared library offers to Python: the exports, nothing else.
#include <tvm/ffi/tvm_ffi.h>

#include <cstring>

#include "borrowed_tensor.h"
#include "cpu/instruction_sets.h"
#include "cpu/kernel.h"
#include "cpu/thread_pool.h"
#include "cuda/cubin_kernel.h"
#include "cuda/recorded_events.h"
#include "flashinfer/adapter.h"
#include "torch/signature_cache.h"

namespace {

namespace ffi = tvm::ffi;

ffi::String cpu_isa() { return ssu_bridge::runnable_variants().front().name; }

ffi::Array<ffi::String> cpu_isas() {
  ffi::Array<ffi::String> names;
  for (const ssu_bridge::CpuVariant& variant : ssu_bridge::runnable_variants()) names.push_back(variant.name);
  return names;
}

// A kernel over a tensor of the host and a result of the same size that has its memory; if it has not, it is a copy.
ffi::Function same_memory() {
  return ffi::Function::FromPacked([](ffi::PackedArgs tensors, ffi::Any*) {
    const auto* given = tensors[0].cast<DLTensor*>();
    const auto* result = tensors[1].cast<DLTensor*>();
    if (result->data != given->data) std::memcpy(result->data, given->data, ffi::GetDataSize(*given));
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_kernel, ssu_bridge::make_cpu_kernel)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_check, ssu_bridge::make_cpu_check)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(compiled_check, ssu_bridge::make_compiled_check)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_isa, cpu_isa)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_isas, cpu_isas)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_num_threads, ssu_bridge::thread_count)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(same_memory, same_memory)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(view, ssu_bridge::borrowed_tensor)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(at_addresses, ssu_bridge::make_at_addresses)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(signature_cache, ssu_bridge::make_signature_cache)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cubin_kernel, ssu_bridge::make_cubin_kernel)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cubin_arguments, ssu_bridge::cubin_arguments)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(flashinfer_kernel, ssu_bridge::make_flashinfer_kernel)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(record_work, ssu_bridge::record_work)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(waiting_kernel, ssu_bridge::make_waiting_kernel)
