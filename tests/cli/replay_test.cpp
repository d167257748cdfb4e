// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "cli/run_cli.h"
#include "support/scale.h"
#include "support/temp_folder.h"

namespace attend::testing {
namespace {

using ::testing::HasSubstr;

const std::string kSmall = "replay synthetic:requests=4,prompt=40,output=5,shared=32 ";

TEST(ReplayCommand, JsonHasTheStableKeysAndStandsAlone) {
  const CliResult r = run_cli(kSmall + "--check 20 --threads 1 --max-num-seqs 2 --json -");
  ASSERT_EQ(r.exit_code, 0) << r.err;
  const auto j = nlohmann::json::parse(r.out);
  EXPECT_EQ(j.at("requests"), 4);
  for (const auto* key : {"prompt_tokens", "generated_tokens", "steps", "prefix_hit_tokens"}) {
    EXPECT_GT(j.at(key), 0) << key;
  }
  EXPECT_EQ(j.at("preemptions"), 0);
  EXPECT_EQ(j.at("cascade_steps"), 0);
  EXPECT_EQ(j.at("cascade_reasons").at("no two requests begin with the same 256 cached keys"),
            j.at("steps"));
  EXPECT_EQ(j.at("draft_tokens"), 0);
  EXPECT_EQ(j.at("accepted_tokens"), 0);
  for (const auto* key : {"num_blocks", "block_size", "peak_used_blocks"}) {
    EXPECT_GT(j.at("kv_cache").at(key), 0) << key;
  }
  EXPECT_EQ(j.at("check").at("rows"), 20);
  EXPECT_EQ(j.at("check").at("failed"), 0);
  EXPECT_GT(j.at("check").at("worst_error"), 0);
  EXPECT_LE(j.at("check").at("worst_ratio_to_bound"), 1);
  for (const auto* key : {"tokens_per_second", "prefill_gflops", "prefill_share", "decode_gbps",
                          "decode_share", "ceiling_gflops", "ceiling_gbps"}) {
    EXPECT_TRUE(j.at("speed").at(key).is_number()) << key;
  }
  EXPECT_LE(j.at("step_ms").at("p50"), j.at("step_ms").at("p99"));
  EXPECT_EQ(j.at("backend"), "FLASH_ATTN");
  EXPECT_EQ(j.at("model"), "llama-3.1-8b");
  EXPECT_TRUE(j.at("isa").is_string());
  EXPECT_EQ(j.at("threads"), 1);
}

TEST(ReplayCommand, SaysWhatTheCacheHolds) {
  const auto cache = [](const std::string& options) {
    const CliResult r = run_cli(kSmall + options + " --json -");
    EXPECT_EQ(r.exit_code, 0) << r.err;
    return nlohmann::json::parse(r.out).at("kv_cache");
  };
  const auto plain = cache("");
  EXPECT_EQ(plain.at("dtype"), "bf16");
  EXPECT_EQ(plain.at("block_bytes"), 16 * 8 * 128 * 2 * 2);
  EXPECT_EQ(plain.at("bytes"), plain.at("num_blocks").get<std::int64_t>() * 16 * 8 * 128 * 2 * 2);
  EXPECT_LE(plain.at("huge_page_bytes"), plain.at("bytes"));
  EXPECT_TRUE(plain.at("node_bytes").is_object());
  EXPECT_TRUE(plain.at("memory_problems").is_array());
  EXPECT_EQ(cache("--kv-cache-dtype fp8").at("dtype"), "fp8_e4m3");
  if (scaled(1, 0) == 0) return;  // an encoder's layer takes minutes on an emulated CPU
  const auto encoder = cache("--model bert-base");
  EXPECT_TRUE(encoder.at("dtype").is_null());
  EXPECT_EQ(encoder.at("block_bytes"), 0);
}

TEST(ReplayCommand, SaysWhichArithmeticRan) {
  const auto info = nlohmann::json::parse(run_cli("info --json -").out);
  const bool fast = info.at("kernels").at("arithmetic").at("bf16") == "fast";
  const auto run = [](const std::string& options) {
    const CliResult r = run_cli(kSmall + options + " --check 20 --json -");
    EXPECT_EQ(r.exit_code, 0) << r.err;
    const auto j = nlohmann::json::parse(r.out);
    EXPECT_EQ(j.at("check").at("failed"), 0);
    const std::string name = j.at("arithmetic");
    EXPECT_THAT(r.err, HasSubstr("kernels " + std::string(j.at("kernel_level"))));
    EXPECT_THAT(r.err, HasSubstr(name + " arithmetic"));
    return name;
  };
  EXPECT_EQ(run(""), fast ? "fast" : "exact");
  EXPECT_EQ(run("--arithmetic exact"), "exact");
  if (fast) {
    EXPECT_EQ(run("--arithmetic fast"), "fast");
  }
  EXPECT_EQ(run("--kv-cache-dtype int8_level2"), "integer");
}

TEST(ReplayCommand, SpeculativeTokensAreCountedAndChecked) {
  const CliResult r =
      run_cli(kSmall + "--speculative-tokens 2 --acceptance 0.5 --check 20 --json -");
  ASSERT_EQ(r.exit_code, 0) << r.err;
  const auto j = nlohmann::json::parse(r.out);
  EXPECT_EQ(j.at("check").at("failed"), 0);
  EXPECT_GT(j.at("draft_tokens"), 0);
  EXPECT_LE(j.at("accepted_tokens"), j.at("draft_tokens"));
}

TEST(ReplayCommand, CrossAttentionReportsItsOwnCache) {
  if (scaled(1, 0) == 0) GTEST_SKIP() << "1500 encoder tokens take minutes on an emulated CPU";
  const std::string command =
      "replay synthetic:requests=2,prompt=4,output=3,shared=0 --model whisper-large-v3 --check 30 ";
  const CliResult r = run_cli(command + "--json -");
  ASSERT_EQ(r.exit_code, 0) << r.err;
  const auto j = nlohmann::json::parse(r.out);
  EXPECT_EQ(j.at("check").at("failed"), 0);
  EXPECT_EQ(j.at("encoder_tokens"), 3000);
  EXPECT_EQ(j.at("encoder_cache").at("num_blocks"), 2 * 94);
  EXPECT_EQ(j.at("encoder_cache").at("peak_used_blocks"), 2 * 94);
  EXPECT_THAT(r.err, HasSubstr("3000 tokens computed"));
}

/// A file of value scales for `kSmall` and what else `options` say; gone at the end of the test.
class CalibratedScales {
 public:
  explicit CalibratedScales(const std::string& options)
      : path_((folder_.path() / "scales.safetensors").string()) {
    const CliResult r = run_cli("calibrate synthetic:requests=4,prompt=40,output=5,shared=32 " +
                                options + " --output " + path_);
    EXPECT_EQ(r.exit_code, 0) << r.err;
  }
  std::string option() const { return " --value-scales " + path_ + " "; }

