// SPDX-License-Identifier: Apache-2.0
#include "attend/cache/value_scales.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "attend/core/float_types.h"
#include "cache/safetensors.h"
#include "core/check.h"

namespace attend {
namespace {

constexpr std::string_view kKind = "attend.value_scale";
constexpr std::string_view kVersion = "1";
constexpr std::string_view kPrefix = "layers.";
constexpr std::string_view kSuffix = ".value_scale";

constexpr float kLargestCode = 127.0F;
constexpr float kSmallestScale = 1e-6F;

std::string name_of(std::size_t layer) { return fmt::format("{}{}{}", kPrefix, layer, kSuffix); }

// Layer number of a tensor's name, written as name_of writes it; -1 for any other name.
std::int64_t layer_of(const std::string& name) {
  std::size_t layer = 0;
  const char* end = name.data() + name.size();
  const char* digits = name.data() + std::min(kPrefix.size(), name.size());
  const auto [rest, error] = std::from_chars(digits, end, layer);
  if (error != std::errc{} || layer > INT32_MAX || name_of(layer) != name) return -1;
  return static_cast<std::int64_t>(layer);
}

void require_size(std::string_view op, std::string_view name, std::int64_t value) {
  check::require(value >= 1, {op, name}, "a number >= 1", value);
}

bool is_scale(float x) noexcept { return std::isfinite(x) && x > 0.0F; }

struct Loader {
  static constexpr std::string_view kOp = "ValueScales::load";
  const std::string& path;

  template <typename Got>
  void require(bool ok, std::string_view expected, const Got& got) const {
    check::require(ok, {kOp, "path"}, expected,
                   [&] { return fmt::format("{}: {}", path, check::text_of(got)); });
  }

  void require_metadata(const safetensors::File& file, const std::string& key,
                        std::string_view value) const {
    const auto it = file.metadata.find(key);
    const bool found = it != file.metadata.end();
    require(found && it->second == value, fmt::format("metadata {} \"{}\"", key, value), [&] {
      return found ? fmt::format("\"{}\"", it->second.substr(0, 60)) : std::string("none");
    });
  }

  void require_shape(const safetensors::Tensor& t, const safetensors::Tensor& first) const {
    const auto sizes = [&] {
      return fmt::format("{} dimensions [{}] for '{}'", t.shape.size(), fmt::join(t.shape, ", "),
                         t.name);
    };
    const bool matrix = t.shape.size() == 2 && t.shape[0] >= 1 && t.shape[1] >= 1 &&
                        t.shape[0] <= INT32_MAX && t.shape[1] <= INT32_MAX;
    require(matrix, "shapes of two sizes >= 1", sizes);
    require(t.shape == first.shape, "the same shape for all layers", sizes);
  }

