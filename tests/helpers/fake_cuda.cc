// A CUDA driver for tests: it loads and launches nothing, and writes what it was asked to a log.
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {
int failing(const char* name) {
  const char* wanted = std::getenv("FAKE_CUDA_FAILS");
  return wanted && std::strcmp(wanted, name) == 0 ? 700 : 0;
}
thread_local long current = 0;
}  // namespace

extern "C" {
int cuInit(unsigned) { return failing("cuInit"); }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDevicePrimaryCtxRetain(long* context, int device) { return *context = 100 + device, 0; }
int cuCtxGetCurrent(long* context) { return *context = current, 0; }
int cuCtxPushCurrent_v2(long context) { return current = context, 0; }
int cuCtxPopCurrent_v2(long* context) { return *context = current, current = 0, 0; }
int cuThreadExchangeStreamCaptureMode(int*) { return 0; }
int cuModuleLoadData(long* module, const void* image) {
  std::printf("load '%s' in %ld\n", static_cast<const char*>(image), current);
  return *module = 7, failing("cuModuleLoadData");
}
int cuModuleGetFunction(long* function, long, const char* name) {
  std::printf("function %s\n", name);
  return *function = 1000 + current, 0;
}
int cuFuncSetAttribute(long, int attribute, int value) {
  std::printf("attribute %d = %d\n", attribute, value);
  return 0;
}
int cuDriverGetVersion(int* version) { return *version = std::atoi(std::getenv("FAKE_CUDA_VERSION")), 0; }
int cuLaunchKernel(long function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared, void*, void** arguments, void**) {
  flockfile(stdout);  // a line in one piece
  std::printf("launch %ld in %ld: %u %u %u, %u threads, %u bytes:", function, current, x, y, z, threads, shared);
  for (int i = 0; i < std::atoi(std::getenv("FAKE_CUDA_ARGUMENTS")); ++i)
    std::printf(" %lld", *static_cast<long long*>(arguments[i]));
  std::printf("\n");
  funlockfile(stdout);
  return failing("cuLaunchKernel");
}
struct Launch {
  unsigned grid[3], block[3], shared;
  void* stream;
  const int* attributes;
  unsigned count;
};
int cuLaunchKernelEx(const Launch* launch, long function, void** arguments, void**) {
  std::printf("%u attribute %d = %d, ", launch->count, launch->attributes[0], launch->attributes[2]);
  return cuLaunchKernel(function, launch->grid[0], launch->grid[1], launch->grid[2], launch->block[0], 1, 1,
                        launch->shared, launch->stream, arguments, nullptr);
}
int cuMemAllocAsync(unsigned long* address, unsigned long bytes, long stream) {
  *address = reinterpret_cast<unsigned long>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  std::printf("allocate %lu bytes in %ld on %ld: %lu\n", bytes, current, stream, *address);
  return failing("cuMemAllocAsync");
}
int cuMemFreeAsync(unsigned long address, long stream) {
  std::printf("free %lu in %ld on %ld\n", address, current, stream);
  std::free(reinterpret_cast<void*>(address));
  return failing("cuMemFreeAsync");
}
int cuMemcpyDtoDAsync_v2(unsigned long to, unsigned long from, unsigned long bytes, long stream) {
  std::printf("copy %lu bytes in %ld on %ld\n", bytes, current, stream);
  std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
  return failing("cuMemcpyDtoDAsync");
}
int cuEventCreate(long* event, unsigned flags) {
  std::printf("event with flags %u in %ld\n", flags, current);
  static long made = 0;
  return *event = 1000 * ++made + current, failing("cuEventCreate");
}
int cuEventRecord(long event, long stream) {
  std::printf("record %ld on %ld in %ld\n", event, stream, current);
  return failing("cuEventRecord");
}
int cuStreamWaitEvent(long stream, long event, unsigned) {
  std::printf("%ld waits for %ld in %ld\n", stream, event, current);
  return failing("cuStreamWaitEvent");
}
int cuGetErrorName(int, const char** name) { return *name = "CUDA_ERROR_ILLEGAL_ADDRESS", 0; }
int cuGetErrorString(int, const char** text) { return *text = "an illegal memory access", 0; }
}