 private:
  const TempFolder folder_;
  const std::string path_;
};

TEST(ReplayCommand, Int8CachesAreChecked) {
  for (const std::string model : {"llama-3.1-8b", "gpt-oss-20b"}) {  // the latter with sinks
    if (model == "gpt-oss-20b" && scaled(1, 0) == 0) break;
    const std::string options = fmt::format("--layers {} --model {}", scaled(2, 1), model);
    const CalibratedScales scales(options);
    for (const std::string format : {"int8_level1", "int8_level2", "int8_per_token_head"}) {
      SCOPED_TRACE(model + " " + format);
      const CliResult r = run_cli(
          kSmall + options + " --check 40 --max-num-seqs 2 --speculative-tokens 2 --json - " +
          "--kv-cache-dtype " + format + (format == "int8_level1" ? scales.option() : ""));
      ASSERT_EQ(r.exit_code, 0) << r.err;
      const auto j = nlohmann::json::parse(r.out);
      EXPECT_EQ(j.at("kv_cache").at("dtype"), format);
      EXPECT_GT(j.at("kv_cache").at("block_bytes"), 0);
      EXPECT_EQ(j.at("check").at("rows"), 40);
      EXPECT_EQ(j.at("check").at("failed"), 0);
      EXPECT_GT(j.at("prefix_hit_tokens"), 0);
      EXPECT_GT(j.at("draft_tokens"), 0);
      EXPECT_THAT(r.err, HasSubstr(format));
    }
  }
}

TEST(ReplayCommand, ModelsWithLatentAttentionAreChecked) {
  for (const auto& [cache, row_bytes] :
       {std::pair<std::string, int>{"auto", 1152}, {"fp8_e5m2", 576}, {"fp8_ds_mla", 656}}) {
    if (cache != "fp8_ds_mla" && scaled(1, 0) == 0) continue;
    const CliResult r =
        run_cli(kSmall + "--model deepseek-v3 --heads 2 --check 30 --max-num-seqs 2 " +
                "--json - --kv-cache-dtype " + cache);
    ASSERT_EQ(r.exit_code, 0) << r.err;
    const auto j = nlohmann::json::parse(r.out);
    EXPECT_EQ(j.at("backend"), "FLASH_ATTN_MLA");
    EXPECT_EQ(j.at("num_q_heads"), 2);
    EXPECT_EQ(j.at("check").at("rows"), 30);
    EXPECT_EQ(j.at("check").at("failed"), 0);
    EXPECT_GT(j.at("prefix_hit_tokens"), 0);
    EXPECT_EQ(j.at("kv_cache").at("block_bytes"),
              j.at("kv_cache").at("block_size").get<int>() * row_bytes);
  }
}

TEST(ReplayCommand, HeadsReplaceThoseOfTheModel) {
  const CliResult r = run_cli(kSmall + "--heads 8 --check 10 --json -");
  ASSERT_EQ(r.exit_code, 0) << r.err;
  const auto j = nlohmann::json::parse(r.out);
  EXPECT_EQ(j.at("num_q_heads"), 8);
  EXPECT_EQ(j.at("check").at("failed"), 0);
  EXPECT_THAT(r.err, HasSubstr("8 query heads"));
}

TEST(ReplayCommand, IndexTopkReplacesThatOfTheModel) {
  const std::string sparse = kSmall + "--model deepseek-v3.2 --heads 1 --index-topk 12 --check 8 ";
  for (const char* cache : {"auto", "fp8_ds_mla"}) {
    const CliResult r = run_cli(sparse + "--json - --kv-cache-dtype " + cache);
    ASSERT_EQ(r.exit_code, 0) << r.err;
    const auto j = nlohmann::json::parse(r.out);
    EXPECT_EQ(j.at("backend"), "FLASHMLA_SPARSE");
    EXPECT_EQ(j.at("check").at("failed"), 0);
  }
  EXPECT_EQ(run_cli(kSmall + "--index-topk 12").exit_code, 2);
  EXPECT_EQ(run_cli(kSmall + "--model deepseek-v3.2 --index-topk 0").exit_code, 2);
  EXPECT_EQ(run_cli(sparse + "--kv-cache-dtype fp8_e4m3").exit_code, 2);
}

TEST(ReplayCommand, ModelsWithDifferentialAttention) {
  const std::string help = run_cli("replay --help").out;
  for (const std::string model : {"phi-4-mini-flash", "diffllama"}) {
    EXPECT_THAT(help, HasSubstr(model));
    const CliResult r = run_cli(kSmall + "--layers 4 --check 20 --json - --model " + model);
    ASSERT_EQ(r.exit_code, 0) << r.err;
    const auto j = nlohmann::json::parse(r.out);
    EXPECT_EQ(j.at("backend"), "DIFFERENTIAL_FLASH_ATTN");
    EXPECT_EQ(j.at("check").at("failed"), 0);
    EXPECT_EQ(run_cli(kSmall + "--kv-cache-dtype int8_level2 --model " + model).exit_code, 2);
    EXPECT_EQ(run_cli("calibrate synthetic --output none.st --model " + model).exit_code, 2);
  }
  const CliResult r = run_cli(kSmall + "--model phi-4-mini-flash --layers 17");
  EXPECT_EQ(r.exit_code, 2);
  EXPECT_THAT(r.err, HasSubstr("from 1 to 16"));
}

TEST(ReplayCommand, ScalesThatDoNotFitAreOneLineAndExitCodeTwo) {
  const CalibratedScales scales("--layers 2");
  const std::string level1 = kSmall + "--kv-cache-dtype int8_level1 ";
  for (const auto& [arguments, text] :
       {std::pair<std::string, std::string>{level1, "attend calibrate"},
        {level1 + "--value-scales no/such/file", "no/such/file"},
        {level1 + scales.option(), "got scales of 2 layers"},
        {level1 + "--layers 2 --model gpt-oss-20b" + scales.option(), "x 64 elements"},
        {level1 + "--model whisper-large-v3" + scales.option(), "20 kv heads"},
        {kSmall + "--layers 2" + scales.option(), "no scales"},
        {kSmall + "--layers 2 --kv-cache-dtype int8_level2" + scales.option(), "no scales"}}) {
    const CliResult r = run_cli(arguments);
    EXPECT_EQ(r.exit_code, 2) << arguments;
    EXPECT_THAT(r.err, HasSubstr(text)) << arguments;
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
    EXPECT_EQ(r.out, "") << arguments;
  }
}

TEST(ReplayCommand, BadInputIsOneLineAndExitCodeTwo) {
  for (const auto& [arguments, text] :
       {std::pair<std::string, std::string>{"replay no/such/trace.csv", "no/such/trace.csv"},
        {"replay synthetic:colour=red", "colour"},
        {kSmall + "--model nobody", "llama-3.1-8b"},
        {kSmall + "--heads 12", "from 1 to 1024, a multiple of the 8 kv heads"},
        {kSmall + "--heads 0 --model deepseek-v3", "heads': expected from 1 to 1024, got 0"},
        {kSmall + "--model deepseek-v3 --heads 2 --kv-cache-dtype fp8_ds_mla --dtype f16",
         "fp8_ds_mla"},
        {kSmall + "--kv-cache-dtype fp8_ds_mla", "fp8_ds_mla"},
        {kSmall + "--num-blocks 1", "has 1"},
        {kSmall + "--num-encoder-blocks 1", "cross attention"},
        {kSmall + "--model whisper-large-v3 --num-encoder-blocks 93", "has 93"},
        {kSmall + "--limit 0", "limit"},
        {kSmall + "--speculative-tokens -1", "speculative-tokens"},
        {kSmall + "--speculative-tokens 1 --model bert-base", "encoder"},
        {kSmall + "--acceptance 1.5", "from 0 to 1"},
        {kSmall + "--scale-lengths -1", "scale-lengths"},
        {kSmall + "--kv-layout xyz", "nhd or hnd"},
        {kSmall + "--cascade on", "auto, vllm, off or always"},
        {kSmall + "--arithmetic quick", "automatic, exact or fast"},
        {kSmall + "--arithmetic fast --dtype f16", "cannot hold f16 keys"},
        {kSmall + "--arithmetic exact --kv-cache-dtype int8_level2", "as integers"},
        {kSmall + "--kv-layout nhd --kv-cache-dtype int8_level2", "HND"},
        {kSmall + "--kv-cache-dtype int8_level3", "int8_level3"},
        {kSmall + "--kv-cache-dtype int8_level2 --dtype f32", "16 bits"},
        {kSmall + "--dtype xyz", "f32, f16 or bf16"}}) {
    const CliResult r = run_cli(arguments);
    EXPECT_EQ(r.exit_code, 2) << arguments;
    EXPECT_THAT(r.err, HasSubstr(text)) << arguments;
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
    EXPECT_EQ(r.out, "") << arguments;
  }
}

}  // namespace
}  // namespace attend::testing
