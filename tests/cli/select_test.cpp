// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "cli/run_cli.h"

namespace attend::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

TEST(SelectCommand, PrintsTheChoice) {
  const CliResult r = run_cli("select --platform cuda:9.0 --head-size 128 --dtype f16");
  EXPECT_EQ(r.exit_code, 0);
  EXPECT_THAT(r.out, HasSubstr("choice      FLASH_ATTN\n"));
  EXPECT_EQ(r.err, "");
}

TEST(SelectCommand, Int8CachesAreForTheCpu) {
  for (const std::string format : {"int8_level1", "int8_level2", "int8_per_token_head"}) {
    EXPECT_EQ(run_cli("select --kv-cache-dtype " + format).exit_code, 0);
    const CliResult cuda = run_cli("select --platform cuda:9.0 --kv-cache-dtype " + format);
    EXPECT_EQ(cuda.exit_code, 1);
    EXPECT_THAT(cuda.out, HasSubstr(format + " runs on the CPU only"));
    EXPECT_THAT(run_cli("select --help").out, HasSubstr(format));
    EXPECT_THAT(run_cli("replay --help").out, HasSubstr(format));
  }
}

TEST(SelectCommand, NothingFitsIsExitCode1WithEveryReason) {
  const CliResult r = run_cli("select --platform cuda:7.5 --head-size 100 --sink");
  EXPECT_EQ(r.exit_code, 1);
  EXPECT_THAT(r.out, HasSubstr("choice      none fits\n"));
  EXPECT_THAT(r.out,
              HasSubstr("rejected    FLASH_ATTN\n"
                        "            - head_size not supported: 100 (must be a multiple of 8, at "
                        "most 256)\n"
                        "            - compute capability not supported: 7.5 (must be at least "
                        "8.0)\n"
                        "            - sink not supported on compute capability < 9.0\n"));
}

TEST(SelectCommand, EveryOptionReachesTheConfiguration) {
  const CliResult r = run_cli(
      "select --platform rocm:gfx942 --head-size 64 --dtype f16 --kv-cache-dtype fp8 "
      "--block-size 32 --mla --sparse --differential --sink --attn-type encoder --alibi-sqrt "
      "--non-causal "
      "--batch-invariant --per-head-quant-scales --mm-prefix --kv-connector --json -");
  EXPECT_EQ(r.exit_code, 1);
  const auto j = nlohmann::json::parse(r.out);
  EXPECT_EQ(j.at("config"), nlohmann::json::parse(R"({
    "platform": "rocm:gfx942", "head_size": 64, "dtype": "f16", "kv_cache_dtype": "fp8",
    "block_size": 32, "attn_type": "encoder", "use_mla": true, "use_sparse": true,
    "use_differential": true, "has_sink": true, "use_alibi_sqrt": true, "use_non_causal": true, "batch_invariant": true,
    "use_per_head_quant_scales": true, "use_mm_prefix": true, "use_kv_connector": true})"));
  EXPECT_TRUE(j.at("backend").is_null());
  EXPECT_TRUE(j.at("also_valid").is_array());
  const auto& first = j.at("rejected").at(0);
  EXPECT_FALSE(first.at("name").get<std::string>().empty());
  EXPECT_THAT(first.at("reasons").get<std::vector<std::string>>(),
              ::testing::Not(::testing::IsEmpty()));
}

TEST(SelectCommand, ExplicitBackendIsTheOnlyOneAsked) {
  const CliResult named = run_cli("select --platform rocm:gfx942 --backend FLASH_ATTN --json -");
  EXPECT_EQ(named.exit_code, 0);
  EXPECT_EQ(nlohmann::json::parse(named.out).at("backend"), "FLASH_ATTN");
  EXPECT_EQ(run_cli("select --platform rocm:gfx942").exit_code, 1);
}

nlohmann::json mla_prefill(const std::string& options) {
  return nlohmann::json::parse(run_cli("select --mla --json - " + options).out).at("mla_prefill");
}

