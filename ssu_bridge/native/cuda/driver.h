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
using CudaEvent = struct CudaEventHandle*;

// How to launch, with one attribute: CUlaunchConfig and CUlaunchAttribute.
struct CudaLaunchAttribute {
  int id;
  int padding;
  int value[16];
};
struct CudaLaunch {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  CudaStream stream;
  CudaLaunchAttribute* attributes;
  unsigned attribute_count;
};

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
  // Null where the driver cannot do it, or not inside a graph.
  int (*launch_with)(const struct CudaLaunch* launch, CudaFunction function, void** arguments, void** extra);
  int (*allocate)(uint64_t* address, size_t bytes, CudaStream stream);
  int (*free)(uint64_t address, CudaStream stream);
  int (*copy)(uint64_t to, uint64_t from, size_t bytes, CudaStream stream);
  int (*event_create)(CudaEvent* event, unsigned flags);
  int (*event_record)(CudaEvent event, CudaStream stream);
  int (*stream_wait_event)(CudaStream stream, CudaEvent event, unsigned flags);
  int (*error_name)(int error, const char** name);
  int (*error_text)(int error, const char** text);

  // Launches on one row of blocks. `overlapping` lets the kernel start before the one ahead of it is done: it waits by
  // itself. Raises RuntimeError.
  void launch_row(CudaFunction function, unsigned blocks, unsigned threads, unsigned shared_bytes, CudaStream stream,
                  void** arguments, bool overlapping) const;

  // The context that the whole process uses on a device, kept from the first call on. Raises RuntimeError.
  CudaContext primary_context(int ordinal) const;

  // Raises RuntimeError with the error's name and text unless `result` is success. `what` says what was tried.
  void check(int result, const char* what) const;
};

// Makes a context the thread's current one, if it is not, until the end of the scope.
class CurrentContext {
 public:
  explicit CurrentContext(CudaContext context);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  bool pushed_ = false;
};

// The most devices that the process-wide tables hold. `check_ordinal` raises ValueError for a higher ordinal.
constexpr int kMaxCudaDevices = 64;
void check_ordinal(int64_t ordinal);

// The driver, opened and initialised at the first call. Raises RuntimeError where there is none.
const CudaDriver& cuda_driver();

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CUDA_DRIVER_H_
