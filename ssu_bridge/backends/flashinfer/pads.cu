// The outputs of padding indices, which FlashInfer's checkpointing_ssu leaves alone: what their tokens compute from a
// state of zeros. It has that function's arguments, runs behind it on the same stream, and is compiled by FlashInfer.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <algorithm>

namespace {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

constexpr int kMostTokens = 16, kWarp = 32, kWarps = 4, kThreads = kWarps * kWarp;
// Most sequences have a slot and their blocks end at once: there are so few of them for each sequence.
constexpr int kBlocksPerSequence = 8;

struct Floats {
  void* data = nullptr;
  bool is_single = false, is_brain = false;

  Floats() = default;
  explicit Floats(const TensorView& tensor)
      : data(tensor.data_ptr()), is_single(tensor.dtype().bits == 32), is_brain(tensor.dtype().code == kDLBfloat) {}
  explicit Floats(const Optional<TensorView>& tensor)
      : Floats(tensor.has_value() ? Floats(tensor.value()) : Floats()) {}

  __device__ float at(int64_t i) const {
    if (is_single) return static_cast<const float*>(data)[i];
    if (is_brain) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    return __half2float(static_cast<const __half*>(data)[i]);
  }
  __device__ float at_or_zero(int64_t i) const { return data ? at(i) : 0.0f; }
  __device__ void put(int64_t i, float value) const {
    if (is_brain)
      static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value);
    else
      static_cast<__half*>(data)[i] = __float2half_rn(value);
  }
};

// Floats of each token, with the strides of sequences (0 for packed ones), tokens, and heads or groups.
struct Tokens : Floats {
  int64_t sequence = 0, token = 0, head = 0;

  Tokens() = default;
  Tokens(const TensorView& tensor, bool is_packed)
      : Floats(tensor), sequence(is_packed ? 0 : tensor.stride(0)), token(tensor.stride(1)), head(tensor.stride(2)) {}
};

struct Call {
  Tokens x, dt, B, C, z, out;
  Floats A, D, dt_bias;
  const void* slots;
  const int32_t* edges;
  int64_t pad;
  int tokens, heads, heads_per_group, dim, dstate;
  bool slots_are_64_bit, softplus;

  __device__ bool is_pad(int sequence) const {
    int64_t slot =
        slots_are_64_bit ? static_cast<const int64_t*>(slots)[sequence] : static_cast<const int32_t*>(slots)[sequence];
    return slot == pad;
  }
  __device__ float step_size(int64_t at, int head) const {
    float step = dt.at(at) + dt_bias.at_or_zero(head);
    return softplus && step <= 20.0f ? log1pf(expf(step)) : step;
  }
};

__device__ float sum_of_warp(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// From zeros, the output of token t is the sum over tokens j up to it of x_j, weighted with the step size of j, the
// decay from there on, and C_t . B_j; then D and the gate.
__global__ void fill(Call call) {
  __shared__ float steps[kMostTokens], weights[kMostTokens][kMostTokens];
  int sequence = blockIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (!call.is_pad(sequence)) return;
  int64_t first = call.edges ? call.edges[sequence] : 0;
  int count = call.edges ? min(max(call.edges[sequence + 1] - call.edges[sequence], 0), kMostTokens) : call.tokens;
  auto offset = [&](const Tokens& of, int token, int head) {
    return sequence * of.sequence + (first + token) * of.token + head * of.head;
  };
  for (int head = blockIdx.y; head < call.heads; head += gridDim.y) {
    int group = head / call.heads_per_group;
    __syncthreads();
    if (threadIdx.x < count) steps[threadIdx.x] = call.step_size(offset(call.dt, threadIdx.x, head), head);
    __syncthreads();
    for (int pair = warp; pair < count * count; pair += kWarps) {
      int t = pair / count, j = pair % count;
      if (j > t) continue;
      int64_t at_C = offset(call.C, t, group), at_B = offset(call.B, j, group);
      float product = 0.0f, since = 0.0f;
      for (int n = lane; n < call.dstate; n += kWarp) product += call.C.at(at_C + n) * call.B.at(at_B + n);
      for (int k = j + 1; k <= t; ++k) since += steps[k];
      product = sum_of_warp(product);
      if (lane == 0) weights[t][j] = expf(call.A.at(head) * since) * steps[j] * product;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * call.dim; i += kThreads) {
      int t = i / call.dim, d = i % call.dim;
      float y = call.D.at_or_zero(head) * call.x.at(offset(call.x, t, head) + d);
      for (int j = 0; j <= t; ++j) y += weights[t][j] * call.x.at(offset(call.x, j, head) + d);
      if (call.z.data) {
        float z = call.z.at(offset(call.z, t, head) + d);
        y *= z / (1.0f + expf(-z));
      }
      call.out.put(offset(call.out, t, head) + d, y);
    }
  }
}

// Makes a device the thread's current one until the end of the scope.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(device));
  }
  ~CurrentDevice() { cudaSetDevice(before_); }

  static void check(cudaError_t error) {
    if (error != cudaSuccess)
      TVM_FFI_THROW(RuntimeError) << "outputs of padding indices: " << cudaGetErrorString(error);
  }

 private:
  int before_ = 0;
};

void fill_pads(TensorView state, TensorView x, TensorView dt, TensorView A, TensorView B, TensorView C, TensorView out,
               TensorView, TensorView, TensorView, TensorView, TensorView, Optional<TensorView> D,
               Optional<TensorView> z, Optional<TensorView> dt_bias, bool dt_softplus, Optional<TensorView> slots,
               int64_t pad, Optional<TensorView>, Optional<TensorView>, int64_t, Optional<TensorView> edges,
               Optional<TensorView>, Optional<TensorView>, Optional<TensorView>, int64_t, int64_t, int64_t) {
  if (!slots.has_value()) return;
  bool is_packed = edges.has_value();
  Call call;
  call.x = Tokens(x, is_packed);
  call.dt = Tokens(dt, is_packed);
  call.B = Tokens(B, is_packed);
  call.C = Tokens(C, is_packed);
  call.out = Tokens(out, is_packed);
  if (z.has_value()) call.z = Tokens(z.value(), is_packed);
  call.A = Floats(A);
  call.D = Floats(D);
  call.dt_bias = Floats(dt_bias);
  call.slots = slots.value().data_ptr();
  call.slots_are_64_bit = slots.value().dtype().bits == 64;
  call.edges = is_packed ? static_cast<const int32_t*>(edges.value().data_ptr()) : nullptr;
  call.pad = pad;
  call.tokens = static_cast<int>(x.size(1));
  call.heads = static_cast<int>(state.size(1));
  call.heads_per_group = static_cast<int>(state.size(1) / B.size(2));
  call.dim = static_cast<int>(state.size(2));
  call.dstate = static_cast<int>(state.size(3));
  call.softplus = dt_softplus;
  DLDevice device = state.device();
  CurrentDevice current(device.device_id);
  auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  dim3 grid(static_cast<unsigned>(slots.value().size(0)), std::min(call.heads, kBlocksPerSequence));
  fill<<<grid, kThreads, 0, stream>>>(call);
  CurrentDevice::check(cudaGetLastError());
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(fill_pads, fill_pads);
