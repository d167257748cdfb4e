// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <vector>

#include "attend/ops/quant.h"
#include "attend/oracle/quantize.h"
#include "conformance/check.h"
#include "conformance/storage.h"

namespace attend::conformance {
namespace {

class ScaledInt8QuantCase final : public Case {
 public:
  explicit ScaledInt8QuantCase(Rng& rng)
      : dtype_(rng.pick({DType::f32, DType::f16, DType::bf16})),
        mode_(rng.pick({Int8QuantMode::per_channel, Int8QuantMode::per_token_head})),
        tokens_(rng.range(0, 200)),
        heads_(rng.range(1, 8)),
        dim_(8 * rng.range(1, 32)),
        transpose_(per_token() && rng.chance(0.5)),
        given_(!per_token() && rng.chance(0.5)) {
    Layout layout;
    layout.padded = rng.chance(0.5);
    input_ = Storage(rng, dtype_, {tokens_, heads_, dim_}, layout);
    output_ = Storage(rng, DType::i8, {tokens_, heads_, dim_}, layout);
    input_.set_random(rng, std::exp2(10.0 * rng.uniform() - 5.0));
    add_extremes(rng);
    if (per_token()) {
      scale_ =
          Storage(rng, DType::f32, transpose_ ? shape(heads_, tokens_) : shape(tokens_, heads_));
    } else {
      scale_ = Storage(rng, DType::f32, shape(heads_, dim_));
    }
    if (given_) {
      for (const std::int64_t at : scale_.offsets()) {
        scale_.set(at, std::exp2(10.0 * rng.uniform() - 10.0));
      }
    }
    output_.freeze();
    scale_.freeze();
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    output_.reset();
    scale_.reset();
    ScaledInt8QuantArgs args;
    args.input = input_.view();
    args.output = output_.view();
    args.mode = mode_;
    args.transpose_scale = transpose_;
    if (given_) {
      args.static_scale = scale_.view();
    } else {
      args.scale = scale_.view();
    }
    scaled_int8_quant_for_attn(args, &executor);
    if (per_token()) {
      expect_rows();
    } else {
      expect_channels();
    }
    Outcome outcome;
    expect_undamaged(outcome, "output", output_);
    expect_undamaged(outcome, "scale", scale_);
    return outcome;
  }

  std::string describe() const override {
    return fmt::format("{} mode {} tokens {} heads {} head_dim {}{}{}", to_string(dtype_),
                       static_cast<int>(mode_), tokens_, heads_, dim_,
                       transpose_ ? ", scales transposed" : "", given_ ? ", scales given" : "");
  }

 private:
  bool per_token() const { return mode_ == Int8QuantMode::per_token_head; }
  static std::vector<std::int64_t> shape(std::int64_t a, std::int64_t b) { return {a, b}; }

  // Zero rows, and where that is no error values that are not finite.
  void add_extremes(Rng& rng) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
    for (int t = 0; t < tokens_; ++t) {
      const int h = rng.range(0, heads_ - 1);
      if (rng.chance(0.05)) {
        for (int d = 0; d < dim_; ++d) input_.set(input_.offset({t, h, d}), 0.0);
      }
      if (!given_ && rng.chance(0.02)) {
        input_.set(input_.offset({t, h, rng.range(0, dim_ - 1)}),
                   rng.pick({kInfinity, -kInfinity, kNan}));
      }
    }
  }

  void expect_rows() {
    std::vector<double> row(static_cast<std::size_t>(dim_));
    for (int t = 0; t < tokens_; ++t) {
      for (int h = 0; h < heads_; ++h) {
        for (int d = 0; d < dim_; ++d) row[static_cast<std::size_t>(d)] = value(t, h, d);
        const float scale = oracle::int8_scale(row);
        for (int d = 0; d < dim_; ++d) expect_code(t, h, d, scale);
        scale_.expect_f32(transpose_ ? scale_.offset({h, t}) : scale_.offset({t, h}), scale);
      }
    }
  }

  void expect_channels() {
    std::vector<double> column(static_cast<std::size_t>(tokens_));
    for (int h = 0; h < heads_; ++h) {
      for (int d = 0; d < dim_; ++d) {
        for (int t = 0; t < tokens_; ++t) column[static_cast<std::size_t>(t)] = value(t, h, d);
        const std::int64_t at = scale_.offset({h, d});
        const float scale =
            given_ ? static_cast<float>(scale_.get(at)) : oracle::int8_scale(column);
        for (int t = 0; t < tokens_; ++t) expect_code(t, h, d, scale);
        if (!given_) scale_.expect_f32(at, scale);
      }
    }
  }

  double value(int t, int h, int d) const { return input_.get(input_.offset({t, h, d})); }
  void expect_code(int t, int h, int d, float scale) {
    const std::int8_t code = oracle::int8_code(value(t, h, d), scale);
    output_.expect_bits(output_.offset({t, h, d}), static_cast<std::uint8_t>(code));
  }

  DType dtype_;
  Int8QuantMode mode_;
  int tokens_, heads_, dim_;
  bool transpose_, given_;
  Storage input_, output_, scale_;
};

}  // namespace

Op op_scaled_int8_quant_for_attn() {
  return {"scaled_int8_quant_for_attn", false,
          [](Rng& rng) { return std::make_unique<ScaledInt8QuantCase>(rng); }};
}

}  // namespace attend::conformance
