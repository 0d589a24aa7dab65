// The CUDA driver library, opened at run time: building this needs no CUDA, nor does a machine that never launches.
#ifndef SSU_BRIDGE_CUDA_DRIVER_H_
#define SSU_BRIDGE_CUDA_DRIVER_H_

#include <stddef.h>
#include <stdint.h>

namespace ssu_bridge {

// The driver's types, as its binary interface has them: handles are pointers, results and devices ints.
using CudaContext = struct CudaContextHandle*;
using CudaModule = struct CudaModuleHandle*;
using CudaFunction = struct CudaFunctionHandle*;
using CudaStream = void*;

struct CudaDriver {
  int (*init)(unsigned flags);
  int (*device_get)(int* device, int ordinal);
  int (*primary_context_retain)(CudaContext* context, int device);
  int (*context_get_current)(CudaContext* context);
  int (*context_push)(CudaContext context);
  int (*context_pop)(CudaContext* context);
  int (*exchange_capture_mode)(int* mode);
  int (*module_load)(CudaModule* module, const void* image);
  int (*module_get_function)(CudaFunction* function, CudaModule module, const char* name);
  int (*function_set_attribute)(CudaFunction function, int attribute, int value);
  int (*launch)(CudaFunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                unsigned block_y, unsigned block_z, unsigned shared_bytes, CudaStream stream, void** arguments,
                void** extra);
  int (*error_name)(int error, const char** name);
  int (*error_text)(int error, const char** text);

  // Raises RuntimeError with the error's name and text unless `result` is success. `what` says what was tried.
  void check(int result, const char* what) const;
};

// The driver, opened and initialised at the first call. Raises RuntimeError where there is none.
const CudaDriver& cuda_driver();

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CUDA_DRIVER_H_
