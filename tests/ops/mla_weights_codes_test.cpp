// SPDX-License-Identifier: Apache-2.0
// Weights of codes, and what from_kv_b_proj and the products refuse.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "attend/core/error.h"
#include "attend/ops/mla_weights.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::Rng;

// 3 heads of 64 + 80 rows: blocks of 128 rows cut through heads.
constexpr MlaDims kDims = {
    .kv_lora_rank = 136, .qk_nope_head_dim = 64, .qk_rope_head_dim = 64, .v_head_dim = 80};
constexpr int kHeads = 3;
constexpr std::int64_t kRows = kHeads * (64 + 80), kColumns = 136;

struct Coded {
  Coded(Rng& rng, DType code, std::initializer_list<std::int64_t> scale_shape)
      : codes(code, {kRows, kColumns}), scale(DType::f32, scale_shape) {
    for (std::int64_t i = 0; i < codes.numel(); ++i) {
      auto bits = static_cast<std::uint8_t>(rng.integer(0, 255));
      if (code == DType::fp8_e4m3 && (bits & 0x7f) == 0x7f) bits = 0;  // NaN
      codes.as<std::uint8_t>()[static_cast<std::size_t>(i)] = bits;
    }
    scale.fill_uniform(rng, 0.001F, 0.1F);
    args.weight = codes;
    args.weight_scale = scale;
    args.dims = kDims;
    args.num_heads = kHeads;
  }
  float value(std::int64_t row, std::int64_t column) const {
    const auto at = static_cast<std::size_t>(row * kColumns + column);
    if (codes.view().dtype == DType::i8) return codes.as<std::int8_t>()[at];
    return to_f32(codes.as<fp8_e4m3>()[at]);
  }
  HostTensor codes, scale;
  KvBProjArgs args;
};

void expect_exact(Coded& coded, DType dtype,
                  const std::function<float(std::int64_t, std::int64_t)>& scale_of) {
  coded.args.dtype = dtype;
  const auto weights = MlaWeights::from_kv_b_proj(coded.args);
  const std::int64_t l = kColumns, p = 64, v = 80;
  HostTensor uk_t(dtype, {kHeads, p, l}), uv(dtype, {kHeads, l, v}), one(dtype, {1});
  weights->copy_w_uk_t(uk_t);
  weights->copy_w_uv(uv);
  for (std::int64_t row = 0; row < kRows; ++row) {
    const std::int64_t h = row / (p + v), d = row % (p + v);
    for (std::int64_t k = 0; k < l; ++k) {
      one.fill([&] { return coded.value(row, k) * scale_of(row, k); });
      const double got =
          d < p ? testing::get(uk_t.view(), {h, d, k}) : testing::get(uv.view(), {h, k, d - p});
      ASSERT_EQ(got, testing::get(one.view(), {0})) << "row " << row << " column " << k;
    }
  }
}

class MlaWeightsOfCodes : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(Codes, MlaWeightsOfCodes, ::testing::Values(DType::i8, DType::fp8_e4m3),
                         [](const auto& info) { return std::string(to_string(info.param)); });

TEST_P(MlaWeightsOfCodes, AreConvertedExactlyWithEveryKindOfScale) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    Coded tensor(rng, GetParam(), {1});
    expect_exact(tensor, dtype, [&](auto, auto) { return tensor.scale.as<float>()[0]; });
    Coded rows(rng, GetParam(), {kRows});
    expect_exact(rows, dtype, [&](std::int64_t row, auto) {
      return rows.scale.as<float>()[static_cast<std::size_t>(row)];
    });
    Coded blocks(rng, GetParam(), {4, 2});
    expect_exact(blocks, dtype, [&](std::int64_t row, std::int64_t column) {
      return blocks.scale.as<float>()[static_cast<std::size_t>(row / 128 * 2 + column / 128)];
    });
  }
}

TEST(MlaWeightsConversion, RoundsOnceToTheTypeOfTheLayer) {
  const MlaDims dims = {8, 8, 8, 8};
  HostTensor weight(DType::f32, {16, 8}), uv(DType::bf16, {1, 8, 8});
  // Between two bf16 numbers: a tie to even, just above it, and beyond f32's subnormals.
  weight.fill([] { return 1.0F + 0x1p-8F; });
  weight.as<float>()[8 * 8] = 1.0F + 0x1p-8F + 0x1p-20F;
  const auto weights = MlaWeights::from_kv_b_proj({.weight = weight, .dims = dims, .num_heads = 1});
  weights->copy_w_uv(uv);
  EXPECT_EQ(testing::get(uv.view(), {0, 0, 0}), 1.0 + 0x1p-7);
  EXPECT_EQ(testing::get(uv.view(), {0, 1, 0}), 1.0);
}

