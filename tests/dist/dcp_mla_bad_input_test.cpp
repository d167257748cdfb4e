// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <utility>

#include "dist/dcp_mla_problem.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::MlaBatch;
using testing::MlaBatchShape;
using testing::MlaRanks;
using testing::Rng;

MlaBatchShape small_shape() {
  MlaBatchShape s;
  s.dtype = s.kv_dtype = DType::f16;
  s.heads = 4;
  s.seq_lens = {41, 2, 8};
  s.query_lens = {1, 0, 3};
  return s;
}

/// Two ranks of which only rank 0 calls: a call that sent something finds the group aborted.
class DcpMlaBadInput : public ::testing::Test {
 protected:
  DcpMlaBadInput()
      : rng_(1),
        batch_(small_shape(), rng_),
        ranks_(batch_, {2, 4}, 16, rng_),
        dst_(DType::f16, {60, batch_.shape.dim()}) {}

  /// Argument that the call is blamed for.
  static std::string blamed(const std::function<void(Communicator&)>& call,
                            std::initializer_list<HostTensor*> written) {
    for (HostTensor* t : written) t->fill_bytes(0x5A);
    std::string argument = "nothing";
    auto group = make_in_process_group(2);
    group[1]->abort();
    try {
      call(*group[0]);
    } catch (const InvalidArgument& e) {
      argument = e.op() + " " + e.argument();
    } catch (const CommunicatorAborted&) {
      argument = "sent";
    }
    for (const HostTensor* t : written) {
      for (const unsigned char byte : t->snapshot()) {
        if (byte != 0x5A) return argument + ", but wrote";
      }
    }
    return argument;
  }

  std::string decode(const std::function<void(DcpMlaDecodeArgs&)>& change) {
    DcpMlaDecodeArgs a = ranks_.args(0);
    change(a);
    return blamed([&](Communicator& c) { dcp_mla_decode(a, c); }, {&ranks_.out, &ranks_.lse});
  }

  DcpGatherLatentsArgs gather_args() const {
    DcpGatherLatentsArgs a;
    a.src_cache = ranks_.cache[0];
    a.dst = dst_;
    a.block_table = ranks_.block_table;
    a.cu_seq_lens = batch_.cu_seq_lens;
    a.interleave = ranks_.layout.interleave;
    return a;
  }
  std::string gather(const std::function<void(DcpGatherLatentsArgs&)>& change) {
    DcpGatherLatentsArgs a = gather_args();
    change(a);
    return blamed([&](Communicator& c) { dcp_gather_latents(a, c); }, {&dst_});
  }

  /// What `call` is blamed for while an entry of `t` has another value.
  template <typename Call>
  std::string with(const HostTensor& t, std::size_t index, std::int32_t value, Call&& call) {
    std::int32_t& entry = t.as<std::int32_t>()[index];
    const std::int32_t before = std::exchange(entry, value);
    const std::string argument = call();
    entry = before;
    return argument;
  }

  Rng rng_;
  MlaBatch batch_;
  MlaRanks ranks_;
  HostTensor dst_;
};

constexpr auto kAsIs = [](auto&) {};
constexpr std::int32_t kMost = std::numeric_limits<std::int32_t>::max();

TEST_F(DcpMlaBadInput, DecodeTensors) {
  EXPECT_EQ(decode(kAsIs), "sent");
  EXPECT_EQ(decode([](auto& a) { a.q = {}; }), "dcp_mla_decode q");
  EXPECT_EQ(decode([](auto& a) { a.q.dtype = DType::i8; }), "dcp_mla_decode q");
  EXPECT_EQ(decode([](auto& a) { a.q.shape[1] = 0; }), "dcp_mla_decode q");
  EXPECT_EQ(decode([](auto& a) { a.q.shape[2] = 12; }), "dcp_mla_decode q");
  EXPECT_EQ(decode([](auto& a) { a.q.strides[2] = 2; }), "dcp_mla_decode q");
  EXPECT_EQ(decode([](auto& a) { a.kv_cache.dtype = DType::bf16; }), "dcp_mla_decode kv_cache");
  EXPECT_EQ(decode([](auto& a) { a.kv_cache.shape[2] = 32; }), "dcp_mla_decode kv_cache");
  EXPECT_EQ(decode([](auto& a) { a.kv_cache.shape[1] = 12; }), "dcp_mla_decode kv_cache");
  EXPECT_EQ(decode([](auto& a) { a.kv_cache.data = nullptr; }), "dcp_mla_decode kv_cache");
  EXPECT_EQ(decode([](auto& a) { a.kv_cache.dtype = DType::u8; }), "dcp_mla_decode q");
  EXPECT_EQ(decode([](auto& a) { a.kv_cache.dtype = DType::fp8_e4m3; }), "dcp_mla_decode kv_scale");
  EXPECT_EQ(decode([](auto& a) { a.out.shape[2] = 4; }), "dcp_mla_decode out");
  EXPECT_EQ(decode([](auto& a) { a.out.shape[2] = 48; }), "dcp_mla_decode out");
  EXPECT_EQ(decode([](auto& a) { a.out.strides[0] = 0; }), "dcp_mla_decode out");
  EXPECT_EQ(decode([](auto& a) { a.lse.shape[1] = 4; }), "dcp_mla_decode lse");
  EXPECT_EQ(decode([](auto& a) { a.lse.strides[1] = 0; }), "dcp_mla_decode lse");
  EXPECT_EQ(decode([&](auto& a) { a.out.data = batch_.q.view().data; }), "dcp_mla_decode out");
  EXPECT_EQ(decode([&](auto& a) { a.lse.data = ranks_.cache[0].view().data; }),
            "dcp_mla_decode lse");
}

