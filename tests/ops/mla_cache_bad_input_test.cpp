// SPDX-License-Identifier: Apache-2.0
// What the ops on MLA caches refuse, by argument, and that a refusal writes nothing.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "attend/core/error.h"
#include "attend/ops/mla_cache.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using ::testing::HasSubstr;
using testing::HostTensor;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

HostTensor filled(DType dtype, std::initializer_list<std::int64_t> shape) {
  HostTensor t(dtype, shape);
  t.fill_bytes(0x5A);
  return t;
}

bool is_untouched(const HostTensor& t) {
  const auto bytes = t.snapshot();
  return std::all_of(bytes.begin(), bytes.end(), [](auto b) { return b == 0x5A; });
}

// The error's text after "argument"; "none" without an error.
template <typename Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const InvalidArgument& e) {
    const std::string text = e.what();
    return text.substr(text.find('\''));
  }
  return "none";
}

class MlaWriteErrorTest : public ::testing::Test {
 protected:
  static ConstTensorView i64(const std::vector<std::int64_t>& v) {
    return {v.data(), DType::i64, {static_cast<std::int64_t>(v.size())}};
  }
  ConcatAndCacheMlaRopeFusedArgs args(const HostTensor& cache) const {
    return {.positions = i64(positions_),
            .q_pe = q_pe_,
            .k_pe = k_pe_,
            .kv_c = kv_c_,
            .cos_sin_cache = tables_,
            .slot_mapping = i64(slots_),
            .kv_cache = cache,
            .scale = {&scale_, DType::f32, {1}}};
  }
  // What both ops say; the fused one must agree about the arguments that they share.
  template <typename Change>
  std::string error(const HostTensor& cache, Change&& change) {
    ConcatAndCacheMlaRopeFusedArgs a = args(cache);
    change(a);
    const std::string text = error_of(
        [&] { concat_and_cache_mla({a.kv_c, a.k_pe, a.kv_cache, a.slot_mapping, a.scale}); });
    if (text != "none") {
      EXPECT_EQ(fused_error(cache, change), text);
    }
    return unless_written(text);
  }
  template <typename Change>
  std::string fused_error(const HostTensor& cache, Change&& change) {
    ConcatAndCacheMlaRopeFusedArgs a = args(cache);
    change(a);
    return unless_written(error_of([&] { concat_and_cache_mla_rope_fused(a); }));
  }
  std::string unless_written(const std::string& text) const {
    for (const HostTensor* t : {&plain_, &fp8_, &ds_, &q_pe_, &k_pe_}) {
      if (!is_untouched(*t)) return text + ", but wrote";
    }
    return text;
  }

  HostTensor kv_c_ = filled(DType::bf16, {5, 512}), k_pe_ = filled(DType::bf16, {5, 64}),
             q_pe_ = filled(DType::bf16, {5, 2, 64}), tables_ = filled(DType::bf16, {10, 64});
  HostTensor plain_ = filled(DType::bf16, {3, 4, 576}), fp8_ = filled(DType::fp8_e4m3, {3, 4, 576}),
             ds_ = filled(DType::u8, {3, 4, 656}), v4_ = filled(DType::u8, {3, 4, 584});
  std::vector<std::int64_t> slots_ = {0, 11, -1, 5}, positions_ = {0, 9, 3, 4};
  float scale_ = 1.0F;
};

TEST_F(MlaWriteErrorTest, Slots) {
  slots_[3] = 12;
  for (const HostTensor* cache : {&plain_, &fp8_, &ds_}) {
    EXPECT_EQ(error(*cache, [](auto&) {}),
              "'slot_mapping': expected slots below 12, the capacity of the cache, got 12 at index "
              "3");
  }
  slots_ = {0, 1, 2, 3, 4, 5};
  EXPECT_THAT(error(plain_, [](auto&) {}), HasSubstr("'slot_mapping': expected at most 5 entries"));
  EXPECT_THAT(error(plain_, [](auto& a) { a.slot_mapping.dtype = DType::i32; }),
              HasSubstr("'slot_mapping'"));
}

