// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "attend/cache/value_scales.h"
#include "cli/run_cli.h"
#include "serving/content.h"
#include "support/scale.h"
#include "support/temp_folder.h"

namespace attend::testing {
namespace {

using ::testing::HasSubstr;

const std::string kSmall =
    "calibrate synthetic:requests=3,prompt=20,output=4,shared=8 --model gpt-oss-20b --layers 2 ";

// A folder of its own for each test.
class CalibrateCommand : public ::testing::Test {
 protected:
  std::string path(const std::string& name) const { return (folder_.path() / name).string(); }
  std::string bytes(const std::string& name) const {
    std::ifstream in(path(name), std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void expect_refused(const std::string& arguments, const std::string& text) const {
    const CliResult r = run_cli(arguments);
    EXPECT_EQ(r.exit_code, 2) << arguments;
    EXPECT_THAT(r.err, HasSubstr(text)) << arguments;
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
    EXPECT_EQ(r.out, "") << arguments;
  }

  const TempFolder folder_;
};

TEST_F(CalibrateCommand, WritesTheScalesOfTheRunsValues) {
  const CliResult r =
      run_cli(kSmall + "--seed 9 --output " + path("scales.safetensors") + " --json -");
  ASSERT_EQ(r.exit_code, 0) << r.err;
  const auto j = nlohmann::json::parse(r.out);
  EXPECT_EQ(j.at("model"), "gpt-oss-20b");
  EXPECT_EQ(j.at("num_layers"), 2);
  EXPECT_EQ(j.at("num_kv_heads"), 8);
  EXPECT_EQ(j.at("head_size"), 64);
  EXPECT_GT(j.at("tokens"), 3 * 8);
  EXPECT_GT(j.at("steps"), 0);

  const ValueScales scales = ValueScales::load(path("scales.safetensors"));
  ASSERT_EQ(scales.num_layers, 2);
  ASSERT_EQ(scales.num_kv_heads, 8);
  ASSERT_EQ(scales.head_size, 64);
  // The token at position 0 is the same in all requests: no scale is below what it needs. Values
  // are uniform in +-sqrt(3), so none is far above.
  const serving::Request first{.id = 0, .prompt_tokens = 28, .segments = {{0, 8}}};
  const serving::ValueGenerator generator(9, DType::bf16);
  std::vector<float> value(64);
  for (int layer = 0; layer < 2; ++layer) {
    float least = 1.0F, largest = 0.0F;
    for (int h = 0; h < 8; ++h) {
      generator.fill_f32({serving::content_id(first, 0), 0, layer, h, serving::ValueKind::value},
                         64, value.data());
      for (std::size_t d = 0; d < 64; ++d) {
        const float scale = scales.layer(layer).as<float>()[static_cast<std::size_t>(h) * 64 + d];
        EXPECT_GE(scale * 127.0F, std::abs(value[d]) * 0.9999F);
        EXPECT_LE(scale, 1.74F / 127.0F);
        least = std::min(least, scale);
        largest = std::max(largest, scale);
      }
    }
    EXPECT_EQ(j.at("layers").at(static_cast<std::size_t>(layer)).at("min"), least);
    EXPECT_EQ(j.at("layers").at(static_cast<std::size_t>(layer)).at("max"), largest);
  }
}

TEST_F(CalibrateCommand, CrossAttentionAddsItsLayers) {
  if (scaled(1, 0) == 0) GTEST_SKIP() << "1500 encoder tokens take minutes on an emulated CPU";
  const CliResult r = run_cli(
      "calibrate synthetic:requests=1,prompt=4,output=2,shared=0 --model whisper-large-v3 "
      "--layers 1 --output " +
      path("scales"));
  ASSERT_EQ(r.exit_code, 0) << r.err;
  EXPECT_EQ(ValueScales::load(path("scales")).num_layers, 2);
}

TEST_F(CalibrateCommand, EqualSeedsGiveEqualFiles) {
  const auto run = [&](const std::string& options, const std::string& name) {
    ASSERT_EQ(run_cli(kSmall + options + " --output " + path(name)).exit_code, 0);
  };
  run("--seed 1", "first");
  run("--seed 1 --threads 1", "again");
  run("--seed 2", "other");
  EXPECT_EQ(bytes("first"), bytes("again"));
  EXPECT_NE(bytes("first"), bytes("other"));
}

TEST_F(CalibrateCommand, ShowsAFile) {
  ASSERT_EQ(run_cli(kSmall + "--output " + path("scales")).exit_code, 0);
  const CliResult r = run_cli("calibrate --show " + path("scales"));
  EXPECT_EQ(r.exit_code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("2 layers of 8 kv heads x 64 elements"));
  const auto j = nlohmann::json::parse(run_cli("calibrate --json - --show " + path("scales")).out);
  EXPECT_EQ(j.at("num_layers"), 2);
  EXPECT_EQ(j.at("layers").size(), 2U);
}

TEST_F(CalibrateCommand, FilesThatAreNoneAreRefused) {
  ASSERT_EQ(run_cli(kSmall + "--output " + path("scales")).exit_code, 0);
  const std::string good = bytes("scales");
  const auto write = [&](const std::string& name, const std::string& content) {
    std::ofstream(path(name), std::ios::binary) << content;
  };
  write("truncated", good.substr(0, good.size() - 1));
  write("oversized", good + "x");
  write("text", "no safetensors at all");
  write("empty", "");
  for (const char* name : {"truncated", "oversized", "text", "empty", "missing"}) {
    expect_refused("calibrate --show " + path(name), path(name));
  }
}

TEST_F(CalibrateCommand, BadOptionsAreRefusedBeforeTheRun) {
  expect_refused("calibrate", "TRACE and --output");
  expect_refused("calibrate synthetic", "--output");
  expect_refused("calibrate --output " + path("a"), "TRACE");
  expect_refused("calibrate synthetic --output a --show b", "both");
  expect_refused(kSmall + "--output " + path("no/such/folder/a"), "no/such/folder");
  expect_refused("calibrate synthetic --model nobody --output " + path("a"), "llama-3.1-8b");
  expect_refused("calibrate synthetic --model bert-base --output " + path("a"), "with a cache");
  expect_refused("calibrate synthetic --model deepseek-v3 --output " + path("a"), "no latents");
  expect_refused("calibrate synthetic --layers 0 --output " + path("a"), "layers");
  expect_refused("calibrate no/such/trace --output " + path("a"), "no/such/trace");
  EXPECT_TRUE(std::filesystem::is_empty(folder_.path()));
}

}  // namespace
}  // namespace attend::testing