TEST_F(DcpMlaBadInput, DecodeOfMoreHeadsThanAnyModelHas) {
  const HostTensor out(DType::f16, {4, 32'769, batch_.shape.latent});
  EXPECT_EQ(decode([&](auto& a) {
              a.q.shape[1] = out.view().shape[1];
              a.q.strides[1] = 0;
              a.out = out;
              a.lse = {};
            }),
            "dcp_mla_decode q");
}

TEST_F(DcpMlaBadInput, DecodeParameters) {
  EXPECT_EQ(decode([](auto& a) { a.interleave = 0; }), "dcp_mla_decode interleave");
  EXPECT_EQ(decode([](auto& a) { a.interleave = 32; }), "dcp_mla_decode interleave");
  EXPECT_EQ(decode([](auto& a) { a.interleave = 16; }), "sent");
  EXPECT_EQ(decode([](auto& a) { a.params.scale.reset(); }), "dcp_mla_decode scale");
  EXPECT_EQ(decode([](auto& a) { a.params.scale = -1.0F; }), "dcp_mla_decode scale");
  EXPECT_EQ(decode([](auto& a) { a.params.softcap = -1.0F; }), "dcp_mla_decode softcap");
  EXPECT_EQ(decode([&](auto& a) { a.kv_scale = batch_.kv_scale; }), "dcp_mla_decode kv_scale");
}

TEST_F(DcpMlaBadInput, DecodeLengthsAndBlocks) {
  const auto call = [&] { return decode(kAsIs); };
  const auto columns = static_cast<std::size_t>(ranks_.block_table.view().shape[1]);
  EXPECT_EQ(with(batch_.query_start_loc, 0, 1, call), "dcp_mla_decode query_start_loc");
  EXPECT_EQ(with(batch_.query_start_loc, 1, 5, call), "dcp_mla_decode query_start_loc");
  EXPECT_EQ(with(batch_.query_start_loc, 3, 3, call), "dcp_mla_decode query_start_loc");
  EXPECT_EQ(with(batch_.seq_lens, 2, 2, call), "dcp_mla_decode seq_lens");
  EXPECT_EQ(with(batch_.seq_lens, 0, -1, call), "dcp_mla_decode seq_lens");
  EXPECT_EQ(with(batch_.seq_lens, 0, kMost, call), "dcp_mla_decode block_table");
  // Request 0 has two blocks on rank 0; nobody asks for request 1.
  EXPECT_EQ(with(ranks_.block_table, 1, 99, call), "dcp_mla_decode block_table");
  EXPECT_EQ(with(ranks_.block_table, 1, -1, call), "dcp_mla_decode block_table");
  EXPECT_EQ(with(ranks_.block_table, columns, -1, call), "sent");
  EXPECT_EQ(decode([](auto& a) { a.block_table.shape[0] = 2; }), "dcp_mla_decode block_table");
  EXPECT_EQ(decode([](auto& a) { a.block_table.shape[1] = 1; }), "dcp_mla_decode block_table");
  EXPECT_EQ(decode([](auto& a) { a.block_table.strides[1] = 2; }), "dcp_mla_decode block_table");
  EXPECT_EQ(decode([](auto& a) { a.block_table.dtype = DType::i64; }),
            "dcp_mla_decode block_table");
  EXPECT_EQ(decode([](auto& a) { a.seq_lens.shape[0] = 2; }), "dcp_mla_decode seq_lens");
  EXPECT_EQ(decode([](auto& a) { a.query_start_loc.shape[0] = 0; }),
            "dcp_mla_decode query_start_loc");
}

TEST_F(DcpMlaBadInput, WhatIsNotSupportedIsRefusedWithAllReasons) {
  auto group = make_in_process_group(2);
  DcpMlaDecodeArgs a = ranks_.args(0);
  const HostTensor values(DType::f32, {2});
  a.params.window_right = 8;
  a.params.alibi_slopes = values;
  a.params.sinks = values;
  try {
    dcp_mla_decode(a, *group[0]);
    ADD_FAILURE() << "no exception";
  } catch (const Unsupported& e) {
    EXPECT_EQ(e.reasons().size(), 3U) << e.what();
    EXPECT_NE(std::string(e.what()).find("dcp_mla_decode"), std::string::npos) << e.what();
  }
}

TEST_F(DcpMlaBadInput, GatherTensors) {
  EXPECT_EQ(gather(kAsIs), "sent");
  EXPECT_EQ(gather([](auto& a) { a.src_cache = {}; }), "dcp_gather_latents src_cache");
  EXPECT_EQ(gather([](auto& a) { a.src_cache.strides[2] = 2; }), "dcp_gather_latents src_cache");
  EXPECT_EQ(gather([](auto& a) { a.src_cache.shape[1] = 0; }), "dcp_gather_latents src_cache");
  EXPECT_EQ(gather([](auto& a) { a.src_cache.shape[1] = 6; }), "dcp_gather_latents interleave");
  EXPECT_EQ(gather([](auto& a) { a.interleave = 0; }), "dcp_gather_latents interleave");
  EXPECT_EQ(gather([](auto& a) { a.dst = {}; }), "dcp_gather_latents dst");
  EXPECT_EQ(gather([](auto& a) { a.dst.dtype = DType::bf16; }), "dcp_gather_latents dst");
  EXPECT_EQ(gather([](auto& a) { a.dst.shape[1] = 8; }), "dcp_gather_latents dst");
  EXPECT_EQ(gather([](auto& a) { a.dst.strides[0] = 0; }), "dcp_gather_latents dst");
  EXPECT_EQ(gather([](auto& a) { a.dst.strides[1] = 2; }), "dcp_gather_latents dst");
  EXPECT_EQ(gather([&](auto& a) { a.dst.data = ranks_.cache[0].view().data; }),
            "dcp_gather_latents dst");
}

TEST_F(DcpMlaBadInput, GatherRowsAndBlocks) {
  const auto call = [&] { return gather(kAsIs); };
  EXPECT_EQ(gather([](auto& a) { a.dst.shape[0] = 50; }), "dcp_gather_latents cu_seq_lens");
  EXPECT_EQ(gather([](auto& a) { a.cu_seq_lens.shape[0] = 0; }), "dcp_gather_latents cu_seq_lens");
  EXPECT_EQ(with(batch_.cu_seq_lens, 0, 1, call), "dcp_gather_latents cu_seq_lens");
  EXPECT_EQ(with(batch_.cu_seq_lens, 1, 44, call), "dcp_gather_latents cu_seq_lens");
  EXPECT_EQ(with(batch_.cu_seq_lens, 3, 61, call), "dcp_gather_latents cu_seq_lens");
  EXPECT_EQ(with(ranks_.block_table, 1, 99, call), "dcp_gather_latents block_table");
  EXPECT_EQ(with(ranks_.block_table, 1, -1, call), "dcp_gather_latents block_table");
  EXPECT_EQ(gather([](auto& a) { a.block_table.shape[1] = 1; }), "dcp_gather_latents block_table");
  EXPECT_EQ(gather([](auto& a) { a.block_table.shape[0] = 2; }), "dcp_gather_latents block_table");
  const HostTensor starts(DType::i32, {3});
  const auto from = [&] { return gather([&](auto& a) { a.seq_starts = starts; }); };
  EXPECT_EQ(from(), "sent");
  EXPECT_EQ(with(starts, 1, -1, from), "dcp_gather_latents seq_starts");
  EXPECT_EQ(with(starts, 1, kMost, from), "dcp_gather_latents block_table");
  EXPECT_EQ(gather([&](auto& a) { a.seq_starts = starts.view().slice(0, 0, 2); }),
            "dcp_gather_latents seq_starts");
}

TEST_F(DcpMlaBadInput, ARankThatFailsDoesNotLeaveTheOthersWaiting) {
  EXPECT_THROW(run_in_process(2,
                              [&](Communicator& c) {
                                DcpMlaDecodeArgs a = ranks_.args(c.rank());
                                if (c.rank() == 1) a.interleave = 0;
                                dcp_mla_decode(a, c);
                              }),
               InvalidArgument);
  EXPECT_THROW(run_in_process(2,
                              [&](Communicator& c) {
                                DcpGatherLatentsArgs a = gather_args();
                                if (c.rank() == 1) a.dst = {};
                                dcp_gather_latents(a, c);
                              }),
               InvalidArgument);
}

}  // namespace
}  // namespace attend
