// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "dist/dcp_problem.h"

namespace attend {
namespace {

using testing::DcpProblem;
using testing::DcpShape;
using testing::HostTensor;
using testing::Rng;

/// Two ranks of which only rank 0 calls: a call that sent something would wait for ever.
class DcpBadInputTest : public ::testing::Test {
 protected:
  DcpBadInputTest() {
    DcpShape s;
    s.dtype = DType::f16;
    s.layout = {2, 4};
    s.kv_heads = 2;
    s.heads_a_rank = 2;
    s.dim = 16;
    s.dim_v = 8;
    s.context_lens = {40, 0, 5};
    s.query_lens = {1, 2, 3};
    Rng rng(1);
    problem_.emplace(s, rng);
  }

  std::string blamed(const std::function<void(DcpAttentionArgs&)>& change) {
    DcpProblem& p = *problem_;
    p.out.fill_bytes(0x5A);
    p.lse.fill_bytes(0x5A);
    DcpAttentionArgs a = p.args(0);
    change(a);
    std::string argument = "nothing";
    auto ranks = make_in_process_group(2);
    ranks[1]->abort();
    try {
      dcp_attention(a, *ranks[0]);
    } catch (const InvalidArgument& e) {
      argument = e.op() + " " + e.argument();
    } catch (const CommunicatorAborted&) {
      argument = "sent";
    }
    for (const HostTensor* t : {&p.out, &p.lse}) {
      for (const unsigned char byte : t->snapshot()) {
        if (byte != 0x5A) return argument + ", but wrote";
      }
    }
    return argument;
  }

