#include "cpu/argument_rules.h"

#include <tvm/ffi/dtype.h>
#include <tvm/ffi/error.h>

#include <algorithm>

namespace ssu_bridge {

namespace {

std::string without(std::string axes, char symbol) {
  axes.erase(std::remove(axes.begin(), axes.end(), symbol), axes.end());
  return axes;
}

std::string with_tokens(std::string axes, const char* token_axes) {
  size_t star = axes.find('*');
  return star == std::string::npos ? axes : axes.replace(star, 1, token_axes);
}

}  // namespace

Rule parse_rule(const ArgumentRow& row) {
  const char* const token_axes[kLayouts] = {"b", "bT", "L"};
  Rule rule;
  tvm::ffi::Array<tvm::ffi::String> shapes = row.get<1>();
  rule.tied_axes = static_cast<int>(row.get<3>());
  rule.is_written = row.get<4>();
  rule.must_repeat = row.get<5>();
  tvm::ffi::String dtype = row.get<6>();
  rule.has_dtype = !dtype.empty();
  if (rule.has_dtype) rule.dtype = tvm::ffi::StringToDLDataType(dtype);
  for (int layout = 0; layout < kLayouts; ++layout) {
    std::string free = with_tokens(row.get<2>(), token_axes[layout]);
    for (bool has_heads : {false, true}) {
      std::vector<Pattern>& patterns = rule.patterns[layout][has_heads];
      for (const tvm::ffi::String& shape : shapes) {
        std::string axes = with_tokens(shape, token_axes[layout]);
        // Without heads nothing can be tied to one.
        if (!has_heads && !axes.empty() && axes.back() == 'H') continue;
        if (!has_heads) axes = without(axes, 'H');
        if (axes.size() > kMaxAxes) TVM_FFI_THROW(ValueError) << "arguments: " << axes << " has too many axes";
        Pattern pattern;
        pattern.is_full = patterns.empty();
        pattern.has_one_group =
            !patterns.empty() && patterns[0].axes.find('G') != std::string::npos && axes.find('G') == std::string::npos;
        size_t inner = axes.find_first_not_of(free);
        pattern.free_axes = static_cast<int>(inner == std::string::npos ? axes.size() : inner);
        pattern.axes = std::move(axes);
        patterns.push_back(std::move(pattern));
      }
    }
  }
  return rule;
}

}  // namespace ssu_bridge