TEST_F(MlaWriteErrorTest, SizesThatTheFormatDoesNotHold) {
  const auto latent_of_256 = [&](auto& a) { a.kv_c = a.kv_c.slice(1, 0, 256); };
  const auto rope_of_32 = [&](auto& a) {
    a.k_pe = k_pe_.view().slice(1, 0, 32);
    a.q_pe = q_pe_.view().slice(2, 0, 32);
  };
  EXPECT_EQ(error(ds_, latent_of_256),
            "'kv_c': expected 512 elements of bf16 for fp8_ds_mla, got [5, 256] bf16 cpu:0");
  EXPECT_THAT(error(ds_, rope_of_32),
              HasSubstr("'k_pe': expected 64 elements of bf16 for fp8_ds_mla"));
  EXPECT_THAT(error(v4_, [](auto&) {}),
              HasSubstr("'kv_c': expected 448 elements of bf16 for fp8_ds_v4"));
  EXPECT_THAT(error(plain_, latent_of_256),
              HasSubstr("'kv_cache': expected shape [any, any, 320]"));
  EXPECT_THAT(error(fp8_, rope_of_32), HasSubstr("'kv_cache': expected shape [any, any, 544]"));
  // 576 elements of other parts.
  const HostTensor latent = filled(DType::bf16, {5, 544}), rope = filled(DType::bf16, {5, 32});
  EXPECT_THAT(error(ds_,
                    [&](auto& a) {
                      a.kv_c = latent;
                      a.k_pe = rope;
                    }),
              HasSubstr("'kv_c': expected 512 elements"));
  EXPECT_THAT(error(ds_, [&](auto& a) { a.kv_cache = ds_.view().slice(2, 0, 576); }),
              HasSubstr("'kv_cache': expected rows of 656 bytes (fp8_ds_mla) or 584 bytes "
                        "(fp8_ds_v4), got [3, 4, 576] u8"));
  // A block of this format is one run of bytes.
  EXPECT_THAT(error(v4_, [](auto& a) { a.kv_cache.strides[1] = 600; }),
              HasSubstr("'kv_cache': expected blocks of fp8_ds_v4 without gaps, got stride 600"));
  EXPECT_THAT(error(v4_, [](auto& a) { a.kv_cache.strides[0] = 3 * 584; }),
              HasSubstr("'kv_cache': expected blocks of fp8_ds_v4 behind each other"));
}

TEST_F(MlaWriteErrorTest, Types) {
  EXPECT_THAT(error(ds_, [](auto& a) { a.kv_c.dtype = a.k_pe.dtype = a.q_pe.dtype = DType::f16; }),
              HasSubstr("'kv_c': expected 512 elements of bf16 for fp8_ds_mla"));
  EXPECT_THAT(error(plain_, [](auto& a) { a.kv_c.dtype = a.k_pe.dtype = DType::f16; }),
              HasSubstr("'kv_cache': expected dtype f16 or fp8_e4m3 or fp8_e5m2 or u8"));
  EXPECT_THAT(error(plain_, [](auto& a) { a.k_pe.dtype = DType::f16; }), HasSubstr("'k_pe'"));
  EXPECT_THAT(error(plain_, [](auto& a) { a.kv_c.dtype = DType::u8; }), HasSubstr("'kv_c'"));
}

