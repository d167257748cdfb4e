// SPDX-License-Identifier: Apache-2.0
// Rows of FLASH_ATTN_MLA do not depend on how a prompt is cut, on chunks of context, on neighbours
// or on threads: within the prefill path and within the decode path.
#include <gtest/gtest.h>

#include <span>

#include "attend/core/executor.h"
#include "mla_layer.h"
#include "support/scale.h"

namespace attend::testing {
namespace {

const int kPrompt = scaled(900, 600);

void merge(MlaLayer::Rows& all, const MlaLayer::Rows& some) {
  for (const auto& row : some) all.insert(row);
}

constexpr std::int64_t kWorkspaces[] = {256, 512, 0};
const auto kNumWorkspaces = static_cast<std::size_t>(scaled(3, 1));

/// The rows of one request.
MlaLayer::Rows rows_of(const MlaLayer::Rows& all, int id) {
  MlaLayer::Rows own;
  for (const auto& [key, bytes] : all)
    if (key.first == id) own[key] = bytes;
  return own;
}

void expect_same(const MlaLayer::Rows& got, const MlaLayer::Rows& wanted) {
  ASSERT_EQ(got.size(), wanted.size());
  for (const auto& [key, bytes] : wanted)
    ASSERT_EQ(got.at(key), bytes) << "request " << key.first << " position " << key.second;
}

std::vector<MlaSetup> setups() {
  std::vector<MlaSetup> all(1);
  all.emplace_back().kv_cache_dtype = "fp8_e4m3";
  for (const DType dtype : {DType::f32, DType::f16}) all.emplace_back().dtype = dtype;
  MlaSetup& ds = all.emplace_back();
  ds.dims = {512, 128, 64, 128};
  ds.heads = 2;
  ds.kv_cache_dtype = "fp8_ds_mla";
  MlaSetup& padded = all.emplace_back();
  padded.prefill_backend = "FLASH_ATTN";
  padded.platform = Platform::parse("cuda:8.0");
  all.emplace_back().prefill_backend = "ROCM_AITER_FA";
  all.resize(static_cast<std::size_t>(scaled(static_cast<int>(all.size()), 2)));
  return all;
}

std::string name_of(const MlaSetup& s) {
  return std::string(to_string(s.dtype)) + " " + s.kv_cache_dtype + " " + s.prefill_backend;
}

TEST(MlaSameBits, HoweverAPromptIsCut) {
  const auto one = make_thread_pool(1), three = make_thread_pool(3);
  for (const MlaSetup& setup : setups()) {
    SCOPED_TRACE(name_of(setup));
    MlaLayer whole(setup, *one);
    const MlaLayer::Rows wanted = whole.run({{0, 0, kPrompt}});
    for (const std::int64_t workspace : std::span(kWorkspaces).first(kNumWorkspaces)) {
      for (Executor* executor : {one.get(), three.get()}) {
        MlaSetup cut = setup;
        cut.workspace_tokens = workspace;
        MlaLayer layer(cut, *executor);
        MlaLayer::Rows got = rows_of(layer.run({{1, 0, 40}, {0, 0, 300}, {2, 0, 500}}), 0);
        merge(got, rows_of(layer.run({{2, 500, 700}, {0, 300, 257}, {1, 40, 3}}), 0));
        merge(got, layer.run({{0, 557, kPrompt - 557}}));
        expect_same(got, wanted);
      }
    }
  }
}

TEST(MlaSameBits, OfADecodeInAnyBatch) {
  const auto one = make_thread_pool(1), three = make_thread_pool(3);
  for (MlaSetup setup : setups()) {
    SCOPED_TRACE(name_of(setup));
    setup.decode_threshold = 8;
    MlaLayer alone(setup, *one);
    alone.run({{0, 0, kPrompt}});
    MlaLayer::Rows wanted;
    for (int p = kPrompt; p < kPrompt + 4; ++p) merge(wanted, alone.run({{0, p, 1}}));
    MlaLayer crowd(setup, *three);
    crowd.run({{0, 0, kPrompt}, {1, 0, 600}, {2, 0, 17}});
    // Four tokens at once, beside a decode and a prefill.
    const MlaLayer::Rows got = crowd.run({{1, 600, 1}, {0, kPrompt, 4}, {2, 17, 40}});
    expect_same(rows_of(got, 0), wanted);
  }
}

TEST(MlaSameBits, OfAPromptWhoseLastTokensAreFew) {
  const auto pool = make_thread_pool(2);
  MlaSetup setup;
  setup.decode_threshold = 64;
  setup.short_extends_decode = false;
  MlaLayer whole(setup, *pool), parts(setup, *pool);
  const auto run = [&](MlaLayer& layer, const std::vector<MlaStepRequest>& step) {
    CommonMetadata m = layer.batch(step);
    m.is_prefilling.assign(step.size(), 1);
    m.block_table = layer.block_table.view().slice(0, 0, m.num_reqs);
    const auto metadata = layer.builder->build(0, m);
    layer.workspace.reserve(metadata->workspace_bytes());
    ForwardArgs a = layer.args(step);
    a.workspace = layer.workspace.workspace();
    layer.impl->forward(a, metadata.get());
    return layer.output->snapshot();
  };
  const auto wanted = run(whole, {{0, 0, 303}});
  run(parts, {{0, 0, 300}});
  const auto got = run(parts, {{0, 300, 3}});
  EXPECT_TRUE(
      std::equal(got.begin(), got.end(), wanted.end() - static_cast<std::ptrdiff_t>(got.size())));
}

}  // namespace
}  // namespace attend::testing
