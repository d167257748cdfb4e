// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>

#include "attend/ops/mla_weights.h"
#include "dist/dcp_mla_problem.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::MlaBatch;
using testing::MlaBatchShape;
using testing::MlaRanks;
using testing::Rng;

MlaBatchShape shape_of(DType dtype, DType kv_dtype) {
  MlaBatchShape s;
  s.dtype = dtype;
  s.kv_dtype = kv_dtype;
  if (kv_dtype == DType::u8) {
    s.latent = 512;
    s.rope = 64;
  }
  s.seq_lens = {1, 2, 3, 17, 0, 40, 130, 299, 64};
  s.query_lens = {1, 1, 3, 2, 0, 1, 1, 5, 4};
  return s;
}

HostTensor i32(std::initializer_list<std::int32_t> values) {
  HostTensor t(DType::i32, {static_cast<std::int64_t>(values.size())});
  std::ranges::copy(values, t.as<std::int32_t>().begin());
  return t;
}

DcpGatherLatentsArgs gather_args(const MlaRanks& p, int rank, const ConstTensorView& cu,
                                 const ConstTensorView& starts, const TensorView& dst) {
  DcpGatherLatentsArgs a;
  a.src_cache = p.cache[static_cast<std::size_t>(rank)];
  a.dst = dst;
  a.block_table = p.block_table;
  a.cu_seq_lens = cu;
  a.seq_starts = starts;
  a.interleave = p.layout.interleave;
  return a;
}

/// Ranges of positions, undefined starts included.
struct Ranges {
  HostTensor cu, starts;
  bool from_zero;
  ConstTensorView first() const { return from_zero ? ConstTensorView() : ConstTensorView(starts); }
};
std::vector<Ranges> ranges(const MlaBatch& b) {
  std::vector<Ranges> all;
  HostTensor cu(DType::i32, {b.cu_seq_lens.numel()});
  std::ranges::copy(b.cu_seq_lens.as<std::int32_t>(), cu.as<std::int32_t>().begin());
  all.push_back({std::move(cu), i32({}), true});
  // From the middle of blocks and of runs of an interleave, and nothing of some.
  all.push_back({i32({0, 1, 2, 2, 18 - 4, 14, 14, 14 + 97, 111 + 1, 112 + 64}),
                 i32({0, 1, 3, 5, 1000, 7, 33, 298, 0}), false});
  all.push_back({i32({0, 0, 0, 0, 0, 0, 0, 0, 0, 0}), i32({0, 9, 0, 0, 0, 0, 0, 0, 0}), false});
  return all;
}

class DcpGatherLatentsTest : public ::testing::TestWithParam<std::pair<DType, DType>> {};
INSTANTIATE_TEST_SUITE_P(
    Formats, DcpGatherLatentsTest,
    ::testing::Values(std::pair(DType::f32, DType::f32), std::pair(DType::f16, DType::f16),
                      std::pair(DType::bf16, DType::bf16), std::pair(DType::bf16, DType::fp8_e4m3),
                      std::pair(DType::f32, DType::fp8_e5m2), std::pair(DType::bf16, DType::u8)));

TEST_P(DcpGatherLatentsTest, RowsOfAnyRangeAreThoseOfOneRankBitForBit) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  const MlaBatch batch(shape_of(GetParam().first, GetParam().second), rng);
  const MlaRanks whole(batch, {1, 1}, 16, rng);
  const std::int64_t width = batch.shape.row();
  for (const Ranges& wanted : ranges(batch)) {
    const std::int64_t rows = wanted.cu.as<std::int32_t>().back();
    HostTensor want(batch.shape.kv_dtype, {rows + 3, width + 5});
    want.fill_bytes(0x5A);
    cp_gather_cache({.src_cache = whole.cache[0],
                     .dst = want.view().slice(1, 2, width),
                     .block_table = whole.block_table,
                     .cu_seq_lens = wanted.cu,
                     .seq_starts = wanted.first()});
    for (const int ranks : {1, 2, 3, 4}) {
      for (const int interleave : {1, 2, 16}) {
        SCOPED_TRACE("N " + std::to_string(ranks) + " I " + std::to_string(interleave));
        const MlaRanks p(batch, {ranks, interleave}, 16, rng);
        run_in_process(ranks, [&](Communicator& c) {
          const auto pool = make_thread_pool(1 + ranks % 2);
          // More rows than are wanted, and columns around them: neither may be touched.
          HostTensor dst(batch.shape.kv_dtype, {rows + 3, width + 5});
          dst.fill_bytes(0x5A);
          dcp_gather_latents(
              gather_args(p, c.rank(), wanted.cu, wanted.first(), dst.view().slice(1, 2, width)), c,
              pool.get());
          EXPECT_EQ(dst.snapshot(), want.snapshot()) << "rank " << c.rank();
        });
      }
    }
  }
}