TEST_F(MlaWriteErrorTest, Scales) {
  EXPECT_EQ(error(fp8_, [](auto& a) { a.scale = {}; }),
            "'scale': expected a scale, which an fp8 cache needs, got none");
  for (const float bad : {0.0F, -1.0F, kInf, kNan}) {
    scale_ = bad;
    EXPECT_THAT(error(fp8_, [](auto&) {}), HasSubstr("'scale': expected a finite scale above 0"));
  }
  const std::vector<float> two = {1.0F, 1.0F};
  EXPECT_THAT(error(fp8_, [&](auto& a) { a.scale = {two.data(), DType::f32, {2}}; }),
              HasSubstr("'scale': expected 1 element"));
  EXPECT_THAT(error(fp8_, [](auto& a) { a.scale.dtype = DType::i32; }), HasSubstr("'scale'"));
  slots_ = {-1, -1, -1, -1};
  for (const HostTensor* cache : {&plain_, &ds_})
    EXPECT_EQ(error(*cache, [](auto& a) { a.scale = {}; }), "none") << "others do not read it";
}

TEST_F(MlaWriteErrorTest, ShapesStridesAndMemory) {
  EXPECT_THAT(error(plain_, [](auto& a) { a.k_pe.shape[0] = 4; }), HasSubstr("'k_pe'"));
  EXPECT_THAT(error(plain_, [](auto& a) { a.kv_cache.rank = 2; }), HasSubstr("'kv_cache'"));
  EXPECT_THAT(error(plain_, [](auto& a) { a.kv_c.strides[1] = 2; }), HasSubstr("'kv_c'"));
  EXPECT_THAT(error(plain_, [](auto& a) { a.kv_cache.strides[1] = 8; }), HasSubstr("'kv_cache'"));
  EXPECT_THAT(error(plain_, [](auto& a) { a.kv_c.data = nullptr; }), HasSubstr("'kv_c'"));
  EXPECT_THAT(error(plain_, [](auto& a) { a.kv_c.data = a.kv_cache.data; }),
              HasSubstr("'kv_cache': expected memory apart from 'kv_c'"));
}

TEST_F(MlaWriteErrorTest, Rotation) {
  positions_[1] = 10;
  EXPECT_EQ(
      fused_error(plain_, [](auto&) {}),
      "'positions': expected positions in [0, 10), the rows of cos_sin_cache, got 10 at index "
      "1");
  positions_[1] = -1;
  EXPECT_THAT(fused_error(plain_, [](auto&) {}), HasSubstr("'positions'"));
  positions_ = {0, 1, 2};
  EXPECT_THAT(fused_error(plain_, [](auto&) {}), HasSubstr("'positions': expected at least 4"));
  positions_ = {0, 1, 2, 3};
  EXPECT_THAT(fused_error(plain_, [](auto& a) { a.q_pe.shape[2] = 32; }), HasSubstr("'q_pe'"));
  EXPECT_THAT(fused_error(plain_, [](auto& a) { a.q_pe.shape[0] = 4; }), HasSubstr("'q_pe'"));
  EXPECT_THAT(fused_error(plain_, [](auto& a) { a.q_pe.dtype = DType::f16; }), HasSubstr("'q_pe'"));
  EXPECT_THAT(fused_error(plain_, [](auto& a) { a.cos_sin_cache.dtype = DType::f16; }),
              HasSubstr("'cos_sin_cache'"));
  EXPECT_THAT(fused_error(plain_, [](auto& a) { a.cos_sin_cache.shape[1] = 32; }),
              HasSubstr("'cos_sin_cache'"));
  EXPECT_THAT(fused_error(plain_, [](auto& a) { a.k_pe.data = a.q_pe.data; }),
              HasSubstr("'q_pe': expected memory apart from 'k_pe'"));
  EXPECT_THAT(fused_error(plain_, [](auto& a) { a.cos_sin_cache.data = a.k_pe.data; }),
              HasSubstr("apart from 'cos_sin_cache'"));
  const HostTensor odd = filled(DType::bf16, {3, 4, 575});
  EXPECT_THAT(
      fused_error(
          odd, [](auto& a) { a.k_pe.shape[1] = a.q_pe.shape[2] = a.cos_sin_cache.shape[1] = 63; }),
      HasSubstr("'k_pe': expected an even number"));
}

