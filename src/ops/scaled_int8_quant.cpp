// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/quant.h"
#include "core/check.h"
#include "ops/int8_encode.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "scaled_int8_quant_for_attn";

// Quantising alone for as long as waking the workers takes.
constexpr std::int64_t kParallelElements = 64 << 10;

void require_mode(const ScaledInt8QuantArgs& a) {
  const bool per_token = a.mode == Int8QuantMode::per_token_head;
  check::require(per_token || a.mode == Int8QuantMode::per_channel, {kOp, "mode"},
                 "0 (per_channel) or 2 (per_token_head)", static_cast<int>(a.mode));
  check::require(per_token || !a.transpose_scale, {kOp, "transpose_scale"}, "false per channel",
                 "true");
  check::require(!per_token || !a.static_scale.defined(), {kOp, "static_scale"},
                 "none in mode per_token_head", [&] { return describe(a.static_scale); });
}

template <typename T>
void require_no_nan(const ConstTensorView& x) {
  for (std::int64_t t = 0; t < x.shape[0]; ++t) {
    for (std::int64_t h = 0; h < x.shape[1]; ++h) {
      const T* row = x.as<T>() + t * x.strides[0] + h * x.strides[1];
      if (int8::largest_magnitude_bits(row, x.shape[2]) <= 0x7F800000U) continue;
      for (std::int64_t d = 0; d < x.shape[2]; ++d) {
        check::require(!std::isnan(to_f32(row[d])), {kOp, "input"}, "no NaN with a static scale",
                       [&] { return fmt::format("NaN at index [{}, {}, {}]", t, h, d); });
      }
    }
  }
}

void require_static_scale(const ScaledInt8QuantArgs& a) {
  const check::Where where{kOp, "static_scale"};
  check::tensor(where, a.static_scale, 2, {DType::f32});
  check::shape(where, a.static_scale, {a.input.shape[1], a.input.shape[2]});
  check::contiguous(where, a.static_scale);
  for (std::int64_t i = 0; i < a.static_scale.numel(); ++i) {
    const float s = a.static_scale.as<float>()[i];
    check::require(std::isfinite(s) && s > 0.0F, where, "finite scales above 0", [&] {
      const std::int64_t d = a.input.shape[2];
      return fmt::format("{} at index [{}, {}]", s, i / d, i % d);
    });
  }
  check::no_overlap({kOp, "output"}, a.output, "static_scale", a.static_scale);
  check::require(!a.scale.defined(), {kOp, "scale"}, "none when static_scale is given",
                 [&] { return describe(a.scale); });
  int8::with_type(a.input.dtype, [&]<typename T>(T) { require_no_nan<T>(a.input); });
}

void require_scale(const ScaledInt8QuantArgs& a) {
  const check::Where where{kOp, "scale"};
  const std::int64_t tokens = a.input.shape[0];
  const std::int64_t heads = a.input.shape[1];
  check::tensor(where, a.scale, 2, {DType::f32});
  if (a.mode == Int8QuantMode::per_channel) {
    check::shape(where, a.scale, {heads, a.input.shape[2]});
  } else if (a.transpose_scale) {
    check::shape(where, a.scale, {heads, tokens});
  } else {
    check::shape(where, a.scale, {tokens, heads});
  }
  check::contiguous(where, a.scale);
  check::no_overlap(where, a.scale, "input", a.input);
  check::no_overlap(where, a.scale, "output", a.output);
}

void require_mean(const ScaledInt8QuantArgs& a) {
  if (!a.mean.defined()) return;
  const check::Where where{kOp, "mean"};
  check::require(a.mode == Int8QuantMode::per_token_head, where, "none in mode per_channel",
                 [&] { return describe(a.mean); });
  check::tensor(where, a.mean, 2, {DType::f32});
  check::shape(where, a.mean, {a.input.shape[1], a.input.shape[2]});
  check::contiguous(where, a.mean);
  check::no_overlap({kOp, "output"}, a.output, "mean", a.mean);
  check::no_overlap({kOp, "scale"}, a.scale, "mean", a.mean);
}

