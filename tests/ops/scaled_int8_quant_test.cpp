// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "attend/core/error.h"
#include "attend/ops/quant.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::Rng;
using Codes = std::vector<int>;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

constexpr auto kPerToken = Int8QuantMode::per_token_head;
constexpr auto kPerChannel = Int8QuantMode::per_channel;

struct Result {
  Codes codes;
  std::vector<float> scale;
};

// Quantises [T, H, D] float32 numbers.
Result quantize(std::vector<float> x, std::vector<std::int64_t> shape, Int8QuantMode mode,
                bool transpose = false) {
  const bool channel = mode == kPerChannel;
  std::vector<std::int64_t> scale_shape = {shape[channel || transpose ? 1 : 0],
                                           shape[channel ? 2 : (transpose ? 0 : 1)]};
  std::vector<std::int8_t> codes(x.size(), 99);
  std::vector<float> scale(static_cast<std::size_t>(scale_shape[0] * scale_shape[1]), kNan);
  scaled_int8_quant_for_attn({.input = {x.data(), DType::f32, shape},
                              .output = {codes.data(), DType::i8, shape},
                              .mode = mode,
                              .scale = {scale.data(), DType::f32, scale_shape},
                              .transpose_scale = transpose});
  return {{codes.begin(), codes.end()}, scale};
}

TEST(ScaledInt8QuantTest, ModesHaveTheFieldsNumbers) {
  EXPECT_EQ(static_cast<int>(kPerToken), 2);
  EXPECT_EQ(static_cast<int>(kPerChannel), 0);
}

TEST(ScaledInt8QuantTest, PerTokenHead) {
  const std::vector<float> x = {127, 0.5, 1.5, 2.5, -254, 1, 3, -5, 0, 0, 0, -0.0F, 1e-9F, 0, 0, 0};
  const Result r = quantize(x, {2, 2, 4}, kPerToken);
  EXPECT_EQ(r.scale, (std::vector<float>{1.0F, 2.0F, 1e-6F, 1e-6F}));
  EXPECT_EQ(r.codes, (Codes{127, 0, 2, 2, -127, 0, 2, -2, 0, 0, 0, 0, 0, 0, 0, 0}));
  const Result t = quantize(x, {2, 2, 4}, kPerToken, true);
  EXPECT_EQ(t.scale, (std::vector<float>{1.0F, 1e-6F, 2.0F, 1e-6F}));
  EXPECT_EQ(t.codes, r.codes);
}

TEST(ScaledInt8QuantTest, PerChannel) {
  // Two tokens, one head, three channels; then the channels as heads.
  const Result r = quantize({127, -1, 0, 25.4F, 254, 0}, {2, 1, 3}, kPerChannel);
  EXPECT_EQ(r.scale, (std::vector<float>{1.0F, 2.0F, 1e-6F}));
  EXPECT_EQ(r.codes, (Codes{127, 0, 0, 25, 127, 0}));
  const Result h = quantize({127, -1, 0, 25.4F, 254, 0}, {2, 3, 1}, kPerChannel);
  EXPECT_EQ(h.scale, r.scale);
  EXPECT_EQ(h.codes, r.codes);
  EXPECT_EQ(quantize({}, {0, 1, 2}, kPerChannel).scale, (std::vector<float>{1e-6F, 1e-6F}));
}

TEST(ScaledInt8QuantTest, ValuesThatAreNotFiniteStayInTheirGroup) {
  for (const float bad : {kInf, -kInf, kNan, -kNan}) {
    const Result rows = quantize({1, bad, 127, 2}, {2, 1, 2}, kPerToken);
    EXPECT_TRUE(std::isnan(rows.scale[0]));
    EXPECT_EQ(rows.scale[1], 1.0F);
    EXPECT_EQ(rows.codes, (Codes{0, 0, 127, 2}));
    const Result channels = quantize({1, bad, 127, 2}, {2, 1, 2}, kPerChannel);
    EXPECT_EQ(channels.scale[0], 1.0F);
    EXPECT_TRUE(std::isnan(channels.scale[1]));
    EXPECT_EQ(channels.codes, (Codes{1, 0, 127, 0}));
  }
}