class MlaGatherErrorTest : public ::testing::Test {
 protected:
  static ConstTensorView i32(const std::vector<std::int32_t>& v) {
    return {v.data(), DType::i32, {static_cast<std::int64_t>(v.size())}};
  }
  GatherAndMaybeDequantCacheArgs args(const HostTensor& cache) const {
    return {cache,    dst_,         {table_.data(), DType::i32, {2, 2}},
            i32(cu_), i32(starts_), {&scale_, DType::f32, {1}}};
  }
  template <typename Change>
  std::string error(const HostTensor& cache, Change&& change) {
    GatherAndMaybeDequantCacheArgs a = args(cache);
    change(a);
    const std::string text = error_of([&] { gather_and_maybe_dequant_cache(a); });
    return is_untouched(dst_) ? text : text + ", but wrote";
  }
  std::string error() {
    const std::string text = error(plain_, [](auto&) {});
    EXPECT_EQ(error_of([&] {
                const auto a = args(plain_);
                cp_gather_cache({a.src_cache, a.dst, a.block_table, a.cu_seq_lens, a.seq_starts});
              }),
              text);
    return text;
  }
  template <typename Change>
  std::string upconvert_error(const std::vector<std::int32_t>& starts, Change&& change) {
    CpGatherAndUpconvertFp8KvCacheArgs a{
        ds_, dst_, {table_.data(), DType::i32, {2, 2}}, i32(starts)};
    change(a);
    const std::string text = error_of([&] { cp_gather_and_upconvert_fp8_kv_cache(a); });
    return is_untouched(dst_) ? text : text + ", but wrote";
  }

  HostTensor plain_ = filled(DType::bf16, {4, 8, 576}), fp8_ = filled(DType::fp8_e4m3, {4, 8, 576}),
             ds_ = filled(DType::u8, {4, 8, 656}), dst_ = filled(DType::bf16, {20, 576});
  std::vector<std::int32_t> table_ = {3, 1, 0, 2}, cu_ = {0, 10, 18}, starts_ = {6, 8};
  float scale_ = 1.0F;
};

TEST_F(MlaGatherErrorTest, LengthsAndStarts) {
  cu_ = {0, 10, 9};
  EXPECT_EQ(error(), "'cu_seq_lens': expected ascending entries, got 10 then 9 at index 2");
  cu_ = {1, 10, 18};
  EXPECT_THAT(error(), HasSubstr("'cu_seq_lens'"));
  cu_ = {0, 10, 21};
  EXPECT_EQ(error(), "'cu_seq_lens': expected at most 20 rows, those of dst, got 21");
  cu_ = {};
  EXPECT_THAT(error(), HasSubstr("'cu_seq_lens'"));
  cu_ = {0, 10};
  starts_ = {6};
  EXPECT_EQ(error(), "'block_table': expected shape [1, any], got [2, 2] i32 cpu:0")
      << "lengths of another batch";
  cu_ = {0, 10, 18};
  EXPECT_THAT(error(), HasSubstr("'seq_starts'"));
  starts_ = {6, -1};
  EXPECT_EQ(error(), "'seq_starts': expected numbers >= 0, got -1 at index 1");
}

TEST_F(MlaGatherErrorTest, TokensBeyondTheTable) {
  starts_ = {7, 8};  // tokens 7 .. 16, the table has 16
  EXPECT_EQ(error(),
            "'block_table': expected 3 blocks or more for request 0, got [2, 2] i32 cpu:0");
  starts_ = {6, std::numeric_limits<std::int32_t>::max()};
  EXPECT_THAT(error(), HasSubstr("'block_table'"));
}

TEST_F(MlaGatherErrorTest, BlocksOutsideOfTheCache) {
  table_ = {3, 4, 0, 2};
  EXPECT_EQ(error(), "'block_table': expected block ids in [0, 4) at [0, 1], got 4");
  table_ = {3, 1, 0, -1};
  EXPECT_EQ(error(), "'block_table': expected block ids in [0, 4) at [1, 1], got -1");
  table_ = {3, 1, -7, 2};  // request 1 begins in its second block
  dst_.fill_bytes(0);
  EXPECT_THAT(error(plain_, [](auto&) {}), HasSubstr("none"));
}

