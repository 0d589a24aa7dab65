#include "flashinfer/adapter.h"

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cuda/tensors.h"
#include "flashinfer/strided_view.h"

namespace ssu_bridge {
namespace {

namespace ffi = tvm::ffi;

// What FlashInfer numbers its kernels.
enum Algorithm : int64_t { kAuto, kSimple, kVertical, kHorizontal };
constexpr const char* kAlgorithmNames[] = {"auto", "simple", "vertical", "horizontal"};
// An axis of one entry that FlashInfer wants where it counts tokens and our callers have none: of the tokens of each
// sequence, or of sequences in front of packed tokens.
enum AddedAxis : int64_t { kNone, kToken, kLeading };
// What its bulk copies need of an address.
constexpr uint64_t kBulkCopyBytes = 128;

// An argument of FlashInfer that is an array. `axes` has a letter for each: * the token axes, S the slots, b the
// sequences, K the steps of the intermediate states, H, P, N, G the sizes of these names; in small letters they repeat.
// "=" stands for the axes that the array has and "1" for a single int64. `bulk` marks what bulk copies may read.
struct Parameter {
  const char* name;
  const char* axes;
  bool bulk = false;
};

constexpr Parameter kParameters[] = {
    {"state", "SHPN", true},
    {"x", "*HP", true},
    {"dt", "*Hp"},
    {"A", "Hpn"},
    {"B", "*GN", true},
    {"C", "*GN", true},
    {"D", "Hp"},
    {"z", "*HP", true},
    {"dt_bias", "Hp"},
    {"state_batch_indices", "="},
    {"dst_state_batch_indices", "="},
    {"state_scale", "SHP", true},
    {"out", "*HP"},
    {"intermediate_states", "="},
    {"intermediate_state_indices", "="},
    {"intermediate_state_scales", "bKHP"},
    {"rand_seed", "1"},
    {"cu_seqlens", "="},
    {"num_accepted_tokens", "="},
    {"replay_x", "="},
    {"replay_B", "="},
    {"replay_dt", "="},
    {"replay_start", "="},
    {"replay_pending", "="},
};
constexpr int kParameterCount = sizeof(kParameters) / sizeof(Parameter);

// Returns the place of an array in the table, which has any order; -1 for one that is not there.
constexpr int place_of(std::string_view name) {
  for (int i = 0; i < kParameterCount; ++i)
    if (name == kParameters[i].name) return i;
  return -1;
}

constexpr int kState = place_of("state"), kX = place_of("x"), kDt = place_of("dt"), kB = place_of("B"),
              kD = place_of("D"), kIntermediateStates = place_of("intermediate_states"),
              kSequenceEnds = place_of("cu_seqlens");

constexpr int kAbsent = -1;

int position_of(const ffi::Array<ffi::String>& parameters, const std::string& name) {
  for (size_t i = 0; i < parameters.size(); ++i)
    if (name == std::string(parameters[i])) return static_cast<int>(i);
  return kAbsent;
}

int required_position_of(const ffi::Array<ffi::String>& parameters, const std::string& name) {
  int position = position_of(parameters, name);
  if (position == kAbsent) TVM_FFI_THROW(ValueError) << "FlashInfer has no parameter " << name;
  return position;
}

// The tensors of a call by their places; null for one that is absent.
struct Tensors {
  const DLTensor* given[kParameterCount] = {};

  const DLTensor* operator[](int place) const { return given[place]; }
};

// The sizes of one call.
class Sizes {
 public:
  explicit Sizes(const Tensors& tensors) : tensors_(tensors) {
    const DLTensor &state = *tensors[kState], &x = *tensors[kX], &B = *tensors[kB];
    if (state.ndim != 4 || x.ndim < 3 || B.ndim < x.ndim - 1)
      TVM_FFI_THROW(ValueError) << "expected state (slots, nheads, headdim, dstate), and x and B with heads or groups";
    token_axes = x.ndim - 2;
    groups_ = B.ndim == x.ndim ? B.shape[token_axes] : 1;
    const DLTensor* ends = tensors[kSequenceEnds];
    sequences_ = ends ? ends->shape[0] - 1 : x.shape[0];
    empty = sequences_ < 1;
    for (int i = 0; i < token_axes; ++i) empty = empty || x.shape[i] == 0;
  }

  Axis axis(char letter) const {
    const DLTensor& state = *tensors_[kState];
    switch (letter) {
      case 'H':
        return {state.shape[1], false};
      case 'P':
        return {state.shape[2], false};
      case 'p':
        return {state.shape[2], true};
      case 'N':
        return {state.shape[3], false};
      case 'n':
        return {state.shape[3], true};
      case 'G':
        return {groups_, false};
      case 'b':
        return {sequences_, false};
      default:
        return {steps(), false};
    }
  }

  int64_t steps() const {
    const DLTensor* buffer = tensors_[kIntermediateStates];
    return buffer ? buffer->shape[1] : 0;
  }

  int token_axes;
  bool empty;