TEST(ScaledInt8QuantTest, StaticScalesClamp) {
  const std::vector<float> x = {1, 300, -300, -127.5F, kInf, -kInf};
  const std::vector<float> scale = {2, 1, 1};
  std::vector<std::int8_t> codes(6);
  scaled_int8_quant_for_attn({.input = {x.data(), DType::f32, {2, 1, 3}},
                              .output = {codes.data(), DType::i8, {2, 1, 3}},
                              .mode = kPerChannel,
                              .scale = {},
                              .static_scale = {scale.data(), DType::f32, {1, 3}}});
  EXPECT_EQ(Codes(codes.begin(), codes.end()), (Codes{0, 127, -127, -64, 127, -127}));
}

// Slices of a fused projection, codes with gaps, and enough rows for the executor.
TEST(ScaledInt8QuantTest, StridesAndWorkers) {
  Rng rng(3);
  SCOPED_TRACE(rng.trace());
  constexpr std::int64_t kTokens = 300, kHeads = 5, kDim = 72;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    HostTensor fused(dtype, {kTokens, 3, kHeads, kDim});
    fused.fill_normal(rng);
    const TensorView x = fused.view().select(1, 1);
    for (const int threads : {1, 2, 5}) {
      HostTensor wide(DType::i8, {kTokens, kHeads, kDim + 8});
      HostTensor scale(DType::f32, {kHeads, kTokens});
      wide.fill_bytes(0x5A);
      const auto pool = make_thread_pool(threads);
      scaled_int8_quant_for_attn({.input = x,
                                  .output = wide.view().slice(2, 0, kDim),
                                  .mode = kPerToken,
                                  .scale = scale,
                                  .transpose_scale = true},
                                 pool.get());
      for (std::int64_t t = 0; t < kTokens; ++t) {
        for (std::int64_t h = 0; h < kHeads; ++h) {
          double amax = 0;
          for (std::int64_t d = 0; d < kDim; ++d) {
            amax = std::max(amax, std::abs(testing::get(x, {t, h, d})));
          }
          const double s = testing::get(scale, {h, t});
          ASSERT_NEAR(s, amax / 127, 1e-7 * amax);
          const auto* codes = wide.as<std::int8_t>().data() + (t * kHeads + h) * (kDim + 8);
          for (std::int64_t d = 0; d < kDim; ++d) {
            // Half a step, and the rounding of the quotient.
            ASSERT_LE(std::abs(codes[d] - testing::get(x, {t, h, d}) / s), 0.5 + 1e-5);
          }
          for (std::int64_t d = kDim; d < kDim + 8; ++d) ASSERT_EQ(codes[d], 0x5A);
        }
      }
    }
  }
}

class ScaledInt8QuantErrorTest : public ::testing::Test {
 protected:
  ScaledInt8QuantErrorTest() {
    args_ = {.input = {input_.data(), DType::f32, {2, 3, 4}},
             .output = {codes_.data(), DType::i8, {2, 3, 4}},
             .mode = kPerToken,
             .scale = {scale_.data(), DType::f32, {2, 3}}};
  }

  // The error's text after "argument"; checks that nothing was written.
  std::string error(const std::function<void(ScaledInt8QuantArgs&)>& change) {
    ScaledInt8QuantArgs a = args_;
    change(a);
    std::string text = "none";
    try {
      scaled_int8_quant_for_attn(a);
    } catch (const InvalidArgument& e) {
      text = e.what();
      EXPECT_EQ(e.op(), "scaled_int8_quant_for_attn");
      text = text.substr(text.find('\''));
      EXPECT_EQ(codes_, std::vector<std::int8_t>(24, 99)) << text;
      EXPECT_EQ(scale_, std::vector<float>(12, 7.0F)) << text;
    }
    return text;
  }
  std::string blamed(const std::function<void(ScaledInt8QuantArgs&)>& change) {
    const std::string text = error(change);
    return text.substr(0, text.find(':'));
  }

  // Mode per_channel with given scales.
  void use_static_scale() {
    args_.mode = kPerChannel;
    args_.scale = {};
    args_.static_scale = {given_.data(), DType::f32, {3, 4}};
  }

