// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "dist/dcp_differential_problem.h"

namespace attend {
namespace {

using testing::DcpDifferentialProblem;
using testing::DcpDifferentialShape;
using testing::HostTensor;
using testing::Rng;

DcpDifferentialShape small_shape(DifferentialVariant variant) {
  DcpDifferentialShape s;
  s.base.dtype = DType::f16;
  s.base.layout = {2, 4};
  s.base.kv_heads = 2;
  s.base.heads_a_rank = 4;
  s.base.dim = 16;
  s.base.context_lens = {40, 0, 5};
  s.base.query_lens = {1, 2, 3};
  s.variant = variant;
  return s;
}

using Change = std::function<void(DcpDifferentialAttentionArgs&)>;

/// Argument that a call of rank 0 of two blames, or the reason, or how many reasons there are. Only
/// that rank calls: one that sent something would wait for ever.
std::string blamed_by(DcpDifferentialProblem& p, const Change& change,
                      const KernelOptions& kernels = {}) {
  p.out.fill_bytes(0x5A);
  p.lse[0].fill_bytes(0x5A);
  DcpDifferentialAttentionArgs a = p.args(0);
  change(a);
  std::string argument = "nothing";
  auto ranks = make_in_process_group(2);
  ranks[1]->abort();
  try {
    dcp_differential_attention(a, *ranks[0], nullptr, kernels);
  } catch (const InvalidArgument& e) {
    argument = e.op() == "dcp_differential_attention" ? e.argument() : e.op();
  } catch (const Unsupported& e) {
    argument = e.reasons().size() == 1 ? e.reasons()[0] : std::to_string(e.reasons().size());
  } catch (const CommunicatorAborted&) {
    argument = "sent";
  }
  for (const HostTensor* t : {&p.out, &p.lse[0]}) {
    for (const unsigned char byte : t->snapshot()) {
      if (byte != 0x5A) return argument + ", but wrote";
    }
  }
  return argument;
}

class DcpDifferentialBadInputTest : public ::testing::Test {
 protected:
  DcpDifferentialBadInputTest() : rng_(1), v1_(small_shape(DifferentialVariant::v1), rng_) {}

  std::string blamed(const Change& change) { return blamed_by(v1_, change); }