TEST_F(MlaGatherErrorTest, TypesAndSizes) {
  EXPECT_THAT(error(plain_, [](auto& a) { a.dst.dtype = DType::f16; }),
              HasSubstr("'dst': expected dtype bf16"));
  EXPECT_THAT(error(fp8_, [](auto& a) { a.dst.dtype = DType::u8; }), HasSubstr("'dst'"));
  EXPECT_THAT(error(plain_, [](auto& a) { a.dst.shape[1] = 512; }), HasSubstr("'dst'"));
  EXPECT_THAT(error(ds_, [](auto& a) { a.dst.shape[1] = 512; }), HasSubstr("'dst'"));
  EXPECT_THAT(error(ds_, [&](auto& a) { a.src_cache = ds_.view().slice(2, 0, 576); }),
              HasSubstr("'src_cache': expected rows of 656 bytes (fp8_ds_mla) or 584 bytes "));
  EXPECT_THAT(error(ds_, [](auto& a) { a.src_cache.dtype = DType::i8; }), HasSubstr("'src_cache'"));
  EXPECT_THAT(error(plain_, [](auto& a) { a.block_table.dtype = DType::i64; }),
              HasSubstr("'block_table'"));
  EXPECT_THAT(error(plain_, [](auto& a) { a.cu_seq_lens.dtype = DType::i64; }),
              HasSubstr("'cu_seq_lens'"));
  EXPECT_THAT(error(plain_, [](auto& a) { a.dst.strides[0] = 8; }), HasSubstr("'dst'"));
  EXPECT_THAT(error(plain_, [](auto& a) { a.dst.data = const_cast<void*>(a.src_cache.data); }),
              HasSubstr("'dst': expected memory apart from 'src_cache'"));
  EXPECT_THAT(error(plain_, [](auto& a) { a.src_cache.shape[1] = 0; }),
              HasSubstr("'src_cache': expected blocks of at least one token"));
}

TEST_F(MlaGatherErrorTest, Scales) {
  EXPECT_EQ(error(fp8_, [](auto& a) { a.scale = {}; }),
            "'scale': expected a scale, which an fp8 cache needs, got none");
  for (const float bad : {0.0F, -1.0F, kInf, kNan}) {
    scale_ = bad;
    EXPECT_THAT(error(fp8_, [](auto&) {}), HasSubstr("'scale': expected a finite scale above 0"));
  }
}

TEST_F(MlaGatherErrorTest, Upconversion) {
  const auto same = [](auto&) {};
  EXPECT_EQ(upconvert_error({10, 9}, same),
            "'workspace_starts': expected ascending entries, got 10 then 9 at index 1");
  EXPECT_THAT(upconvert_error({-1, 10}, same), HasSubstr("'workspace_starts'"));
  EXPECT_THAT(upconvert_error({0, 21}, same), HasSubstr("'workspace_starts'"));
  EXPECT_THAT(upconvert_error({0, 2}, same), HasSubstr("'block_table': expected 3 blocks"));
  EXPECT_THAT(upconvert_error({0}, same), HasSubstr("'block_table'"));
  EXPECT_THAT(upconvert_error({0, 10}, [&](auto& a) { a.src_cache = plain_; }),
              HasSubstr("'src_cache': expected dtype u8"));
  EXPECT_THAT(upconvert_error({0, 10}, [](auto& a) { a.dst.dtype = DType::f16; }),
              HasSubstr("'dst': expected dtype bf16"));
  table_[3] = 99;
  EXPECT_EQ(upconvert_error({0, 10}, same),
            "'block_table': expected block ids in [0, 4) at [1, 1], got 99");
}

}  // namespace
}  // namespace attend