  std::vector<float> input_ = std::vector<float>(24, 1.0F);
  std::vector<std::int8_t> codes_ = std::vector<std::int8_t>(24, 99);
  std::vector<float> scale_ = std::vector<float>(12, 7.0F);
  std::vector<float> given_ = std::vector<float>(12, 1.0F);
  ScaledInt8QuantArgs args_;
};

TEST_F(ScaledInt8QuantErrorTest, ShapesAndTypes) {
  EXPECT_EQ(blamed([](auto& a) { a.input = a.input.select(0, 0); }), "'input'");
  EXPECT_EQ(blamed([](auto& a) { a.input.dtype = DType::i32; }), "'input'");
  EXPECT_EQ(blamed([](auto& a) { a.input.data = nullptr; }), "'input'");
  EXPECT_EQ(blamed([](auto& a) { std::swap(a.input.strides[1], a.input.strides[2]); }), "'input'");
  EXPECT_EQ(blamed([](auto& a) { a.output.dtype = DType::u8; }), "'output'");
  EXPECT_EQ(blamed([](auto& a) { a.output.shape[0] = 1; }), "'output'");
  EXPECT_EQ(blamed([](auto& a) { a.output.strides[0] = 0; }), "'output'");
  EXPECT_EQ(blamed([](auto& a) { std::swap(a.output.strides[1], a.output.strides[2]); }),
            "'output'");
  EXPECT_EQ(blamed([](auto& a) { a.output.data = const_cast<void*>(a.input.data); }), "'output'");
  EXPECT_EQ(blamed([](auto& a) { a.scale = {}; }), "'scale'");
  EXPECT_EQ(blamed([](auto& a) { a.scale.dtype = DType::i32; }), "'scale'");
  EXPECT_EQ(error([](auto& a) { a.transpose_scale = true; }),
            "'scale': expected shape [3, 2], got [2, 3] f32 cpu:0");
  EXPECT_EQ(blamed([](auto& a) { a.scale.strides[0] = 6; }), "'scale'");
  EXPECT_EQ(blamed([](auto& a) { a.scale.data = const_cast<void*>(a.input.data); }), "'scale'");
  EXPECT_EQ(error([](auto& a) { a.mode = kPerChannel; }),
            "'scale': expected shape [3, 4], got [2, 3] f32 cpu:0");
  EXPECT_EQ(error([](auto&) {}), "none") << "the arguments are good otherwise";
}

TEST_F(ScaledInt8QuantErrorTest, Modes) {
  EXPECT_EQ(error([](auto& a) { a.mode = static_cast<Int8QuantMode>(1); }),
            "'mode': expected 0 (per_channel) or 2 (per_token_head), got 1");
  EXPECT_EQ(error([](auto& a) {
              a.mode = kPerChannel;
              a.transpose_scale = true;
            }),
            "'transpose_scale': expected false per channel, got true");
  EXPECT_EQ(blamed([&](auto& a) { a.static_scale = {given_.data(), DType::f32, {3, 4}}; }),
            "'static_scale'");
}

TEST_F(ScaledInt8QuantErrorTest, StaticScales) {
  use_static_scale();
  EXPECT_EQ(blamed([](auto& a) { a.static_scale.shape[0] = 2; }), "'static_scale'");
  EXPECT_EQ(blamed([](auto& a) { a.static_scale.dtype = DType::i32; }), "'static_scale'");
  EXPECT_EQ(blamed([&](auto& a) { a.scale = {scale_.data(), DType::f32, {3, 4}}; }), "'scale'");
  for (const float bad : {0.0F, -2.0F, kInf, kNan}) {
    given_[6] = bad;
    EXPECT_EQ(blamed([](auto&) {}), "'static_scale'") << bad;
  }
  given_[6] = 0.0F;
  EXPECT_EQ(error([](auto&) {}),
            "'static_scale': expected finite scales above 0, got 0 at index [1, 2]");
  given_[6] = 1.0F;
  input_[17] = kNan;
  EXPECT_EQ(error([](auto&) {}),
            "'input': expected no NaN with a static scale, got NaN at index [1, 1, 1]");
  input_[17] = 1.0F;
  EXPECT_EQ(error([](auto&) {}), "none") << "the arguments are good otherwise";
}

}  // namespace
}  // namespace attend