/// Argument that from_kv_b_proj blames after `change`.
std::string blamed(DType code, std::initializer_list<std::int64_t> scale_shape,
                   const std::function<void(Coded&)>& change) {
  Rng rng(2);
  Coded coded(rng, code, scale_shape);
  change(coded);
  try {
    MlaWeights::from_kv_b_proj(coded.args);
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.op(), "MlaWeights::from_kv_b_proj");
    return e.argument();
  }
  return "nothing";
}

TEST(MlaWeightsBadInput, Weight) {
  const auto weight_blamed = [](const std::function<void(KvBProjArgs&)>& change) {
    return blamed(DType::i8, {1}, [&](Coded& c) { change(c.args); });
  };
  EXPECT_EQ(weight_blamed([](auto&) {}), "nothing");
  EXPECT_EQ(weight_blamed([](auto& a) { a.weight = {}; }), "weight");
  EXPECT_EQ(weight_blamed([](auto& a) { a.weight.shape[0] -= 1; }), "weight");
  EXPECT_EQ(weight_blamed([](auto& a) { a.weight.shape[1] -= 8; }), "weight");
  EXPECT_EQ(weight_blamed([](auto& a) { a.weight = a.weight.permute({1, 0}); }), "weight");
  EXPECT_EQ(weight_blamed([](auto& a) { a.weight.strides[1] = 2; }), "weight");
  EXPECT_EQ(weight_blamed([](auto& a) { a.weight.dtype = DType::u8; }), "weight");
  EXPECT_EQ(weight_blamed([](auto& a) { a.weight.dtype = DType::fp8_e5m2; }), "weight");
  EXPECT_EQ(weight_blamed([](auto& a) { a.num_heads = 2; }), "weight");
  EXPECT_EQ(weight_blamed([](auto& a) { a.num_heads = 0; }), "num_heads");
  EXPECT_EQ(weight_blamed([](auto& a) { a.dtype = DType::i8; }), "dtype");
  EXPECT_EQ(weight_blamed([](auto& a) { a.dims.kv_lora_rank = 0; }), "dims.kv_lora_rank");
  EXPECT_EQ(weight_blamed([](auto& a) { a.dims.qk_nope_head_dim = 12; }), "dims.qk_nope_head_dim");
  EXPECT_EQ(weight_blamed([](auto& a) { a.dims.v_head_dim = -8; }), "dims.v_head_dim");
}

TEST(MlaWeightsBadInput, Scales) {
  constexpr const char* kScale = "weight_scale";
  const auto good = [](Coded&) {};
  EXPECT_EQ(blamed(DType::fp8_e4m3, {kRows}, good), "nothing");
  EXPECT_EQ(blamed(DType::fp8_e4m3, {4, 2}, good), "nothing");
  EXPECT_EQ(blamed(DType::fp8_e4m3, {3, 2}, good), kScale);
  EXPECT_EQ(blamed(DType::fp8_e4m3, {4, 1}, good), kScale);
  EXPECT_EQ(blamed(DType::fp8_e4m3, {kRows - 1}, good), kScale);
  EXPECT_EQ(blamed(DType::fp8_e4m3, {8}, good), kScale);
  EXPECT_EQ(blamed(DType::fp8_e4m3, {4, 2, 1}, good), kScale);
  EXPECT_EQ(blamed(DType::i8, {1}, [](Coded& c) { c.args.weight_scale = {}; }), kScale);
  EXPECT_EQ(blamed(DType::i8, {1}, [](Coded& c) { c.args.weight_scale.dtype = DType::i32; }),
            kScale);
  EXPECT_EQ(blamed(DType::i8, {4, 2}, [](Coded& c) { c.args.weight_scale.strides[0] = 1; }),
            kScale);
  for (const float bad : {0.0F, -1.0F, std::numeric_limits<float>::infinity(), std::nanf("")})
    EXPECT_EQ(blamed(DType::i8, {kRows}, [&](Coded& c) { c.scale.as<float>()[kRows - 1] = bad; }),
              kScale);
  HostTensor plain(DType::bf16, {kRows, kColumns});
  EXPECT_EQ(blamed(DType::i8, {1}, [&](Coded& c) { c.args.weight = plain; }), kScale);
}

/// Outputs that are written before a call, and the arguments of up_project and absorb_query.
struct Call {
  Call()
      : weight(DType::f32, {kRows, kColumns}),
        kv_c(DType::f32, {5, kColumns}),
        k_nope(DType::f32, {5, kHeads, 64}),
        v(DType::f32, {5, kHeads, 80}),
        latents(DType::f32, {5, kHeads, kColumns}) {
    for (const HostTensor* t : {&k_nope, &v, &latents})
      std::memset(t->view().data, 0x5a, t->bytes());
    weights = MlaWeights::from_kv_b_proj(
        {.weight = weight, .dims = kDims, .num_heads = kHeads, .dtype = DType::f32});
  }
  bool untouched() const {
    for (const HostTensor* t : {&k_nope, &v, &latents})
      for (const unsigned char byte : t->snapshot())
        if (byte != 0x5a) return false;
    return true;
  }
  HostTensor weight, kv_c, k_nope, v, latents;
  std::shared_ptr<const MlaWeights> weights;
};