  void require_scales(const safetensors::Tensor& t) const {
    const auto bad = std::find_if_not(t.data.begin(), t.data.end(), is_scale);
    require(bad == t.data.end(), "finite scales above 0", [&] {
      return fmt::format("{} at index {} of '{}'", *bad, bad - t.data.begin(), t.name);
    });
  }
};

}  // namespace

ConstTensorView ValueScales::layer(int layer) const {
  check::require(
      layer >= 0 && layer < num_layers, {"ValueScales::layer", "layer"},
      [&] { return fmt::format("0 to {}", num_layers - 1); }, layer);
  const auto size = static_cast<std::size_t>(num_kv_heads) * static_cast<std::size_t>(head_size);
  return {scales.data() + static_cast<std::size_t>(layer) * size,
          DType::f32,
          {num_kv_heads, head_size}};
}

void ValueScales::save(const std::string& path) const {
  constexpr std::string_view kOp = "ValueScales::save";
  require_size(kOp, "num_layers", num_layers);
  require_size(kOp, "num_kv_heads", num_kv_heads);
  require_size(kOp, "head_size", head_size);
  const std::int64_t size = std::int64_t{num_kv_heads} * head_size;
  const auto count = static_cast<std::int64_t>(scales.size());
  check::require(
      count % size == 0 && count / size == num_layers, {kOp, "scales"},
      [&] { return fmt::format("{} x {} numbers", num_layers, size); }, count);
  const auto bad = std::find_if_not(scales.begin(), scales.end(), is_scale);
  check::require(bad == scales.end(), {kOp, "scales"}, "finite scales above 0",
                 [&] { return fmt::format("{} at index {}", *bad, bad - scales.begin()); });

  safetensors::File file;
  file.metadata = {{"kind", std::string(kKind)}, {"version", std::string(kVersion)}};
  for (int n = 0; n < num_layers; ++n) {
    const auto begin = scales.begin() + n * size;
    file.tensors.push_back(
        {name_of(static_cast<std::size_t>(n)), {num_kv_heads, head_size}, {begin, begin + size}});
  }
  safetensors::write(path, file);
}

ValueScales ValueScales::load(const std::string& path) {
  const Loader loader{path};
  safetensors::File file = safetensors::read(Loader::kOp, path);
  loader.require_metadata(file, "kind", kKind);
  loader.require_metadata(file, "version", kVersion);
  loader.require(!file.tensors.empty(), "at least one layer", "no tensor");
  const auto layers = static_cast<std::int64_t>(file.tensors.size());
  // Names differ, so as many layers below `layers` as there are tensors are all of them.
  for (const safetensors::Tensor& t : file.tensors) {
    const std::int64_t layer = layer_of(t.name);
    loader.require(layer >= 0 && layer < layers,
                   "tensors layers.N.value_scale, N from 0 to one less than their number", [&] {
                     return fmt::format("'{}' among {}", std::string_view(t.name).substr(0, 60),
                                        layers);
                   });
    loader.require_shape(t, file.tensors.front());
    loader.require_scales(t);
  }
  std::sort(file.tensors.begin(), file.tensors.end(),
            [](const auto& a, const auto& b) { return layer_of(a.name) < layer_of(b.name); });
  ValueScales result{.num_layers = static_cast<int>(layers),
                     .num_kv_heads = static_cast<int>(file.tensors.front().shape[0]),
                     .head_size = static_cast<int>(file.tensors.front().shape[1]),
                     .scales = {}};
  for (const safetensors::Tensor& t : file.tensors) {
    result.scales.insert(result.scales.end(), t.data.begin(), t.data.end());
  }
  return result;
}

ValueScaleCalibration::ValueScaleCalibration(int num_layers, int num_kv_heads, int head_size)
    : num_layers_(num_layers), num_kv_heads_(num_kv_heads), head_size_(head_size) {
  constexpr std::string_view kOp = "ValueScaleCalibration";
  require_size(kOp, "num_layers", num_layers);
  require_size(kOp, "num_kv_heads", num_kv_heads);
  require_size(kOp, "head_size", head_size);
  tokens_of_.resize(static_cast<std::size_t>(num_layers));
  amax_.resize(tokens_of_.size() * static_cast<std::size_t>(num_kv_heads) *
               static_cast<std::size_t>(head_size));
}

void ValueScaleCalibration::observe(int layer, const ConstTensorView& value) {
  constexpr std::string_view kOp = "ValueScaleCalibration::observe";
  check::require(
      layer >= 0 && layer < num_layers_, {kOp, "layer"},
      [&] { return fmt::format("0 to {}", num_layers_ - 1); }, layer);
  check::tensor({kOp, "value"}, value, 3, {DType::f32, DType::f16, DType::bf16});
  check::shape({kOp, "value"}, value, {-1, num_kv_heads_, head_size_});
  const auto element = [&](std::int64_t t, std::int64_t h, std::int64_t d) {
    const std::int64_t at = t * value.strides[0] + h * value.strides[1] + d * value.strides[2];
    if (value.dtype == DType::f32) return value.as<float>()[at];
    return value.dtype == DType::f16 ? to_f32(value.as<f16>()[at]) : to_f32(value.as<bf16>()[at]);
  };
  const auto size = static_cast<std::size_t>(num_kv_heads_) * static_cast<std::size_t>(head_size_);
  // The batch counts as a whole or not at all.
  const auto begin =
      amax_.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(layer) * size);
  std::vector<float> amax(begin, begin + static_cast<std::ptrdiff_t>(size));
  for (std::int64_t t = 0; t < value.shape[0]; ++t) {
    std::size_t i = 0;
    for (std::int64_t h = 0; h < num_kv_heads_; ++h) {
      for (std::int64_t d = 0; d < head_size_; ++d, ++i) {
        const float x = element(t, h, d);
        check::require(std::isfinite(x), {kOp, "value"}, "finite values",
                       [&] { return fmt::format("{} at index [{}, {}, {}]", x, t, h, d); });
        amax[i] = std::max(amax[i], std::abs(x));
      }
    }
  }
  std::copy(amax.begin(), amax.end(), begin);
  tokens_of_[static_cast<std::size_t>(layer)] += value.shape[0];
}

ValueScales ValueScaleCalibration::scales() const {
  for (std::size_t n = 0; n < tokens_of_.size(); ++n) {
    check::require(tokens_of_[n] > 0, {"ValueScaleCalibration::scales", "value"},
                   "observed values of every layer",
                   [&] { return fmt::format("none of layer {}", n); });
  }
  ValueScales result{.num_layers = num_layers_,
                     .num_kv_heads = num_kv_heads_,
                     .head_size = head_size_,
                     .scales = amax_};
  for (float& s : result.scales) s = std::max(s / kLargestCode, kSmallestScale);
  return result;
}

}  // namespace attend
