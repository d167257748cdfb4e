// SPDX-License-Identifier: Apache-2.0
// Prefill calls against the oracle, with V as it is and with V padded.
#include <gmock/gmock.h>

#include <cmath>
#include <cstring>

#include "attend/core/error.h"
#include "attend/oracle/attention.h"
#include "backend/allocation_counter.h"
#include "backend/mla_prefill_call.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::PrefillCall;
using testing::PrefillOptions;

struct Case {
  const char* label;
  PrefillOptions options;
};
void PrintTo(const Case& c, std::ostream* os) { *os << c.label; }

PrefillOptions with(std::string backend, std::string platform, DType dtype,
                    MlaDims dims = {512, 128, 64, 128}) {
  PrefillOptions o;
  o.backend = std::move(backend);
  o.platform = std::move(platform);
  o.dtype = dtype;
  o.dims = dims;
  return o;
}

/// Context of several requests: none, a few keys, more than one piece.
PrefillOptions chunk_of(PrefillOptions o) {
  o.causal = false;
  o.key_lens = {0, 17, 600};
  return o;
}

PrefillOptions scaled(PrefillOptions o) {
  o.scale = 0.03F;
  return o;
}

void expect_oracle(const PrefillCall& call) {
  const oracle::Result want = oracle::flash_attn_varlen(call.op_args());
  std::size_t i = 0;
  for (std::int64_t t = 0; t < call.out.shape[0]; ++t) {
    for (std::int64_t h = 0; h < call.out.shape[1]; ++h) {
      for (std::int64_t d = 0; d < call.out.shape[2]; ++d, ++i) {
        ASSERT_NEAR(testing::get(call.out, {t, h, d}), want.out[i], want.out_bound[i])
            << t << " " << h << " " << d;
      }
    }
  }
  const auto lse = call.lse.as<float>();
  for (std::size_t r = 0; r < lse.size(); ++r) {
    if (std::isinf(want.lse[r])) {
      ASSERT_EQ(lse[r], want.lse[r]) << r;
    } else {
      ASSERT_NEAR(lse[r], want.lse[r], want.lse_bound[r]) << r;
    }
  }
}

class MlaPrefillRun : public ::testing::TestWithParam<Case> {};

TEST_P(MlaPrefillRun, AgreesWithTheOracle) {
  const PrefillCall call(GetParam().options);
  call.run();
  expect_oracle(call);
  EXPECT_TRUE(call.gaps_are_untouched());
}

constexpr MlaDims kSmallLatent = {256, 64, 64, 128};
constexpr MlaDims kOddSizes = {256, 96, 64, 80};

INSTANTIATE_TEST_SUITE_P(
    All, MlaPrefillRun,
    ::testing::Values(
        Case{"f32", with("FLASH_ATTN", "cpu", DType::f32)},
        Case{"bf16", with("FLASH_ATTN", "cpu", DType::bf16)},
        Case{"f16_padded", with("FLASH_ATTN", "cuda:8.0", DType::f16)},
        Case{"bf16_padded", with("FLASH_ATTN", "cuda:8.0", DType::bf16)},
        Case{"bf16_hopper", with("FLASH_ATTN", "cuda:9.0", DType::bf16)},
        Case{"aiter_on_the_cpu", with("ROCM_AITER_FA", "cpu", DType::f32)},
        Case{"aiter", with("ROCM_AITER_FA", "rocm:gfx942", DType::bf16)},
        Case{"latent_of_320", with("FLASH_ATTN", "cpu", DType::f32, kSmallLatent)},
        Case{"latent_of_320_padded", with("FLASH_ATTN", "rocm:gfx942", DType::bf16, kSmallLatent)},
        Case{"odd_sizes", with("FLASH_ATTN", "cpu", DType::f32, kOddSizes)},
        Case{"odd_sizes_padded", with("FLASH_ATTN", "cuda:8.0", DType::f16, kOddSizes)},
        Case{"scale", scaled(with("FLASH_ATTN", "cpu", DType::f32))},
        Case{"chunk_f32", chunk_of(with("FLASH_ATTN", "cpu", DType::f32))},
        Case{"chunk_bf16", chunk_of(with("FLASH_ATTN", "cpu", DType::bf16))},
        Case{"chunk_bf16_padded", chunk_of(with("FLASH_ATTN", "cuda:8.0", DType::bf16))},
        Case{"chunk_aiter", chunk_of(with("ROCM_AITER_FA", "rocm:gfx950", DType::f16))},
        Case{"chunk_latent_of_320", chunk_of(with("FLASH_ATTN", "cpu", DType::f32, kSmallLatent))},
        Case{"chunk_odd_sizes_padded",
             chunk_of(with("FLASH_ATTN", "rocm:gfx90a", DType::f16, kOddSizes))},
        Case{"chunk_scale", chunk_of(scaled(with("FLASH_ATTN", "cuda:8.0", DType::bf16)))}),
    [](const auto& info) { return std::string(info.param.label); });