/// Argument that the call blames; "wrote" if it wrote all the same.
std::string blamed_call(const std::function<void(Call&)>& call) {
  Call c;
  std::string argument = "nothing";
  try {
    call(c);
  } catch (const InvalidArgument& e) {
    argument = e.argument();
    if (!c.untouched()) argument = "wrote";
  }
  return argument;
}

std::string up(const std::function<void(ConstTensorView&, TensorView&, TensorView&)>& change) {
  return blamed_call([&](Call& c) {
    ConstTensorView kv_c = c.kv_c;
    TensorView k_nope = c.k_nope, v = c.v;
    change(kv_c, k_nope, v);
    c.weights->up_project(kv_c, k_nope, v);
  });
}

TEST(MlaWeightsBadInput, UpProject) {
  EXPECT_EQ(up([](auto&, auto&, auto&) {}), "nothing");
  EXPECT_EQ(up([](auto& kv_c, auto&, auto&) { kv_c.dtype = DType::bf16; }), "kv_c");
  EXPECT_EQ(up([](auto& kv_c, auto&, auto&) { kv_c.shape[1] = 128; }), "kv_c");
  EXPECT_EQ(up([](auto& kv_c, auto&, auto&) { kv_c.data = nullptr; }), "kv_c");
  EXPECT_EQ(up([](auto& kv_c, auto&, auto&) { kv_c.shape[0] = 4; }), "k_nope");
  EXPECT_EQ(up([](auto&, auto& k, auto&) { k.shape[2] = 72; }), "k_nope");
  EXPECT_EQ(up([](auto&, auto& k, auto&) { k.strides[0] = 0; }), "k_nope");
  EXPECT_EQ(up([](auto&, auto&, auto& v) { v.shape[1] = 2; }), "v");
  EXPECT_EQ(up([](auto&, auto&, auto& v) { v.dtype = DType::f16; }), "v");
  EXPECT_EQ(
      up([](auto&, auto& k, auto& v) { k = TensorView(v.data, DType::f32, {5, kHeads, 64}); }),
      "v");
  EXPECT_EQ(
      up([](auto& kv_c, auto& k, auto&) { kv_c = TensorView(k.data, DType::f32, {5, kColumns}); }),
      "k_nope");
}

TEST(MlaWeightsBadInput, ProductsOfHeads) {
  const auto absorb = [](const std::function<void(ConstTensorView&, TensorView&)>& change) {
    return blamed_call([&](Call& c) {
      ConstTensorView q = c.k_nope;
      TensorView latents = c.latents;
      change(q, latents);
      c.weights->absorb_query(q, latents);
    });
  };
  EXPECT_EQ(absorb([](auto&, auto&) {}), "nothing");
  EXPECT_EQ(absorb([](auto& q, auto&) { q.shape[1] = 2; }), "q_nope");
  EXPECT_EQ(absorb([](auto& q, auto&) { q.dtype = DType::bf16; }), "q_nope");
  EXPECT_EQ(absorb([](auto& q, auto&) { q.strides[2] = 3; }), "q_nope");
  EXPECT_EQ(absorb([](auto& q, auto&) { q.shape[0] = 4; }), "ql_nope");
  EXPECT_EQ(absorb([](auto&, auto& out) { out.strides[1] = 8; }), "ql_nope");
  EXPECT_EQ(absorb([](auto& q, auto& out) { q.data = out.data; }), "ql_nope");
  const auto v_up = [](const std::function<void(ConstTensorView&, TensorView&)>& change) {
    return blamed_call([&](Call& c) {
      ConstTensorView latents = c.latents;
      TensorView out = c.v;
      change(latents, out);
      c.weights->v_up_project(latents, out);
    });
  };
  EXPECT_EQ(v_up([](auto&, auto&) {}), "nothing");
  EXPECT_EQ(v_up([](auto& latents, auto&) { latents.shape[2] = 128; }), "latents");
  EXPECT_EQ(v_up([](auto&, auto& out) { out = out.slice(2, 0, 72); }), "out");
  EXPECT_EQ(v_up([](auto& latents, auto& out) { out.data = const_cast<void*>(latents.data); }),
            "out");
  EXPECT_EQ(blamed_call([](Call& c) { c.weights->copy_w_uv(c.latents); }), "out");
  EXPECT_EQ(blamed_call([](Call& c) { c.weights->copy_w_uk_t(c.v); }), "out");
}

}  // namespace
}  // namespace attend