TEST(SelectCommand, MlaNamesThePrefillBackendWithTheReasonsAgainstTheOther) {
  const CliResult cuda = run_cli("select --mla --platform cuda:9.0");
  EXPECT_THAT(cuda.out, HasSubstr("head_size=576"));
  EXPECT_THAT(cuda.out,
              HasSubstr("MLA prefill\n"
                        "asked for   platform=cuda:9.0, dtype=bf16, kv_lora_rank=512, "
                        "qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128\n"
                        "choice      FLASH_ATTN\n"
                        "rejected    ROCM_AITER_FA\n"
                        "            - required dependencies not available: cuda:9.0\n"
                        "            - platform not supported: cuda:9.0 (chosen automatically on "
                        "rocm only; elsewhere ask for it by name)\n"));
  EXPECT_THAT(run_cli("select --mla --platform rocm:gfx942").out,
              HasSubstr("choice      ROCM_AITER_FA\n"
                        "also valid  FLASH_ATTN\n"
                        "            - comes later in the order of this platform\n"
                        "            - values are padded from 128 to 192 columns\n"));
  EXPECT_THAT(run_cli("select --mla --platform rocm:gfx942 --batch-invariant").out,
              HasSubstr("choice      FLASH_ATTN\n"
                        "            - values are padded from 128 to 192 columns\n"
                        "rejected    ROCM_AITER_FA\n"
                        "            - batch invariance not supported\n"));
}

TEST(SelectCommand, MlaPrefillInJson) {
  const auto rocm = mla_prefill("--platform rocm:gfx942");
  EXPECT_EQ(rocm.at("backend"), "ROCM_AITER_FA");
  EXPECT_EQ(rocm.at("also_valid"), nlohmann::json::parse(R"(["FLASH_ATTN"])"));
  EXPECT_EQ(rocm.at("requires_v_padding"), false);
  const auto j = mla_prefill(
      "--platform cuda:7.5 --dtype f32 --kv-lora-rank 256 --qk-nope-head-dim 60 "
      "--qk-rope-head-dim 32 --v-head-dim 64 --batch-invariant --quant-output "
      "--mla-prefill FLASH_ATTN");
  EXPECT_EQ(j.at("config"), nlohmann::json::parse(R"({
    "platform": "cuda:7.5", "dtype": "f32", "kv_lora_rank": 256, "qk_nope_head_dim": 60,
    "qk_rope_head_dim": 32, "v_head_dim": 64, "batch_invariant": true, "quant_output": true})"));
  EXPECT_TRUE(j.at("backend").is_null());
  EXPECT_TRUE(j.at("requires_v_padding").is_null());
  ASSERT_EQ(j.at("rejected").size(), 1U);
  EXPECT_EQ(j.at("rejected")[0].at("name"), "FLASH_ATTN");
  EXPECT_EQ(j.at("rejected")[0].at("reasons").size(), 4U);
}

TEST(SelectCommand, MlaPrefillByNameIsTheOnlyOneAsked) {
  const auto j = mla_prefill("--mla-prefill ROCM_AITER_FA");
  EXPECT_EQ(j.at("backend"), "ROCM_AITER_FA");
  EXPECT_TRUE(j.at("rejected").empty());
}

TEST(SelectCommand, OnlyDenseMlaHasAPrefillBackend) {
  for (const char* options : {"", "--mla --sparse "}) {
    const auto j = nlohmann::json::parse(run_cli(std::string("select --json - ") + options).out);
    EXPECT_FALSE(j.contains("mla_prefill")) << options;
  }
}

TEST(SelectCommand, BadInputIsExitCode2AndOneLine) {
  for (const char* arguments :
       {"select --platform tpu", "select --dtype f7", "select --attn-type both",
        "select --backend FLASHINFER", "select --head-size many", "select --nonsense",
        "select --json /nonexistent/file", "select --mla --mla-prefill FLASHINFER",
        "select --mla --v-head-dim many", "select --v-head-dim 64",
        "select --mla-prefill FLASH_ATTN"}) {
    const CliResult r = run_cli(arguments);
    EXPECT_EQ(r.exit_code, 2) << arguments;
    EXPECT_THAT(r.err, StartsWith("attend: ")) << arguments;
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << arguments << "\n" << r.err;
  }
}

}  // namespace
}  // namespace attend::testing