TEST(DcpGatherLatents, ManyRowsAreSharedByTheWorkers) {
  Rng rng(2);
  SCOPED_TRACE(rng.trace());
  MlaBatchShape s = shape_of(DType::f32, DType::f32);
  s.latent = 256;  // 3300 rows of 1 KiB
  s.seq_lens = {1100, 0, 2200};
  s.query_lens = {1, 0, 1};
  const MlaBatch batch(s, rng);
  const MlaRanks whole(batch, {1, 1}, 16, rng), p(batch, {3, 2}, 16, rng);
  HostTensor want(s.kv_dtype, {batch.keys, s.dim()});
  cp_gather_cache({.src_cache = whole.cache[0],
                   .dst = want,
                   .block_table = whole.block_table,
                   .cu_seq_lens = batch.cu_seq_lens});
  run_in_process(3, [&](Communicator& c) {
    const auto pool = make_thread_pool(1 + c.rank());
    const HostTensor dst(s.kv_dtype, {batch.keys, s.dim()});
    dcp_gather_latents(gather_args(p, c.rank(), batch.cu_seq_lens, {}, dst), c, pool.get());
    EXPECT_EQ(dst.snapshot(), want.snapshot()) << "rank " << c.rank();
  });
}

/// Keys and values of all heads out of gathered rows, then causal attention of some heads.
class Prefill {
 public:
  Prefill(const MlaBatch& batch, Rng& rng)
      : batch_(batch),
        dtype_(batch.shape.dtype),
        heads_(batch.shape.heads),
        latent_(batch.shape.latent),
        rope_(batch.shape.rope),
        q_(dtype_, {batch.tokens, heads_, kNope + rope_}) {
    HostTensor weight(dtype_, {heads_ * (kNope + kV), latent_});
    weight.fill_normal(rng, 0.1F);
    KvBProjArgs a;
    a.weight = weight;
    a.dims = {latent_, kNope, rope_, kV};
    a.num_heads = heads_;
    a.dtype = dtype_;
    weights_ = MlaWeights::from_kv_b_proj(a);
    q_.fill_normal(rng);
  }

  /// `rows` as they lie in a cache, those of all requests.
  std::vector<unsigned char> run(const HostTensor& rows, int first_head, int heads) const {
    const auto one = make_thread_pool(1);
    const HostTensor latents(dtype_, {batch_.keys, latent_ + rope_});
    const HostTensor table(DType::i32, {1, 1}), cu(DType::i32, {2});
    cu.as<std::int32_t>()[1] = static_cast<std::int32_t>(batch_.keys);
    TensorView block(rows.view().data, rows.view().dtype, {1, batch_.keys, batch_.shape.row()});
    gather_and_maybe_dequant_cache({.src_cache = block,
                                    .dst = latents,
                                    .block_table = table,
                                    .cu_seq_lens = cu,
                                    .scale = batch_.kv_scale},
                                   one.get());
    const HostTensor k(dtype_, {batch_.keys, heads_, kNope + rope_});
    const HostTensor v(dtype_, {batch_.keys, heads_, kV});
    weights_->up_project(latents.view().slice(1, 0, latent_), k.view().slice(2, 0, kNope), v,
                         one.get());
    const std::size_t bytes = static_cast<std::size_t>(rope_) * size_of(dtype_);
    for (std::int64_t j = 0; j < batch_.keys; ++j) {
      for (std::int64_t h = 0; h < heads_; ++h) {
        std::memcpy(k.view().slice(2, kNope, rope_).select(0, j).select(0, h).data,
                    latents.view().slice(1, latent_, rope_).select(0, j).data, bytes);
      }
    }
    const HostTensor out(dtype_, {batch_.tokens, heads, kV});
    FlashAttnVarlenArgs a;
    a.q = q_.view().slice(1, first_head, heads);
    a.k = k.view().slice(1, first_head, heads);
    a.v = v.view().slice(1, first_head, heads);
    a.out = out;
    a.query_start_loc = batch_.query_start_loc;
    a.cu_seqlens_kv = batch_.cu_seq_lens;
    a.params.causal = true;
    flash_attn_varlen(a, one.get());
    return out.snapshot();
  }

 private:
  static constexpr int kNope = 16, kV = 24;
  const MlaBatch& batch_;
  DType dtype_;
  int heads_, latent_, rope_;
  HostTensor q_;
  std::shared_ptr<const MlaWeights> weights_;
};

TEST_P(DcpGatherLatentsTest, APrefillFromGatheredRowsHasTheBitsOfOneRank) {
  Rng rng(3);
  SCOPED_TRACE(rng.trace());
  MlaBatchShape s = shape_of(GetParam().first, GetParam().second);
  s.heads = 4;
  const MlaBatch batch(s, rng);
  const MlaRanks whole(batch, {1, 1}, 16, rng), p(batch, {2, 2}, 16, rng);
  const Prefill prefill(batch, rng);
  const HostTensor alone(s.kv_dtype, {batch.keys, s.row()});
  cp_gather_cache({.src_cache = whole.cache[0],
                   .dst = alone,
                   .block_table = whole.block_table,
                   .cu_seq_lens = batch.cu_seq_lens});
  run_in_process(2, [&](Communicator& c) {
    const HostTensor rows(s.kv_dtype, {batch.keys, s.row()});
    dcp_gather_latents(gather_args(p, c.rank(), batch.cu_seq_lens, {}, rows), c);
    const int first = 2 * c.rank();
    EXPECT_EQ(prefill.run(rows, first, 2), prefill.run(alone, first, 2)) << "rank " << c.rank();
  });
}

}  // namespace
}  // namespace attend