void validate(const ScaledInt8QuantArgs& a) {
  require_mode(a);
  check::tensor({kOp, "input"}, a.input, 3, {DType::f32, DType::f16, DType::bf16});
  check::unit_last_stride({kOp, "input"}, a.input);
  check::tensor({kOp, "output"}, a.output, 3, {DType::i8});
  check::shape({kOp, "output"}, a.output, {a.input.shape[0], a.input.shape[1], a.input.shape[2]});
  check::unit_last_stride({kOp, "output"}, a.output);
  check::distinct_elements({kOp, "output"}, a.output);
  check::no_overlap({kOp, "output"}, a.output, "input", a.input);
  if (a.static_scale.defined()) {
    require_static_scale(a);
  } else {
    require_scale(a);
  }
  require_mean(a);
}

template <typename T>
const T* input_row(const ScaledInt8QuantArgs& a, std::int64_t t, std::int64_t h) noexcept {
  return a.input.as<T>() + t * a.input.strides[0] + h * a.input.strides[1];
}

std::int8_t* output_row(const ScaledInt8QuantArgs& a, std::int64_t t, std::int64_t h) noexcept {
  return a.output.as<std::int8_t>() + t * a.output.strides[0] + h * a.output.strides[1];
}

// Rows [begin, end) of T * H.
template <typename T>
void quantize_rows(const ScaledInt8QuantArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  const std::int64_t tokens = a.input.shape[0];
  const std::int64_t heads = a.input.shape[1];
  auto* scale = a.scale.as<float>();
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t t = i / heads;
    const std::int64_t h = i % heads;
    const T* row = input_row<T>(a, t, h);
    const std::int64_t dim = a.input.shape[2];
    const float s = a.mean.defined() ? int8::encode_row_less(row, a.mean.as<float>() + h * dim, dim,
                                                             output_row(a, t, h))
                                     : int8::encode_row(row, dim, output_row(a, t, h));
    scale[a.transpose_scale ? h * tokens + t : i] = s;
  }
}

// Scales of one head from all tokens: the row of scales holds the maxima until the last token.
template <typename T>
void compute_channel_scales(const ScaledInt8QuantArgs& a, std::int64_t h) noexcept {
  const std::int64_t dim = a.input.shape[2];
  float* scale = a.scale.as<float>() + h * dim;
  std::fill(scale, scale + dim, 0.0F);
  for (std::int64_t t = 0; t < a.input.shape[0]; ++t) {
    const T* x = input_row<T>(a, t, h);
    for (std::int64_t d = 0; d < dim; ++d) {
      const std::uint32_t largest =
          std::max(int8::magnitude_bits(scale[d]), int8::magnitude_bits(to_f32(x[d])));
      scale[d] = std::bit_cast<float>(largest);
    }
  }
  for (std::int64_t d = 0; d < dim; ++d) scale[d] = int8::scale_of(int8::magnitude_bits(scale[d]));
}

// Heads [begin, end).
template <typename T>
void quantize_channels(const ScaledInt8QuantArgs& a, std::int64_t begin,
                       std::int64_t end) noexcept {
  const std::int64_t dim = a.input.shape[2];
  for (std::int64_t h = begin; h < end; ++h) {
    if (!a.static_scale.defined()) compute_channel_scales<T>(a, h);
    const float* scale = (a.static_scale.defined() ? a.static_scale : ConstTensorView(a.scale))
                             .template as<float>() +
                         h * dim;
    for (std::int64_t t = 0; t < a.input.shape[0]; ++t) {
      const T* x = input_row<T>(a, t, h);
      std::int8_t* codes = output_row(a, t, h);
      for (std::int64_t d = 0; d < dim; ++d) codes[d] = int8::code_of(to_f32(x[d]), scale[d]);
    }
  }
}

template <typename T>
void quantize(const ScaledInt8QuantArgs& a, Executor* executor) {
  const bool per_token = a.mode == Int8QuantMode::per_token_head;
  const std::int64_t units = a.input.shape[1] * (per_token ? a.input.shape[0] : 1);
  const auto part = [&](std::int64_t begin, std::int64_t end) noexcept {
    if (per_token) {
      quantize_rows<T>(a, begin, end);
    } else {
      quantize_channels<T>(a, begin, end);
    }
  };
  if (a.input.numel() < kParallelElements) {
    part(0, units);
    return;
  }
  Executor& workers = executor != nullptr ? *executor : default_executor();
  const std::int64_t parts = workers.num_workers();
  workers.run([&](int worker) { part(units * worker / parts, units * (worker + 1) / parts); });
}

}  // namespace

void scaled_int8_quant_for_attn(const ScaledInt8QuantArgs& a, Executor* executor) {
  validate(a);
  int8::with_type(a.input.dtype, [&]<typename T>(T) { quantize<T>(a, executor); });
}

}  // namespace attend