  std::optional<DcpProblem> problem_;
};

TEST_F(DcpBadInputTest, Tensors) {
  EXPECT_EQ(blamed([](auto&) {}), "sent");
  EXPECT_EQ(blamed([](auto& a) { a.q = {}; }), "dcp_attention q");
  EXPECT_EQ(blamed([](auto& a) { a.q.dtype = DType::i8; }), "dcp_attention q");
  EXPECT_EQ(blamed([](auto& a) { a.q.shape[1] = 0; }), "dcp_attention q");
  EXPECT_EQ(blamed([](auto& a) { a.q.shape[2] = 12; }), "dcp_attention q");
  EXPECT_EQ(blamed([](auto& a) { a.q.shape[0] = 5; }), "dcp_attention k_new");
  EXPECT_EQ(blamed([](auto& a) { a.q.strides[2] = 2; }), "dcp_attention q");
  EXPECT_EQ(blamed([](auto& a) { a.k_cache.dtype = DType::bf16; }), "dcp_attention k_cache");
  EXPECT_EQ(blamed([](auto& a) { a.k_cache.shape[3] = 8; }), "dcp_attention k_cache");
  EXPECT_EQ(blamed([](auto& a) { a.k_cache.shape[2] = 0; }), "dcp_attention k_cache");
  EXPECT_EQ(blamed([](auto& a) { a.k_cache.shape[2] = 3; }), "dcp_attention q");
  EXPECT_EQ(blamed([](auto& a) { a.k_cache.shape[1] = a.v_cache.shape[1] = 12; }),
            "dcp_attention k_cache");
  EXPECT_EQ(blamed([](auto& a) { a.v_cache.shape[0] = 1; }), "dcp_attention v_cache");
  EXPECT_EQ(blamed([](auto& a) { a.v_cache.shape[2] = 1; }), "dcp_attention v_cache");
  EXPECT_EQ(blamed([](auto& a) { a.v_cache.shape[3] = 4; }), "dcp_attention v_cache");
  EXPECT_EQ(blamed([](auto& a) { a.k_new.shape[1] = 1; }), "dcp_attention k_new");
  EXPECT_EQ(blamed([](auto& a) { a.k_new.dtype = DType::f32; }), "dcp_attention k_new");
  EXPECT_EQ(blamed([](auto& a) { a.v_new.shape[2] = 4; }), "dcp_attention v_new");
  EXPECT_EQ(blamed([](auto& a) { a.v_new.data = nullptr; }), "dcp_attention v_new");
  EXPECT_EQ(blamed([](auto& a) { a.out.shape[2] = 4; }), "dcp_attention out");
  EXPECT_EQ(blamed([](auto& a) { a.out.strides[0] = 0; }), "dcp_attention out");
  EXPECT_EQ(blamed([](auto& a) { a.lse.shape[1] = 4; }), "dcp_attention lse");
  EXPECT_EQ(blamed([](auto& a) { a.lse.strides[1] = 0; }), "dcp_attention lse");
}

TEST_F(DcpBadInputTest, Overlap) {
  DcpProblem& p = *problem_;
  EXPECT_EQ(blamed([&](auto& a) {
              a.q = a.out.slice(2, 0, 8);
              a.k_cache = a.v_cache;
              a.k_new = a.v_new;
            }),
            "dcp_attention out");
  EXPECT_EQ(blamed([&](auto& a) { a.out.data = p.v_cache[0].view().data; }), "dcp_attention out");
  EXPECT_EQ(blamed([&](auto& a) { a.lse.data = p.k_new.view().data; }), "dcp_attention lse");
  EXPECT_EQ(blamed([&](auto& a) { a.lse.data = p.out.view().data; }), "dcp_attention lse");
  EXPECT_EQ(blamed([&](auto& a) { a.lse.data = p.seq_lens.view().data; }), "dcp_attention lse");
}

TEST_F(DcpBadInputTest, Parameters) {
  EXPECT_EQ(blamed([](auto& a) { a.interleave = 0; }), "dcp_attention interleave");
  EXPECT_EQ(blamed([](auto& a) { a.interleave = 32; }), "dcp_attention interleave");
  EXPECT_EQ(blamed([](auto& a) { a.interleave = 16; }), "sent");
  EXPECT_EQ(blamed([](auto& a) { a.params.scale = -1.0F; }), "dcp_attention scale");
  EXPECT_EQ(blamed([](auto& a) { a.params.softcap = -1.0F; }), "dcp_attention softcap");
  const std::vector<std::uint8_t> flags = {1, 0};
  EXPECT_EQ(blamed([&](auto& a) { a.request_causal = flags; }), "dcp_attention request_causal");
}

TEST_F(DcpBadInputTest, LengthsAndBlocks) {
  const auto with = [&](const HostTensor& t, std::size_t index, std::int32_t value) {
    std::int32_t& entry = t.as<std::int32_t>()[index];
    const std::int32_t before = std::exchange(entry, value);
    const std::string argument = blamed([](auto&) {});
    entry = before;
    return argument;
  };
  const DcpProblem& p = *problem_;
  EXPECT_EQ(with(p.query_start_loc, 0, 1), "dcp_attention query_start_loc");
  EXPECT_EQ(with(p.query_start_loc, 1, 4), "dcp_attention query_start_loc");
  EXPECT_EQ(with(p.query_start_loc, 3, 5), "dcp_attention query_start_loc");
  EXPECT_EQ(with(p.seq_lens, 2, 2), "dcp_attention seq_lens");
  EXPECT_EQ(with(p.seq_lens, 0, -1), "dcp_attention seq_lens");
  EXPECT_EQ(with(p.seq_lens, 0, std::numeric_limits<std::int32_t>::max()),
            "dcp_attention block_table");
  // The context of request 0 fills two blocks on rank 0; that of request 1 none.
  EXPECT_EQ(with(p.block_table, 1, 99), "dcp_attention block_table");
  EXPECT_EQ(with(p.block_table, 1, -1), "dcp_attention block_table");
  EXPECT_EQ(with(p.block_table, static_cast<std::size_t>(p.block_table.view().shape[1]), -1),
            "sent");
  EXPECT_EQ(blamed([](auto& a) { a.block_table.shape[0] = 2; }), "dcp_attention block_table");
  EXPECT_EQ(blamed([](auto& a) { a.block_table.shape[1] = 1; }), "dcp_attention block_table");
  EXPECT_EQ(blamed([](auto& a) { a.block_table.dtype = DType::i64; }), "dcp_attention block_table");
  EXPECT_EQ(blamed([](auto& a) { a.seq_lens.shape[0] = 2; }), "dcp_attention seq_lens");
  EXPECT_EQ(blamed([](auto& a) { a.query_start_loc.shape[0] = 0; }),
            "dcp_attention query_start_loc");
}

TEST_F(DcpBadInputTest, WhatIsNotSupportedIsRefusedWithAllReasons) {
  auto ranks = make_in_process_group(2);
  DcpAttentionArgs a = problem_->args(0);
  const HostTensor slopes(DType::f32, {2});
  a.params.window_left = 8;
  a.params.alibi_slopes = slopes;
  a.params.sinks = slopes;
  try {
    dcp_attention(a, *ranks[0]);
    ADD_FAILURE() << "no exception";
  } catch (const Unsupported& e) {
    EXPECT_EQ(e.reasons().size(), 3U) << e.what();
  }
}

TEST_F(DcpBadInputTest, ARankThatFailsDoesNotLeaveTheOthersWaiting) {
  const auto body = [&](Communicator& c) {
    DcpAttentionArgs a = problem_->args(c.rank());
    if (c.rank() == 1) a.interleave = 0;
    dcp_attention(a, c);
  };
  EXPECT_THROW(run_in_process(2, body), InvalidArgument);
}

}  // namespace
}  // namespace attend