 private:
  const Tensors& tensors_;
  int64_t groups_;
  int64_t sequences_;
};

class FlashInferKernel {
 public:
  FlashInferKernel(const ffi::Array<ffi::Function>& functions, const ffi::Array<ffi::String>& parameters,
                   const ffi::Array<ffi::String>& names, const ffi::Map<ffi::String, ffi::Any>& scalars,
                   int64_t added_axis)
      : functions_(functions.begin(), functions.end()),
        count_(static_cast<int>(parameters.size())),
        steps_at_(position_of(parameters, "cache_steps")),
        algorithm_at_(position_of(parameters, "algorithm")),
        added_axis_(added_axis) {
    if (added_axis < kNone || added_axis > kLeading) TVM_FFI_THROW(ValueError) << "added_axis: expected 0 to 2";
    for (int i = 0; i < kParameterCount; ++i) at_[i] = position_of(parameters, kParameters[i].name);
    for (const ffi::String& name : names) {
      order_.push_back(place_of(std::string_view(name.data(), name.size())));
      if (order_.back() < 0) TVM_FFI_THROW(ValueError) << "FlashInfer takes no array " << name;
      required_position_of(parameters, name);
    }
    for (const auto& [name, value] : scalars) scalars_.emplace_back(required_position_of(parameters, name), value);
    if (algorithm_at_ == kAbsent) return;
    algorithm_ = scalars["algorithm"].cast<int64_t>();
    if (algorithm_ < kAuto || algorithm_ > kHorizontal) TVM_FFI_THROW(ValueError) << "algorithm: expected 0 to 3";
  }

  void operator()(ffi::PackedArgs given, ffi::Any*) const {
    Tensors tensors = read(given);
    Sizes sizes(tensors);
    if (sizes.empty) return;
    StridedView views[kParameterCount];
    std::vector<ffi::AnyView> arguments(count_);  // None, unless set
    for (const auto& [position, value] : scalars_) arguments[position] = value;
    for (int i = 0; i < kParameterCount; ++i)
      if (tensors[i]) arguments[at_[i]] = view(*tensors[i], kParameters[i].axes, sizes, views[i]);
    if (tensors[kIntermediateStates]) arguments[steps_at_] = sizes.steps();
    if (algorithm_at_ != kAbsent) {
      arguments[algorithm_at_] = algorithm(tensors);
      if (!tensors[kD]) arguments[at_[kD]] = no_skip(*tensors[kDt], sizes, views[kD]);
    }
    for (const ffi::Function& function : functions_) {
      ffi::Any result;
      function.CallPacked(arguments.data(), count_, &result);
    }
  }

 private:
  Tensors read(ffi::PackedArgs given) const {
    if (given.size() != static_cast<int>(order_.size()))
      TVM_FFI_THROW(ValueError) << "expected " << order_.size() << " tensors, got " << given.size();
    Tensors tensors;
    for (int i = 0; i < given.size(); ++i) {
      const DLTensor*& tensor = tensors.given[order_[i]];
      const DLTensor* another = given[i].cast<DLTensor*>();
      if (tensor) move_to_result(tensor, another);
      tensor = another;
    }
    for (int required : {kState, kX, kDt, kB})
      if (!tensors[required]) TVM_FFI_THROW(ValueError) << kParameters[required].name << " is missing";
    return tensors;
  }

  DLTensor* view(const DLTensor& tensor, const char* axes, const Sizes& sizes, StridedView& result) const {
    if (*axes == '=') return result.view(tensor, tensor.ndim, nullptr, 0);
    if (*axes == '1') return result.view_as_one(tensor, DLDataType{kDLInt, 64, 1});
    Axis inner[StridedView::kMaxAxes];
    int outer = 0, count = 0;
    bool is_tokenwise = *axes == '*';
    if (is_tokenwise) {
      outer = sizes.token_axes;
      if (added_axis_ == kToken) inner[count++] = {1, false};
      ++axes;
    } else if (*axes == 'S') {
      outer = 1;
      ++axes;
    }
    for (; *axes && count < StridedView::kMaxAxes; ++axes) inner[count++] = sizes.axis(*axes);
    result.view(tensor, outer, inner, count);
    return is_tokenwise && added_axis_ == kLeading ? result.with_leading_axis() : result.tensor();
  }

  // The D that selective_state_update insists on, without memory: it takes that for zeros.
  static DLTensor* no_skip(const DLTensor& dt, const Sizes& sizes, StridedView& result) {
    const Axis axes[] = {sizes.axis('H'), sizes.axis('p')};
    return result.null(dt, axes, 2);
  }

  // FlashInfer's kernels besides the simple one read with bulk copies.
  int64_t algorithm(const Tensors& tensors) const {
    for (int i = 0; i < kParameterCount; ++i) {
      const DLTensor* tensor = tensors[i];
      if (!kParameters[i].bulk || !tensor || algorithm_ == kSimple) continue;
      uint64_t address = reinterpret_cast<uint64_t>(tensor->data) + tensor->byte_offset;
      if (address % kBulkCopyBytes == 0) continue;
      if (algorithm_ == kAuto) return kSimple;
      TVM_FFI_THROW(ValueError) << kParameters[i].name << ": expected memory that begins at a multiple of "
                                << kBulkCopyBytes << " bytes, which FlashInfer's " << kAlgorithmNames[algorithm_]
                                << " kernel needs, got address " << address
                                << "; algorithm=\"auto\" takes another kernel";
    }
    return algorithm_;
  }

  std::vector<ffi::Function> functions_;
  // How many arguments its functions have, and which of them the arrays, the scalars and two of those are.
  int count_;
  int at_[kParameterCount];
  std::vector<std::pair<int, ffi::Any>> scalars_;
  int steps_at_, algorithm_at_;
  // For each tensor of a call, its place in kParameters.
  std::vector<int> order_;
  int64_t algorithm_ = kAuto;
  int64_t added_axis_;
};

}  // namespace

ffi::Function make_flashinfer_kernel(ffi::Array<ffi::Function> functions, ffi::Array<ffi::String> parameters,
                                     ffi::Array<ffi::String> names, ffi::Map<ffi::String, ffi::Any> scalars,
                                     int64_t added_axis) {
  return ffi::Function::FromPacked(FlashInferKernel(functions, parameters, names, scalars, added_axis));
}

}  // namespace ssu_bridge
