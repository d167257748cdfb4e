// SPDX-License-Identifier: Apache-2.0
// Plans that share prefixes: same bits as flat plans, and what must be refused. `attend check --op
// shared_prefixes` draws many more problems.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "attend/core/error.h"
#include "attend/ops/attention.h"
#include "conformance/check.h"
#include "conformance/shared_prefixes.h"
#include "conformance/varlen_problem.h"
#include "support/scale.h"

namespace attend {
namespace {

using conformance::AttentionShape;
using conformance::KvStorage;
using conformance::Rng;
using conformance::VarlenOptions;
using conformance::VarlenProblem;

constexpr int kBlockSize = 16;

/// Four requests of a few queries, the first three of which begin with the same 33 blocks.
VarlenProblem small_problem(KvStorage kv = KvStorage::paged_nhd) {
  Rng rng(5);
  AttentionShape shape;
  shape.kv_heads = 2;
  shape.group_size = 2;
  shape.head_dim = 16;
  shape.head_dim_v = 24;
  shape.query_lens = {1, 2, 1, 1};
  shape.seq_lens = {540, 700, 600, 9};
  shape.causal = true;
  VarlenOptions options;
  options.kv = kv;
  options.block_size = kBlockSize;
  VarlenProblem problem(rng, shape, options);
  if (kv != KvStorage::ragged) {
    auto* table = problem.block_table.view().as<std::int32_t>();
    for (std::int64_t r = 1; r < 3; ++r)
      for (std::int64_t b = 0; b < 33; ++b)
        table[problem.block_table.offset({r, b})] = table[problem.block_table.offset({0, b})];
  }
  problem.reset();
  return problem;
}

AttentionPlan plan_of(const VarlenProblem& problem, std::span<const SharedPrefix> prefixes) {
  const std::vector<std::int32_t> starts = problem.shape.query_start_loc();
  AttentionPlanInput input;
  input.query_start_loc = starts;
  input.seq_lens = problem.shape.seq_lens;
  input.num_q_heads = problem.shape.q_heads();
  input.num_kv_heads = problem.shape.kv_heads;
  input.head_dim_qk = problem.shape.head_dim;
  input.head_dim_v = problem.shape.head_dim_v;
  input.num_workers = default_executor().num_workers();
  input.shared_prefixes = prefixes;
  return plan_attention(input);
}

void run(const VarlenProblem& problem, const AttentionPlan& plan) {
  Buffer workspace(plan.workspace_bytes);
  std::memset(workspace.data(), 0xff, workspace.size());
  flash_attn_varlen(problem.args(), plan, workspace.workspace(), default_executor());
}

TEST(SharedPrefixes, SameBitsAsWithoutSharing) {
  VarlenProblem problem = small_problem();
  run(problem, plan_of(problem, {}));
  const auto bytes = [&] {
    const TensorView out = problem.out.view();
    const auto* first = out.as<std::byte>();
    return std::vector<std::byte>(first, first + out.numel() * 4);
  };
  const std::vector<std::byte> flat = bytes();
  const SharedPrefix prefixes[] = {{0, 3, 33 * kBlockSize}};
  const AttentionPlan plan = plan_of(problem, prefixes);
  EXPECT_FALSE(plan.reductions.empty());
  problem.reset();
  run(problem, plan);
  EXPECT_EQ(bytes(), flat);
}

TEST(SharedPrefixes, RandomProblemsOnEveryLevel) {
  conformance::CheckOptions options;
  options.cases = testing::scaled(40, 5);
  options.seed = 2;
  options.ops = {"shared_prefixes"};
  for (const auto& failure : conformance::run_checks(options).failures)
    ADD_FAILURE() << failure.message << "\n" << failure.command;
}

void expect_refused(const VarlenProblem& problem, const AttentionPlan& plan,
                    const std::string& argument, const std::string& expected) {
  try {
    run(problem, plan);
    ADD_FAILURE() << "accepted a bad " << argument;
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), argument) << e.what();
    EXPECT_NE(std::string(e.what()).find(expected), std::string::npos) << e.what();
  }
  EXPECT_EQ(problem.out.damage(), "");
}

TEST(SharedPrefixes, OtherBlocksThanPlannedAreRefused) {
  const VarlenProblem problem = small_problem();
  const SharedPrefix uneven[] = {{0, 3, 32 * kBlockSize + 4}};
  expect_refused(problem, plan_of(problem, uneven), "shared_prefixes",
                 "multiple of the block size");
  const SharedPrefix prefixes[] = {{0, 3, 33 * kBlockSize}};
  auto* table = problem.block_table.view().as<std::int32_t>();
  table[problem.block_table.offset({2, 32})] = table[problem.block_table.offset({2, 35})];
  expect_refused(problem, plan_of(problem, prefixes), "block_table", "[2, 32]");
}

TEST(SharedPrefixes, RaggedKeysAreNotShared) {
  const VarlenProblem problem = small_problem(KvStorage::ragged);
  const SharedPrefix prefixes[] = {{0, 3, 256}};
  expect_refused(problem, plan_of(problem, prefixes), "shared_prefixes", "ragged");
}

}  // namespace
}  // namespace attend
