// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/mla_workspace.h"

#include <gtest/gtest.h>

#include <limits>

#include "attend/plan/attention_plan.h"

namespace attend {
namespace {

TEST(MlaWorkspaceTokens, AreEightPromptsOrFourBlocksARequest) {
  EXPECT_EQ(mla_workspace_tokens(128, 1, 16), 1024);   // 8 * 128
  EXPECT_EQ(mla_workspace_tokens(1, 16, 32), 2048);    // 4 * 16 * 32
  EXPECT_EQ(mla_workspace_tokens(300, 8, 16), 2560);   // 2400, then whole pieces
  EXPECT_EQ(mla_workspace_tokens(100, 100, 2), 1024);  // 800 and 800
}

TEST(MlaWorkspaceTokens, HaveLimits) {
  EXPECT_EQ(mla_workspace_tokens(1, 1, 1), kPieceSize);
  EXPECT_EQ(mla_workspace_tokens(163840, 256, 64), kMlaMostWorkspaceTokens);
  EXPECT_EQ(mla_workspace_tokens(513, 1, 16), kMlaMostWorkspaceTokens);
  EXPECT_EQ(mla_workspace_tokens(511, 1, 16), 4096);  // 4088
  EXPECT_EQ(mla_workspace_tokens(480, 1, 16), 3840);
  // A block must fit, however large.
  EXPECT_EQ(mla_workspace_tokens(1, 1, 5000), 5120);
  EXPECT_EQ(mla_workspace_tokens(1, 1, 1 << 20), 1 << 20);
}

TEST(MlaWorkspaceTokens, DoNotOverflow) {
  constexpr int kInt = std::numeric_limits<int>::max();
  constexpr std::int64_t kLong = std::numeric_limits<std::int64_t>::max();
  EXPECT_EQ(mla_workspace_tokens(kLong, kInt, 16), kMlaMostWorkspaceTokens);
  EXPECT_EQ(mla_workspace_tokens(kLong, kInt, kInt), (std::int64_t{kInt} + 255) / 256 * 256);
}

TEST(MlaWorkspaceTokens, AreWholePieces) {
  for (int length = 1; length < 600; ++length)
    for (const int requests : {1, 7, 300})
      for (const int block : {1, 16, 48, 5000}) {
        const std::int64_t n = mla_workspace_tokens(length, requests, block);
        ASSERT_EQ(n % kPieceSize, 0);
        ASSERT_GE(n, block);
      }
}

}  // namespace
}  // namespace attend