TEST(MlaPrefillPadded, HasTheBitsOfNativeSizes) {
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const MlaDims& dims : {MlaDims{512, 128, 64, 128}, kOddSizes}) {
      for (const bool causal : {true, false}) {
        PrefillOptions o = with("FLASH_ATTN", "cpu", dtype, dims);
        if (!causal) o = chunk_of(o);
        const PrefillCall native(o);
        native.run();
        o.platform = "cuda:8.0";
        const PrefillCall padded(o);
        ASSERT_GT(padded.impl->head_dim_v(), native.impl->head_dim_v());
        padded.run();
        EXPECT_EQ(padded.wide_out.snapshot(), native.wide_out.snapshot()) << to_string(dtype);
        EXPECT_EQ(padded.lse.snapshot(), native.lse.snapshot()) << to_string(dtype);
      }
    }
  }
}

TEST(MlaPrefillPadded, SizesThatAreEqualNeedNoWorkspaceOfTheirOwn) {
  const PrefillCall equal(with("FLASH_ATTN", "cuda:8.0", DType::bf16, kSmallLatent));
  EXPECT_EQ(equal.impl->workspace_bytes(1000, 1000), 0U);
  const PrefillCall padded(with("FLASH_ATTN", "cuda:8.0", DType::bf16));
  const std::size_t row = 2 * 192 * sizeof(bf16);
  EXPECT_GE(padded.impl->workspace_bytes(10, 20), 30 * row);
  EXPECT_GE(padded.impl->workspace_bytes(0, 20), 20 * row);
  EXPECT_LT(padded.impl->workspace_bytes(0, 20), 21 * row);
}

TEST(MlaPrefillBackends, GiveTheSameBits) {
  const PrefillCall flash(with("FLASH_ATTN", "cpu", DType::bf16));
  const PrefillCall aiter(with("ROCM_AITER_FA", "rocm:gfx942", DType::bf16));
  flash.run();
  aiter.run();
  EXPECT_EQ(flash.wide_out.snapshot(), aiter.wide_out.snapshot());
  EXPECT_EQ(flash.lse.snapshot(), aiter.lse.snapshot());
}

TEST(MlaPrefillNewTokens, MayHaveContextInFrontOfThem) {
  PrefillOptions o = with("FLASH_ATTN", "cpu", DType::f32);
  o.key_lens = {40, 40, 310};
  const PrefillCall call(o);
  call.run();
  expect_oracle(call);
}

TEST(MlaPrefillNewTokens, LseIsWrittenOnlyIfWanted) {
  for (const char* platform : {"cpu", "cuda:8.0"}) {
    const PrefillCall with_lse(with("FLASH_ATTN", platform, DType::bf16));
    with_lse.run();
    const PrefillCall without(with("FLASH_ATTN", platform, DType::bf16));
    NewTokensArgs args = without.new_tokens();
    args.lse = {};
    without.impl->run_prefill_new_tokens(args);
    EXPECT_EQ(without.wide_out.snapshot(), with_lse.wide_out.snapshot());
  }
}

TEST(MlaPrefillNewTokens, QuantisedOutputIsTheCodeOfTheRoundedRow) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    PrefillOptions o = with("FLASH_ATTN", "cpu", dtype);
    const PrefillCall plain(o);
    plain.run();
    o.quant_output = true;
    const PrefillCall codes(o);
    codes.run();
    EXPECT_TRUE(codes.gaps_are_untouched());
    const float scale = *codes.new_tokens().output_scale;
    for (std::int64_t t = 0; t < codes.out.shape[0]; ++t) {
      for (std::int64_t h = 0; h < codes.out.shape[1]; ++h) {
        for (std::int64_t d = 0; d < codes.out.shape[2]; ++d) {
          const auto x = static_cast<float>(testing::get(plain.out, {t, h, d}));
          const auto code = codes.out.select(0, t).select(0, h).as<std::uint8_t>()[d];
          ASSERT_EQ(code, to_fp8_e4m3(x / scale).bits) << t << " " << h << " " << d;
        }
      }
    }
  }
}

TEST(MlaPrefillRuns, DoNotAllocate) {
  for (const char* platform : {"cpu", "cuda:8.0"}) {
    const PrefillCall tokens(with("FLASH_ATTN", platform, DType::bf16));
    const PrefillCall chunk(chunk_of(with("FLASH_ATTN", platform, DType::bf16)));
    tokens.run();  // threads start here
    chunk.run();
    const std::size_t before = testing::num_allocations();
    tokens.run();
    chunk.run();
    EXPECT_EQ(testing::num_allocations(), before) << platform;
  }
}

TEST(MlaPrefillRuns, DoNotDependOnTheNumberOfWorkers) {
  for (const char* platform : {"cpu", "cuda:8.0"}) {
    PrefillOptions o = with("FLASH_ATTN", platform, DType::bf16);
    const PrefillCall two(o);
    two.run();
    o.num_workers = 3;
    const PrefillCall three(o);
    three.run();
    EXPECT_EQ(two.wide_out.snapshot(), three.wide_out.snapshot()) << platform;
    EXPECT_EQ(two.lse.snapshot(), three.lse.snapshot()) << platform;
  }
}

TEST(MlaPrefillRuns, ABatchWithoutTokensDoesNothing) {
  PrefillOptions o = with("FLASH_ATTN", "cuda:8.0", DType::bf16);
  o.query_lens = o.key_lens = {0, 0};
  const PrefillCall call(o);
  EXPECT_NO_THROW(call.run());
}

}  // namespace
}  // namespace attend