  Rng rng_;
  DcpDifferentialProblem v1_;
};

TEST_F(DcpDifferentialBadInputTest, Tensors) {
  EXPECT_EQ(blamed([](auto&) {}), "sent");
  EXPECT_EQ(blamed([](auto& a) { a.q = {}; }), "q");
  EXPECT_EQ(blamed([](auto& a) { a.q.dtype = DType::fp8_e4m3; }), "q");
  EXPECT_EQ(blamed([](auto& a) { a.q.shape[1] = 3; }), "q");
  EXPECT_EQ(blamed([](auto& a) { a.q.shape[1] = 0; }), "q");
  EXPECT_EQ(blamed([](auto& a) { a.q.shape[2] = 12; }), "q");
  EXPECT_EQ(blamed([](auto& a) { a.k_cache = a.k_cache.select(0, 0); }), "k_cache");
  EXPECT_EQ(blamed([](auto& a) { a.k_cache.shape[0] = 1; }), "k_cache");
  EXPECT_EQ(blamed([](auto& a) { a.k_cache.dtype = DType::bf16; }), "k_cache");
  EXPECT_EQ(blamed([](auto& a) { a.k_cache.shape[3] = 0; }), "k_cache");
  EXPECT_EQ(blamed([](auto& a) { a.k_cache.shape[3] = 3; }), "q");
  EXPECT_EQ(blamed([](auto& a) { a.k_cache.shape[2] = a.v_cache.shape[2] = 12; }), "k_cache");
  EXPECT_EQ(blamed([](auto& a) { a.v_cache = a.v_cache.select(0, 0); }), "v_cache");
  EXPECT_EQ(blamed([](auto& a) { a.v_cache.shape[1] = 1; }), "v_cache");
  EXPECT_EQ(blamed([](auto& a) { a.v_cache.shape[4] = a.v_new.shape[2] = a.out.shape[2] = 8; }),
            "v_cache");
  EXPECT_EQ(blamed([](auto& a) { a.k_new.shape[1] = 1; }), "k_new");
  EXPECT_EQ(blamed([](auto& a) { a.v_new.data = nullptr; }), "v_new");
  EXPECT_EQ(blamed([](auto& a) { a.out.shape[1] = 2; }), "out");
  EXPECT_EQ(blamed([](auto& a) { a.out.strides[0] = 0; }), "out");
  EXPECT_EQ(blamed([](auto& a) { a.lse.shape[1] = 2; }), "lse");
}

TEST_F(DcpDifferentialBadInputTest, Overlap) {
  // The second branch is read as well.
  EXPECT_EQ(blamed([&](auto& a) { a.out.data = v1_.v_cache[0].view().select(0, 1).data; }), "out");
  EXPECT_EQ(blamed([&](auto& a) { a.lse.data = v1_.k_new.view().data; }), "lse");
  EXPECT_EQ(blamed([&](auto& a) { a.lse.data = v1_.out.view().data; }), "lse");
  EXPECT_EQ(blamed([&](auto& a) { a.combine.norm_weight.data = a.lse.data; }), "lse");
  EXPECT_EQ(blamed([&](auto& a) { a.combine.norm_weight.data = a.out.data; }), "out");
}

TEST_F(DcpDifferentialBadInputTest, Combination) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(blamed([](auto& a) { a.combine.lambda = kNan; }), "lambda");
  EXPECT_EQ(blamed([](auto& a) { a.combine.norm_eps = 0.0F; }), "norm_eps");
  EXPECT_EQ(blamed([](auto& a) { a.combine.out_scale = kNan; }), "out_scale");
  EXPECT_EQ(blamed([](auto& a) { a.combine.norm_weight.shape[0] = 16; }), "norm_weight");
  EXPECT_EQ(blamed([](auto& a) { a.combine.norm = false; }), "norm_weight");
  EXPECT_EQ(blamed([&](auto& a) { a.combine.token_lambda = v1_.token_lambda; }), "token_lambda");
}

TEST_F(DcpDifferentialBadInputTest, VariantV2) {
  DcpDifferentialProblem v2(small_shape(DifferentialVariant::v2), rng_);
  EXPECT_EQ(blamed_by(v2, [](auto&) {}), "sent");
  EXPECT_EQ(blamed_by(v2, [](auto& a) { a.pairing = HeadPairing::halves; }), "pairing");
  EXPECT_EQ(blamed_by(v2, [](auto& a) { a.combine.token_lambda = {}; }), "token_lambda");
  EXPECT_EQ(blamed_by(v2, [](auto& a) { a.combine.token_lambda.shape[1] = 1; }), "token_lambda");
  EXPECT_EQ(blamed_by(v2, [](auto& a) { a.combine.norm = true; }), "norm");
  EXPECT_EQ(blamed_by(v2, [](auto& a) { a.out.shape[1] = 4; }), "out");
  // Eight heads on both ranks: four kv heads have a pair each, eight do not.
  EXPECT_EQ(blamed_by(v2, [](auto& a) { a.k_cache.shape[2] = 8; }), "q");
}

TEST_F(DcpDifferentialBadInputTest, ParametersLengthsAndBlocks) {
  EXPECT_EQ(blamed([](auto& a) { a.interleave = 32; }), "interleave");
  EXPECT_EQ(blamed([](auto& a) { a.params.softcap = -1.0F; }), "softcap");
  EXPECT_EQ(blamed([](auto& a) { a.block_table.shape[1] = 1; }), "block_table");
  EXPECT_EQ(blamed([](auto& a) { a.seq_lens.shape[0] = 2; }), "seq_lens");
  EXPECT_EQ(blamed([](auto& a) { a.query_start_loc.shape[0] = 0; }), "query_start_loc");
  v1_.maps.block_table.as<std::int32_t>()[1] = 99;
  EXPECT_EQ(blamed([](auto&) {}), "block_table");
}

TEST_F(DcpDifferentialBadInputTest, WhatIsNotSupportedIsRefusedWithAllReasons) {
  const HostTensor slopes(DType::f32, {4});
  EXPECT_EQ(blamed([&](auto& a) {
              a.params.window_left = 8;
              a.params.alibi_slopes = slopes;
              a.params.sinks = slopes;
            }),
            "3");
  EXPECT_EQ(
      blamed_by(v1_, [](auto&) {}, Arithmetic::fast), "there are no fast kernels for two maps");
}

}  // namespace
}  // namespace attend
